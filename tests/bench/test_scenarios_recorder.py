"""Recording a scenario: a real training, and in it what its kind says, where it says it."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from bench.scenarios import __main__ as command
from bench.scenarios import recorder, troubles
from bench.scenarios.recordings import known, packed, unpacked
from bench.scenarios.suite import Extent, Scenario
from esper_otel.kasmina import blueprints

pytestmark = pytest.mark.torch

SHORT = Extent(before=36, tail=8, healthy=20, seeds=1, healthy_seeds=1)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(recorder.EXTENTS, "digits", SHORT)
    # Its bad seeds are blueprints, which must not be found by whoever looks after us.
    monkeypatch.setattr(blueprints, "_registry", dict(blueprints._registry))
    for signal in ("METRICS", "TRACES", "LOGS"):
        monkeypatch.setenv(f"OTEL_{signal}_EXPORTER", "none")


def trained(kind):
    (run,) = recorder.record(Scenario("digits", kind, 0))
    return run


def test_a_healthy_run_is_recorded_as_its_sidecar_would_have_heard_it():
    run = trained("plain")
    frames = [frame for frame, _ in run.frames()]
    assert [frame.step for frame in frames] == list(range(1, SHORT.healthy + 1))
    last = frames[-1].values
    assert {"loss", "loss_delta", "gradient_norm", "step_latency_ms"} <= set(last)
    assert {"forward_ms", "backward_ms", "input_wait_ms", "optimizer_lr"} <= set(last)
    assert last["nonfinite"] == 0
    assert run.at is None
    again = [frame for frame, _ in unpacked(packed(run)).frames()]
    assert again == frames


@pytest.mark.parametrize("kind", ["nan_batch", "lr_zero", "hook_slow", "sources_conflict"])
def test_the_trouble_begins_where_the_label_says(kind):
    run = trained(kind)
    assert run.at is not None
    assert SHORT.before <= run.at < len(run.times)
    key, ok, wrong = {
        "nan_batch": ("nonfinite", lambda v: v == 0, lambda v: v > 0),
        "lr_zero": ("optimizer_lr", lambda v: v > 0, lambda v: v == 0),
        # A frame is sealed before its own ask, so that a slow one shows in the next.
        "hook_slow": ("tamiyo_latency_ms", lambda v: v < 40, lambda v: v >= 40),
        "sources_conflict": ("grad_conflict_rate", lambda v: v < 0.5, lambda v: v > 0.5),
    }[kind]
    column = run.steps[key]
    first = run.at if kind == "hook_slow" else run.at - 1
    assert all(ok(value) for value in column[:first])
    assert wrong(column[first])


@pytest.mark.parametrize(
    ("kind", "key", "holds"),
    [
        ("lr_times_10", "optimizer_lr", lambda was, is_: is_ == pytest.approx(10 * was)),
        ("inputs_zero", "loss", lambda was, is_: is_ > was),
        ("inputs_times_255", "loss", lambda was, is_: is_ > 4 * was),
    ],
)
def test_a_metric_is_another_where_the_trouble_begins(kind, key, holds):
    run = trained(kind)
    column = run.steps[key]
    assert holds(column[run.at - 2], column[run.at - 1])


def test_parameters_that_died_have_no_gradients_or_only_zeros():
    run = trained("dead_parameters")
    norms = run.steps["gradient_norm"]
    assert (norms[: run.at - 1] > 0).all()
    after = norms[run.at - 1 :]
    assert (after == 0).all() if run.at % 2 else np.isnan(after).all()


def test_training_climbs_when_its_loss_has_the_wrong_sign(monkeypatch):
    # Momentum goes on down for some steps.
    monkeypatch.setitem(recorder.EXTENTS, "digits", SHORT._replace(tail=40))
    run = trained("loss_explodes")
    losses = run.steps["loss"]
    assert losses[-1] > losses[run.at - 2]


def test_a_constant_batch_is_learned_by_heart(monkeypatch):
    monkeypatch.setitem(recorder.EXTENTS, "digits", SHORT._replace(tail=30))
    run = trained("constant_batch")
    losses = run.steps["loss"]
    assert losses[-1] < losses[run.at - 1]
    assert (np.diff(losses[run.at + 20 :]) <= 0).all()


def test_betas_are_swapped(monkeypatch):
    monkeypatch.setitem(recorder.EXTENTS, "vae", SHORT)
    (run,) = recorder.record(Scenario("vae", "betas_swapped", 0))
    momentum = run.steps["optimizer_momentum"]
    assert set(momentum[: run.at - 1]) == {0.9}
    assert set(momentum[run.at - 1 :]) == {0.999}


def test_a_loop_without_a_loader_waits_for_no_input(monkeypatch):
    monkeypatch.setitem(recorder.EXTENTS, "policy", SHORT)
    (run,) = recorder.record(Scenario("policy", "plain", 0))
    assert "input_wait_ms" not in run.steps
    assert "loss" in run.steps


def test_a_seed_in_conflict_is_wrong_from_its_joining_on():
    run = trained("seed_conflict")
    steps = run.steps["step"][run.seed_frames]
    alpha = run.seeds["kasmina.seed.alpha"]
    dot = run.seeds["kasmina.seed.isolation.dot"]
    assert not alpha[steps < run.at - 1].any()
    after = dot[(steps > run.at) & np.isfinite(dot)][: SHORT.tail]  # before the host gives in
    assert len(after) == SHORT.tail
    assert (after < 0).all()


def test_recording_goes_on_where_it_was_left(tmp_path, capsys):
    arguments = ["record", "--workload", "digits", "--kind", "plain", "--seeds", "1"]
    arguments += ["--folder", str(tmp_path)]
    assert command.main(arguments) == 0
    assert known(tmp_path) == {Scenario("digits", "plain", 0)}
    assert "digits-plain-00" in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert capsys.readouterr().out == ""


def test_waits_are_of_the_length_of_a_step_on_a_host_that_has_been_up_for_days(monkeypatch):
    marks = (1e6 + 0.001 * number for number in range(9))
    monkeypatch.setattr(troubles, "time", SimpleNamespace(perf_counter=marks.__next__))
    pace = troubles.Pace()
    for _ in range(9):
        pace.follow(SimpleNamespace(wrong=False))
    assert pace.step_s == pytest.approx(0.001, rel=1e-6)
