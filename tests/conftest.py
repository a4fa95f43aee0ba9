"""What holds for all tests."""

import gc
import os
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import testkit.shipped_tables  # noqa: F401  (before anything else reads one)
from ops.stack.programs import CHROMIUM, MissingError, find
from testkit.fork_server import share_servers
from testkit.kept_bytecode import keep_bytecode

# Before anything imports torch, and for every process that a test starts: several that compute
# side by side, each with a thread for every processor, wait for one another in a busy loop.
os.environ["OMP_NUM_THREADS"] = "1"

# Hundreds of processes import the same modules, and a fresh environment has no bytecode of
# them: where nobody may keep it, each compiles torch and all of ours anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Until all tests are collected, nearly all that is made stays.
gc.disable()

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


TOGETHER = {
    "ops/stack": "stack",  # one Collector, Prometheus and Jaeger for all of them
    **dict.fromkeys(
        (  # one import of Lightning and Transformers
            *("integrations/test_checked_updates.py", "integrations/test_enforced_rates.py"),
            *("integrations/test_framework_evaluations.py", "integrations/test_frameworks.py"),
            *("integrations/test_framework_trainings.py", "integrations/test_notebooks.py"),
            *("integrations/test_framework_versions.py", "integrations/test_public_loops.py"),
            *("integrations/test_run_state.py", "integrations/test_two_ways_in.py"),
        ),
        "frameworks",
    ),
}
"""Files and folders of tests that share what takes long to make; one process runs them."""

FIRST = (
    *("stack", "test_end_to_end.py", "frameworks", "integrations/test_ways_to_start.py"),
    *("integrations/test_launchers.py", "kasmina/test_tools.py", "kasmina/test_compiling.py"),
    *("test_examples.py", "docs/test_commands_on_pages.py", "docs/test_site.py"),
    *("sidecar/test_receiving_bounds.py", "fuzz/test_targets.py", "test_packaging.py"),
)
"""What takes longest, so that no process is left with it when the others have ended."""


def unit_of(nodeid):
    """What is run by one process: a file, or what is together with it."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    places = (file, *map(str, Path(file).parents))
    return next((TOGETHER[each] for each in places if each in TOGETHER), file)


def pytest_collection_modifyitems(items):
    order = {unit: place for place, unit in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(unit_of(item.nodeid), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of ``--dist loadfile``, with files together."""
    from xdist.scheduler import LoadFileScheduling

    class Units(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return unit_of(nodeid)

    return Units(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Processes of tests are forks of one that has torch, which runs their scripts as well."""
    if not HAS_TORCH or "COVERAGE_PROCESS_CONFIG" in os.environ:
        return
    python = shlex.join([*share_servers(), sys.executable])
    keep_bytecode(config, Path(__file__).parent)  # while the servers import
    for spec in specs:
        spec.python = python


def pytest_runtest_setup(item):
    if not HAS_TORCH and item.get_closest_marker("torch"):
        pytest.skip("torch is not installed")


def pytest_collection_finish():
    """What the imports of all tests have made stays: no collection of garbage looks at it."""
    gc.collect()
    gc.freeze()


def pytest_runtestloop():
    gc.enable()


def pytest_unconfigure():
    """What is frozen ends with the process; pytest collects garbage several times yet."""
    gc.enable()


@pytest.fixture(scope="module")
def browser():
    """One Chromium for the tests of a module, or the reason why there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    try:
        program = find(CHROMIUM)
    except MissingError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        try:
            playwright = stack.enter_context(api.sync_playwright())
        except Exception:
            complaint = _driver_complaint()
            if complaint is None:
                raise
            pytest.skip(f"playwright's driver does not start: {complaint}")
        started = playwright.chromium.launch(executable_path=str(program))
        yield started
        started.close()


def _driver_complaint():
    """Why Playwright's driver does not start; None where it does.

    It is a program that wants a library which a small Debian does not have (libatomic1).
    """
    done = subprocess.run(
        [sys.executable, "-m", "playwright", "--version"], capture_output=True, text=True
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else None


class Tabs:
    """Pages of a browser: what they complain of, and whom they ask."""

    def __init__(self, browser):
        self.complaints, self.requests, self.contexts = [], [], []
        self._browser = browser

    def open(self, **context):
        """A page in a context of its own."""
        size = {"width": 1300, "height": 900}
        self.contexts.append(self._browser.new_context(viewport=size, **context))
        page = self.contexts[-1].new_page()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        return page


@pytest.fixture
def tabs(browser):
    """Opens pages; at the end nothing may have been complained of."""
    tabs = Tabs(browser)
    yield tabs
    for context in tabs.contexts:
        context.close()
    assert tabs.complaints == []
