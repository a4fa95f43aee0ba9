"""Imported by Python itself at start, when ``esper-otel run`` put this folder on its path.

Leaves no trace but the instrumentation: the path, the environment and a ``sitecustomize``
of the user's own are as they would have been without.
"""

try:
    from esper_otel.integrations.startup import begin
except Exception as _error:  # a Python that has no esper_otel, or is too old for it
    import os
    import sys

    def begin(why=repr(_error)):
        """Undo the detour, and say that nothing is recorded."""
        here = os.path.dirname(os.path.abspath(__file__))
        own = os.environ.pop("ESPER_CHAINED_PYTHONPATH", None)
        os.environ.pop("PYTHONPATH", None)
        if own is not None:
            os.environ["PYTHONPATH"] = own
        sys.path[:] = [path for path in sys.path if path != here]
        sys.modules.pop("sitecustomize", None)
        sys.path_importer_cache.pop(here, None)
        if sys.stderr is not None:
            sys.stderr.write(
                "esper-otel: nothing is recorded: %s cannot load esper_otel (%s); install it "
                "there\n" % (sys.executable, why)
            )
        __import__("sitecustomize")


begin()
