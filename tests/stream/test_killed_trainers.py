"""A trainer that is killed while nobody listens: what it had handed over is delivered later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from esper_otel.stream import resend
from testkit.killed_trainer import Trainer, steps_in
from testkit.patience import PATIENCE_S
from testkit.receiver import HttpReceiver

NOBODY = "http://127.0.0.1:9"
AFTER_STEPS = (40, 170, 401)
"""Steps of a millisecond after which trainers are killed: within different intervals."""


def killed(folder, wait_until, steps, number=signal.SIGKILL, url=NOBODY):
    """A trainer that was killed once it had made so many steps."""
    trainer = Trainer(folder, url)
    trainer.wait_for_first_step()
    wait_until(lambda: len(trainer.told()) >= steps)
    trainer.kill(number)
    return trainer


@pytest.mark.parametrize(
    ("number", "steps"),
    [*((signal.SIGKILL, steps) for steps in AFTER_STEPS), (signal.SIGTERM, AFTER_STEPS[1])],
)
def test_a_killed_trainer_has_left_all_but_its_newest_steps(
    tmp_path, wait_until, number, steps
):
    trainer = killed(tmp_path, wait_until, steps, number)
    told, left = trainer.told(), steps_in(trainer.files())
    # Nothing is missing before the end, and nothing is there twice. How much is missing at the
    # end, in time, is for the bench: a busy machine may be late.
    assert left == list(range(len(left)))
    assert len(left) <= len(told) + 1
    files = trainer.files()
    with HttpReceiver() as receiver:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        assert resend(files, environ).is_complete
        assert resend(trainer.files(), environ).files == ()
        assert receiver.inbox.steps() == dict.fromkeys(left, 1)
    assert list((tmp_path / "spool").glob("*")) == []


def test_the_next_start_delivers_what_a_killed_one_has_left(tmp_path, wait_until):
    trainer = killed(tmp_path, wait_until, AFTER_STEPS[1])
    left = steps_in(trainer.files())
    assert left
    with HttpReceiver() as receiver:
        again = Trainer(tmp_path, receiver.url)
        again.wait_for_first_step()
        wait_until(lambda: not trainer.files())
        again.kill()
        came = [point for _, point in receiver.inbox.points()]
        assert came
        assert set(left) <= set(receiver.inbox.steps())


def test_a_trainer_that_is_killed_leaves_no_file_while_the_receiver_takes_all(
    tmp_path, wait_until
):
    with HttpReceiver() as receiver:
        trainer = killed(tmp_path, wait_until, AFTER_STEPS[1], url=receiver.url)
        delivered = receiver.inbox.steps()
        left = steps_in(trainer.files())
    assert set(delivered.values()) == {1}
    # A receiver that was late for a moment has some of it written down, and never what it took.
    assert set(left).isdisjoint(delivered)


def test_a_forked_child_neither_writes_nor_frees_what_its_parent_has_left(tmp_path):
    script = f"""
import os, sys, time
from pathlib import Path
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream, resend
from esper_otel.stream.spool_files import spool_files_in
spool = Path({str(tmp_path / "spool")!r})
stream = Stream(EsperSettings(spool_dir=str(spool), stream_interval_ms=10.0), run_id="run",
                instance_id="i", environ={{"OTEL_EXPORTER_OTLP_ENDPOINT": {NOBODY!r}}})
stream.start()
stream.frame(1, [1.0] * len(STEP_KEYS))
while not spool.exists() or not spool_files_in(spool) or stream._spool.unkept():
    time.sleep(0.01)
before = [(path, path.read_bytes()) for path in spool_files_in(spool)]
if os.fork() == 0:
    stream.frame(2, [2.0] * len(STEP_KEYS))
    stream.close()
    held = all(report.later for report in resend(spool_files_in(spool)).files)
    os._exit(0 if held and spool_files_in(spool) else 1)
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 0
assert before == [(path, path.read_bytes()) for path in spool_files_in(spool)]
# The child's end has not given the lock away.
code = "import sys; from pathlib import Path; from esper_otel.stream import resend; "
code += "print(resend([Path(sys.argv[1])]).files[0].later)"
import subprocess
done = subprocess.run([sys.executable, "-c", code, str(before[0][0])], capture_output=True)
assert done.stdout == b"True\\n", done
print(len(stream.close(0.0).files))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout == "1\n", done.stderr
