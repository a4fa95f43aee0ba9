"""What holds for all tests."""

import gc
import os
import signal

from hypothesis import HealthCheck, settings

# Before anything imports torch, and for every process that a test starts: several that compute
# side by side, each with a thread for every processor, wait for one another in a busy loop.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that puts a job in the background has it ignore SIGINT, and so would every process
# that a test starts and means to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine an example takes as long as it takes: how fast things are is for benches.
# The same examples each time: a gate that fails now and then is believed by nobody. What random
# ones find, `make fuzz` looks for.
settings.register_profile(
    "esper",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("esper")


def pytest_collection_finish():
    """What the imports of all tests have made stays: no collection of garbage looks at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
