"""A sample of what the bench tries: many kinds of hostile environment at once."""

import subprocess

import pytest

from bench.environments import ALONE, KINDS, Kind, combinations, together, tried

BY_HAND = [
    name
    for name, kind in KINDS.items()
    if not (kind.to_python or kind.grpc or kind.shell or kind.site or name in ALONE)
]
PYTHONS = (
    "path empty",
    "warnings are errors",
    "ASCII",
    "safe path",
    "site that raises",
    "few files",
    "stdin closed",
)


def test_all_that_can_be_had_at_once_keeps_no_training_from_being_recorded():
    trial = tried(together(BY_HAND))
    assert (trial.status, trial.output, trial.is_recorded) == (True, True, True), trial.told
    assert "Traceback" not in trial.told


def test_what_is_switched_off_says_so():
    trial = tried(KINDS["switched off"])
    assert (trial.status, trial.output, trial.steps) == (True, True, 0), trial.told
    assert "OTEL_SDK_DISABLED" in trial.reason


def test_without_threads_and_without_a_home_no_step_is_lost():
    made = subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True)
    if made.returncode:  # in a chroot, or a container that is not let
        pytest.skip(f"a user without a name cannot be made here: {made.stderr.strip()}")
    trial = tried(together(["no threads", "user without a name"]))
    assert (trial.status, trial.output, trial.is_recorded) == (True, True, True), trial.told


def test_a_python_that_is_hard_to_live_in_is_as_without_us():
    trial = tried(together(PYTHONS))
    assert (trial.status, trial.output, trial.is_recorded) == (True, True, True), trial.told


def test_every_kind_is_in_a_combination_or_alone():
    assert {name for names in combinations() for name in names} | ALONE == set(KINDS)
    assert isinstance(together(KINDS), Kind)
