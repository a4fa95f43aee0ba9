"""A whole run, with its recorder, goes on from a checkpoint, in its process or another."""

import io
import os
import sys
from unittest.mock import patch

import pytest
import torch
from kasmina.cut_runs import lived, settled_in
from kasmina.driven import QUICK, AtOnce, host, idle
from kasmina.recorded import Recorded
from torch import nn

from esper_otel import process
from esper_otel import run as runs
from esper_otel.leyline import events
from esper_otel.leyline.stages import Stage
from testkit.fork_server import fork_server


@pytest.mark.parametrize("cut", [1, 12, 18, 25, 40])
def test_with_its_recorder_a_run_grows_on_the_same_steps(cut):
    driven = Recorded()
    for _ in range(cut):
        driven.step()
    resumed = Recorded().resume(driven.saved())
    driven.rows.clear()
    for each in (driven, resumed):
        each.events.clear()
        for _ in range(40):
            each.step()
    assert resumed.rows == driven.rows
    assert resumed.rows[0]["step"] == cut + 1
    assert "loss_delta" in resumed.rows[0]
    told = [event.text for event in driven.events if event.name == events.STAGE_CHANGED]
    assert resumed.told(events.STAGE_CHANGED) == told
    assert told


def test_a_process_that_has_counted_further_counts_on():
    driven, other = Recorded(), Recorded()
    for _ in range(3):
        driven.step()
    for _ in range(5):
        other.step()
    other.resume(driven.saved())
    other.step()
    assert other.rows[-1]["step"] == 6


class Nowhere:
    """A stream that leads to nowhere."""

    def __init__(self, *_, **__):
        pass

    def start(self):
        pass

    def frame(self, *_, **__):
        pass

    timeline = event = configure = follow = frame

    def close(self, timeout_s=None):
        return self


def a_run(monkeypatch):
    monkeypatch.setattr(runs, "Stream", Nowhere)
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    run = process.start(optimizer, mode="off")
    with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
        run.plant(model, ["1"], **{**QUICK, "growth": "autonomous", "loss_rise_max": 100.0})
    return run, model, optimizer


def train(run, model, optimizer, steps):
    losses = []
    for step in range(steps):
        x = torch.linspace(-1.0, 1.0, 24).view(6, 4) * (1 + step % 3)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        loss.backward()
        run.report(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_three_lines_of_the_documentation_resume_a_run(monkeypatch):
    run, model, optimizer = a_run(monkeypatch)
    while run.garden.slots["1"] is not Stage.FOSSILIZED:
        train(run, model, optimizer, 3)
        assert run._recorder.step < 500
    state = {"model": model, "optimizer": optimizer, "garden": run.garden}
    file = io.BytesIO()
    torch.save({name: each.state_dict() for name, each in state.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    step = run._recorder.step
    uncut = train(run, model, optimizer, 9)
    run.close()

    run, model, optimizer = a_run(monkeypatch)
    model.load_state_dict(saved["model"])
    run.garden.load_state_dict(saved["garden"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(run, model, optimizer, 9) == uncut
    assert run._recorder.step == step + 9
    run.close()


RESUME = """
import sys, torch
from kasmina.driven import Driven
from kasmina.cut_runs import MADE, lived
torch.manual_seed(99)
driven = Driven(**MADE).resume(open(sys.argv[1], "rb").read())
_, weights = lived(driven, 30)
torch.save({"losses": driven.losses, "weights": weights,
            "stages": {k: v.name for k, v in driven.garden.slots.items()}}, sys.argv[2])
"""


def test_another_process_goes_on_to_the_bit(tmp_path):
    driven = settled_in(Stage.BLENDING)
    driven.step(idle)
    assert 0.0 < driven.garden.slot("1").hook.alpha < 1.0
    (tmp_path / "run.pt").write_bytes(driven.saved())
    driven.losses.clear()
    _, weights = lived(driven, 30)
    done = fork_server().run(
        [sys.executable, "-c", RESUME, tmp_path / "run.pt", tmp_path / "end.pt"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert end["losses"] == driven.losses
    assert end["stages"] == {k: v.name for k, v in driven.garden.slots.items()}
    for a, b in zip(end["weights"], weights, strict=True):
        assert torch.equal(a, b)
