"""What holds for all tests."""

import gc
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
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

HAS_TORCH = find_spec("torch") is not None
NEEDS_NO_TORCH = {"leyline", "sidecar", "tamiyo", "report", "export", "top", "ops", "deploy"}
"""Folders whose files can be imported without torch, or something of ours imports it."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Where torch is not installed, files that import it are skipped."""
    report = yield
    folder = collector.path.relative_to(Path(__file__).parent).parts[:1]
    if HAS_TORCH or report.outcome != "failed" or NEEDS_NO_TORCH & {*folder}:
        return report
    if "No module named 'torch'" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: torch is not installed")
    return report


def pytest_runtest_setup(item):
    if not HAS_TORCH and item.get_closest_marker("torch"):
        pytest.skip("torch is not installed")


def pytest_collection_finish():
    """What the imports of all tests have made stays: no collection of garbage looks at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
