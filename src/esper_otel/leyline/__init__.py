"""The shared language: metrics, stages, decisions, step records, wire. Imports nothing of
ours."""

import logging

from esper_otel.leyline.terminal import EscapingFilter, LastResort

# Here, as the handlers are the script's, and whatever logs a name of a run loads this package.
LastResort.listen("esper_otel")
logging.getLogger("esper_otel").addFilter(EscapingFilter())
