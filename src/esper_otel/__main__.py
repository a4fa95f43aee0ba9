"""``python -m esper_otel`` is the ``esper-otel`` command."""

import sys

from esper_otel.cli import main

sys.exit(main())
