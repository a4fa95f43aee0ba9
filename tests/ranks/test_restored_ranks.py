"""Two ranks go back to the same snapshot at the same step, or neither does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from ranks.restored_ranks import ASKED

from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

pytestmark = [pytest.mark.torch, pytest.mark.timeout(200)]

SCRIPT = Path(__file__).parent / "restored_ranks.py"
GOOD = 13
"""Snapshots are made at the end of steps 2, 13, and 24; that of 24 is not good by step 31."""

BACK = ASKED + 2
"""The answer about a step is settled at the end of the next; then comes the update."""


def ranks(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What both have left."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    ours = {"OMP_NUM_THREADS": "1", "OTEL_METRICS_EXPORTER": "none"}
    ours |= {"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    ours["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), clean.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    done = fork_server().run(command, env=clean | ours, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_that_agree_go_back_alike(tmp_path) -> None:
    one, other = ranks(tmp_path)
    assert one == other
    assert one["restored"] == [[GOOD, BACK]]
    after = one["after"]
    assert after[BACK - 1] == after[GOOD - 1]
    assert len(set(after)) == len(after) - 1, "no other step left anything as it was"


def test_ranks_that_do_not_agree_do_not_go_back(tmp_path) -> None:
    one, other = ranks(tmp_path, "lonely")
    assert one["after"] == other["after"]
    assert one["restored"] == other["restored"] == []
    assert (
        one["refused"]
        == other["refused"]
        == {"the ranks of this run do not synchronise decisions": 1}
    )
