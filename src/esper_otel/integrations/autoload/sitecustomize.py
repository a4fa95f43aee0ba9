"""Imported by Python itself at start, when ``esper-otel run`` put this folder on its path.

Leaves no trace but the instrumentation: the path, the environment and a ``sitecustomize``
of the user's own are as they would have been without.
"""

from esper_otel.integrations.startup import begin

begin()
