"""Imported by Python itself at start, when ``esper-otel run`` put this folder on its path.

Leaves no trace but the instrumentation: the path, the environment and a ``sitecustomize``
of the user's own are as they would have been without.
"""

try:
    from esper_otel.integrations.startup import begin
except Exception as error:  # a Python that has no esper_otel, or is too old for it
    import os
    import sys

    if sys.stderr is not None:
        told = "esper-otel: nothing is recorded: {} cannot load esper_otel ({}), install it\n"
        sys.stderr.write(told.format(sys.executable, error))
    here = __file__.rpartition(os.sep)[0]
    own = os.environ.pop("ESPER_CHAINED_PYTHONPATH", None)
    os.environ.pop("ESPER_ONLY_WORKERS", None)
    folders = os.environ.pop("PYTHONPATH", "").split(os.pathsep)
    if folders != [here]:  # a shell script has put others around it
        own = os.pathsep.join(
            "" if each == here else each for each in folders if each != here or not own
        )
    if own is not None:
        os.environ["PYTHONPATH"] = own
    sys.path[:] = [path for path in sys.path if path != here]
    sys.modules.pop("sitecustomize", None)
    sys.path_importer_cache.pop(here, None)
    __import__("sitecustomize")  # where there is none, Python passes over what this raises
else:
    begin()
