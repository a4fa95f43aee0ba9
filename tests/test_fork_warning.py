"""A process that forks is not warned of threads that are ours, and of others as without us."""

import json
import os
import subprocess
import sys

from testkit.patience import PATIENCE_S

SCRIPT = """
import ctypes, json, os, threading, warnings
import esper_otel

def warned():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        if not os.fork():
            os._exit(0)
        os.wait()
    return [(each.category.__name__, os.path.basename(each.filename)) for each in given]

def close():
    run.close(0.1)
    for each in threading.enumerate():
        if each is not threading.main_thread():
            each.join(30)

run = esper_otel.start(mode="off")
run.report(loss=1.0)
run.step()
assert threading.active_count() > 1
told = {"ours": warned()}
over = threading.Event()
other = threading.Thread(target=over.wait)
other.start()
told["another of Python"] = warned()
over.set()
other.join()
close()
told["none"] = warned()
run = esper_otel.start(mode="off")
run.step()
libc = ctypes.CDLL(None)
thread = ctypes.c_ulong()
libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
told["one of a library"] = warned()
close()
print(json.dumps([told, [each.name for each in threading.enumerate()]]), flush=True)
os._exit(0)
"""


def test_a_fork_is_warned_of_for_the_threads_of_others_alone(tmp_path):
    script = tmp_path / "forks.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=clean | {"ESPER_SPOOL_DIR": str(tmp_path / "spool")},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    told, threads = json.loads(done.stdout)
    # Python 3.11 does not warn.
    warning = [["DeprecationWarning", "forks.py"]] if sys.version_info >= (3, 12) else []
    assert told == {
        "ours": [],
        "another of Python": warning,
        "none": [],
        "one of a library": warning,
    }
    assert threads == ["MainThread"]
