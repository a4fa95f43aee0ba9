"""Pairs of processes: the same operation on the same step, and nobody left waiting."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

RANK = Path(__file__).with_name("one_rank.py")
BOTH = [["1", "3"]] * 2

GROWING = {
    "a slow fetch": {"slots": BOTH, "slow": 1, "until": "FOSSILIZED"},
    "a deaf sidecar": {"slots": BOTH, "deaf_from": 20, "steps": 60},
    "a leak": {"slots": BOTH, "leak": [1, 1], "until": "EMBARGOED"},
    "planted in the middle": {
        "slots": BOTH,
        "planted_at": 6,
        "until": "FOSSILIZED",
        "steps": 200,
    },
    "other slots": {"slots": [["1"], ["3"]]},
}
DECIDING = {
    "told to agree": {"steps": 22},
    "by themselves": {"by_themselves": True, "until_rate": 0.005},
    "told meanwhile": {"by_themselves": True, "agrees_at": 3, "until_rate": 0.005},
    "each for itself": {
        "by_themselves": True,
        "without_ddp": True,
        "hears_out": True,
        "steps": 60,
    },
    "settings that differ": {
        "by_themselves": True,
        "modes": ["enforce", "advise"],
        "hears_out": True,
        "steps": 60,
    },
    "one that does not train": {
        "by_themselves": True,
        "without_ddp": True,
        "absent": 1,
        "timeout_s": 120.0,
        "steps": 60,
    },
}
# Without DDP, whose own collective would wait for the other rank.
LEFT = {"without_ddp": True, "timeout_s": 5.0, "steps": 60}
PAIRS = {
    "growing": GROWING,
    "deciding": DECIDING,
    "SIGKILL": {"SIGKILL": {**LEFT, "SIGKILL": [1, 30]}},
    "SIGSTOP": {"SIGSTOP": {**LEFT, "SIGSTOP": [1, 30]}},
}
"""Scenarios of a pair follow one another in its two processes."""

Told = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the pairs have left what happened."""
    folder = tmp_path_factory.mktemp("ranks")
    environ = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OTEL_", "ESPER_"))
    }
    environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
    environ["PYTHONPATH"] = os.pathsep.join([str(RANK.parents[1]), *filter(None, sys.path)])
    pairs = {name: list(scenarios.values()) for name, scenarios in PAIRS.items()}
    command = [sys.executable, RANK, json.dumps({"folder": str(folder), "pairs": pairs})]
    done = fork_server().run(command, env=environ, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> dict[str, tuple[Told, ...]]:
    """What the ranks of each scenario that lived to its end did."""
    told: dict[str, tuple[Told, ...]] = {}
    for pair, scenarios in PAIRS.items():
        files = sorted((folder / pair).glob("rank*.json"))
        assert files, (folder / pair / "rank0.err").read_text()
        lists = [json.loads(file.read_text()) for file in files]
        told |= dict(zip(scenarios, zip(*lists, strict=True), strict=True))
    return told


def said(folder: Path, pair: str, rank: int) -> str:
    return (folder / pair / f"rank{rank}.err").read_text()


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
ALIKE = (
    "a slow fetch",
    "planted in the middle",
    "a deaf sidecar",
    "a leak",
    "told to agree",
    "by themselves",
    "told meanwhile",
)


@pytest.mark.parametrize("scenario", ALIKE)
def test_all_ranks_are_alike_at_every_step(ranks, scenario) -> None:
    first, second = ranks[scenario]
    assert len(first["steps"]) > 10
    for kept in ("run", "steps", "decisions", "rates", "weights", "seeds"):
        assert first[kept] == second[kept]


def test_a_seed_lives_its_life_however_late_its_kernel_is_on_one_rank(ranks) -> None:
    first, _ = ranks["a slow fetch"]
    assert WHOLE_LIFE in grown(first["steps"]).values()
    # What is applied at the end of a step is what was asked about the one before.
    asked_for = [step for _, _, step in first["decisions"][1:]]
    assert asked_for == list(range(1, len(first["steps"])))


def test_a_garden_that_is_planted_while_a_request_is_under_way_grows_as_any(ranks) -> None:
    """The leader's post of the step before comes first on all ranks, then the planting."""
    first, _ = ranks["planted in the middle"]
    assert WHOLE_LIFE in grown(first["steps"]).values()
    reasons = {reason for _, reason, _ in first["decisions"][1:]}
    assert reasons == {"nominal"}


def test_without_a_sidecar_all_go_on(ranks) -> None:
    first, _ = ranks["a deaf sidecar"]
    reasons = {reason for _, reason, _ in first["decisions"][25:]}
    assert reasons <= {"unreachable", "breaker_open", "timeout"}


def test_a_leak_on_one_rank_ends_the_seed_on_all(ranks) -> None:
    first, _ = ranks["a leak"]
    assert any("EMBARGOED" in stages for stages in grown(first["steps"]).values())
    assert not any("BLENDING" in stages for stages in grown(first["steps"]).values())


def test_without_a_garden_the_learning_rate_is_changed_on_all_ranks_at_once(ranks) -> None:
    first, _ = ranks["told to agree"]
    # Asked about step 5, settled at the end of step 6, used from step 7 on.
    assert first["rates"][5:8] == [0.02, 0.01, 0.01]


def test_ranks_with_different_slots_are_told_so(ranks) -> None:
    for each in ranks["other slots"]:
        assert "expected the same on all ranks" in each["refused"]


def test_ranks_that_train_together_agree_untold(ranks) -> None:
    first, _ = ranks["by themselves"]
    reasons = [reason for _, reason, _ in first["decisions"]]
    unmet = reasons.count("not_agreed")
    assert unmet >= 2
    assert "not_agreed" not in reasons[unmet:]
    # Not one decision is applied before, by anybody.
    assert set(first["rates"][:unmet]) == {0.02}
    assert first["rates"][-1] < 0.005


def test_ranks_that_are_told_to_agree_do_so_at_once(ranks) -> None:
    first, _ = ranks["told meanwhile"]
    reasons = [reason for _, reason, _ in first["decisions"]]
    assert reasons[:2] == ["not_agreed"] * 2
    assert "not_agreed" not in reasons[2:]


REFUSALS = {
    "each for itself": "one of them has taken a step without waiting for another",
    "settings that differ": "their settings for decisions differ",
}


@pytest.mark.parametrize("scenario", REFUSALS)
def test_ranks_that_should_not_agree_apply_nothing(folder, ranks, scenario) -> None:
    for each in ranks[scenario]:
        assert {reason for _, reason, _ in each["decisions"]} == {"not_agreed"}
        assert set(each["rates"]) == {0.02}
    # The one that asks tells why, once.
    assert said(folder, "deciding", 0).count(REFUSALS[scenario]) == 1
    assert REFUSALS[scenario] not in said(folder, "deciding", 1)


def test_nobody_waits_for_a_rank_that_does_not_train(ranks) -> None:
    first, _ = ranks["one that does not train"]
    assert len(first["steps"]) == 60
    assert first["longest_s"] < DECIDING["one that does not train"]["timeout_s"] / 2


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone_keeps_nobody_waiting_for_good(folder, ranks, end) -> None:
    first = ranks[end][0]
    assert len(first["steps"]) == 60
    assert first["decisions"][40][:2] == ["CONTINUE", "not_agreed"]
    assert said(folder, end, 0).count("no longer synchronise decisions") == 1
