"""Several processes under DDP: the same operation on the same step, and nobody left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Processes that import torch, two at a time: seconds, or a minute where others are at work.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

RANK = Path(__file__).with_name("one_rank.py")
LONG_S = 240

SCENARIOS = {
    "a slow fetch": {"slow": 1, "until": "FOSSILIZED"},
    "a deaf sidecar": {"deaf_from": 20, "steps": 60},
    "a leak": {"leak": [1, 1], "until": "EMBARGOED"},
    "no garden": {"bare": True, "steps": 22},
    "other slots": {"slots": [["1"], ["3"]]},
}
"""Those in which both ranks live to the end, run by the same two processes."""

Told = dict[str, Any]


def play(folder: Path, scenarios: list[Told], awaited: int = 2) -> tuple[list[Any], list[str]]:
    """What the first ``awaited`` ranks wrote, and what they said on stderr."""
    environ = {key: value for key, value in os.environ.items() if "OTEL" not in key}
    environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
    environ["PYTHONPATH"] = os.pathsep.join([str(RANK.parents[1]), *filter(None, sys.path)])
    ranks = []
    try:
        for rank in range(2):
            told = {"rank": rank, "folder": str(folder), "scenarios": scenarios}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(RANK), json.dumps(told)],
                    env=environ,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=LONG_S)[1] for process in ranks[:awaited]]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
    files = [folder / f"rank{rank}.json" for rank in range(awaited)]
    assert all(file.exists() for file in files), "\n".join(said)
    return [json.loads(file.read_text()) for file in files], said


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> dict[str, tuple[Told, Told]]:
    """What both ranks did, by scenario."""
    both, _ = play(tmp_path_factory.mktemp("ranks"), list(SCENARIOS.values()))
    return dict(zip(SCENARIOS, zip(*both, strict=True), strict=True))


def grown(steps: list[Any]) -> dict[str, list[str]]:
    """The stages of each slot in the order in which they came."""
    stages: dict[str, list[str]] = {}
    for _, slots, _ in steps:
        for path, stage in slots:
            seen = stages.setdefault(path, [])
            if not seen or seen[-1] != stage:
                seen.append(stage)
    return stages


WHOLE_LIFE = [
    "DORMANT",
    "GERMINATED",
    "TRAINING",
    "BLENDING",
    "SHADOWING",
    "PROBATIONARY",
    "FOSSILIZED",
]


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "other slots"])
def test_all_ranks_are_alike_at_every_step(lived, scenario) -> None:
    first, second = lived[scenario]
    assert len(first["steps"]) > 10
    for kept in ("steps", "decisions", "rates", "weights", "seeds"):
        assert first[kept] == second[kept]


def test_a_seed_lives_its_life_however_late_its_kernel_is_on_one_rank(lived) -> None:
    first, _ = lived["a slow fetch"]
    assert WHOLE_LIFE in grown(first["steps"]).values()
    # What is applied at the end of a step is what was asked about the one before.
    asked_for = [step for _, _, step in first["decisions"][1:]]
    assert asked_for == list(range(1, len(first["steps"])))


def test_without_a_sidecar_all_go_on(lived) -> None:
    first, _ = lived["a deaf sidecar"]
    reasons = {reason for _, reason, _ in first["decisions"][25:]}
    assert reasons <= {"unreachable", "breaker_open", "timeout"}


def test_a_leak_on_one_rank_ends_the_seed_on_all(lived) -> None:
    first, _ = lived["a leak"]
    assert any("EMBARGOED" in stages for stages in grown(first["steps"]).values())
    assert not any("BLENDING" in stages for stages in grown(first["steps"]).values())


def test_without_a_garden_the_learning_rate_is_changed_on_all_ranks_at_once(lived) -> None:
    first, _ = lived["no garden"]
    # Asked about step 5, applied at the end of step 6.
    assert first["rates"][4:7] == [0.02, 0.01, 0.01]


def test_ranks_with_different_slots_are_told_so(lived) -> None:
    for each in lived["other slots"]:
        assert "expected the same on all ranks" in each["refused"]


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone_keeps_nobody_waiting_for_good(tmp_path, end) -> None:
    # Without DDP, whose own collective would wait for the other rank.
    scenario = {"without_ddp": True, "timeout_s": 5.0, "steps": 60, end: [1, 30]}
    ((first,),), (said,) = play(tmp_path, [scenario], awaited=1)
    assert len(first["steps"]) == 60
    assert first["decisions"][40][:2] == ["CONTINUE", "not_agreed"]
    assert said.count("agree no more") == 1
