"""One step record for each optimizer step, of what the loop did."""

import math

import pytest
from tolaria.loops import MS, Late, Optimizer, make, one_step
from tolaria.sidecars import Sidecar

from esper_otel.leyline.decisions import NOT_ASKED
from esper_otel.leyline.metrics import BY_KEY
from esper_otel.tolaria.ports import HeldRun
from esper_otel.tolaria.step import MAX_PHASES


def test_a_frame_holds_what_the_loop_did(clock):
    recorder, frames = make()
    one_step(recorder, clock)
    one_step(recorder, clock, loss=0.5, norm=3.0)
    _, first = frames.taken[0]
    _, second = frames.taken[1]
    assert first["step"] == 1
    assert second == pytest.approx(
        {
            "step": 2,
            "loss": 0.5,
            "gradient_norm": 3.0,
            "samples_per_s": 32 / 13.5e-3,
            "hook_latency_ms": 0.5,
            "tamiyo_latency_ms": 0.0,
            "step_latency_ms": 13.5,
            "forward_ms": 4.0,
            "backward_ms": 6.0,
            "optimizer_ms": 2.0,
            "kasmina.apply_ms": 0.0,
            "kasmina.finalize_ms": 0.0,
            "loss_delta": -0.5,
            "loss_ewma": 0.9,
            "loss_volatility": 0.2,
            "grad_norm_ewma": 2.2,
            "grad_var": 0.16,
            "optimizer_lr": 0.1,
            "optimizer_lr_base": 0.1,
            "optimizer_momentum": 0.9,
            "input_wait_ms": 1.0,
            "nonfinite": 0.0,
            "lr_scale": 1.0,
            "update_skipped": 0.0,
            "phase": 0.0,
        }
    )


def test_what_needs_a_step_before_is_absent_from_the_first(clock):
    recorder, frames = make()
    one_step(recorder, clock)
    (_, first) = frames.taken[0]
    assert not first.keys() & {"step_latency_ms", "loss_delta"}
    assert first["samples_per_s"] == pytest.approx(32 / 13.5e-3)


def test_without_enrichment_every_gated_metric_is_gone_and_the_others_remain(clock):
    enriched, with_all = make(device_values=lambda: {"cpu_util_percent": 5.0})
    plain, without = make(enriched=False, device_values=lambda: {"cpu_util_percent": 5.0})
    for recorder in (enriched, plain):
        recorder.loop_reported(None, {"accuracy": 0.5, "grad_conflict_rate": 0.25})
        one_step(recorder, clock)
        recorder.loop_reported(None, {"accuracy": 0.5, "grad_conflict_rate": 0.25})
        one_step(recorder, clock)
    everything = with_all.taken[1][1].keys()
    assert {"accuracy", "grad_conflict_rate", "cpu_util_percent"} <= everything
    assert without.taken[1][1].keys() == {k for k in everything if not BY_KEY[k].gated}


PARTS = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")


def test_phases_and_the_hook_before_add_up_to_the_step(clock):
    recorder, frames = make(client=Sidecar(clock, takes_ms=0.7, sends_ms=0.2))
    for _ in range(3):
        one_step(recorder, clock)
    _, last = frames.taken[-1]
    assert sum(last[part] for part in PARTS) == pytest.approx(last["step_latency_ms"])
    assert last["tamiyo_latency_ms"] == pytest.approx(0.2 + 0.7)
    assert last["hook_latency_ms"] == pytest.approx(0.2 + 0.5 + 0.7)


@pytest.mark.parametrize("turns", [1, 5])
def test_the_time_of_turns_that_were_part_of_a_step_is_its_own(clock, turns):
    """A generator, then its critic, which was taken for another training at first."""
    (generator, frames), held = make(), HeldRun()
    critic, _ = make(frames=held)
    one_step(generator, clock)
    began = clock()
    critic.take_over(generator)
    for _ in range(turns):
        one_step(critic, clock)
    generator.take_over(critic, held.phase_times())
    one_step(generator, clock)
    row = frames.rows[1]
    assert row["step_latency_ms"] == pytest.approx((clock() - began) / MS)
    assert sum(row[part] for part in PARTS) == pytest.approx(row["step_latency_ms"])
    assert row["backward_ms"] == pytest.approx((turns + 1) * frames.rows[0]["backward_ms"])


def test_the_time_of_another_training_is_no_time_of_a_step(clock):
    (one, frames), other = make(), make()[0]
    one_step(one, clock)
    other.take_over(one)
    one_step(other, clock)
    one.take_over(other)
    one_step(one, clock)
    row = frames.rows[1]
    assert sum(row[part] for part in PARTS) == pytest.approx(row["step_latency_ms"])
    assert row["backward_ms"] == pytest.approx(frames.rows[0]["backward_ms"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_left_out_and_counted(clock, bad):
    recorder, frames = make()
    one_step(recorder, clock, loss=1.0)
    one_step(recorder, clock, loss=bad, norm=bad)
    one_step(recorder, clock, loss=3.0)
    one_step(recorder, clock, loss=4.0)
    first, second, third, fourth = (values for _, values in frames.taken)
    assert (first["nonfinite"], second["nonfinite"], third["nonfinite"]) == (0, 2, 0)
    assert not second.keys() & {"loss", "gradient_norm", "loss_delta", "loss_ewma", "grad_var"}
    assert "loss_delta" not in third, "there is no previous loss to compare with"
    assert fourth["loss_delta"] == 1.0
    assert math.isfinite(fourth["loss_ewma"])


def test_a_rate_that_is_not_finite_is_counted_too(clock):
    recorder, frames = make()
    recorder.optimizer = Optimizer({"lr": math.inf})
    one_step(recorder, clock)
    _, values = frames.taken[0]
    assert "optimizer_lr" not in values
    assert values["nonfinite"] == 1


def test_the_first_step_begins_with_its_first_micro_batch(clock):
    recorder, frames = make()
    recorder.backward_begins()
    clock.pass_ms(6)
    recorder.backward_ends(1.0)
    one_step(recorder, clock, samples=32)
    _, first = frames.taken[0]
    assert first["samples_per_s"] == pytest.approx(32 / (13.5e-3 + 6e-3))


def test_what_never_steps_takes_no_memory_without_end(clock):
    recorder, frames = make()
    for i in range(10_000):
        recorder.batch_came(clock(), (8, 0))
        recorder.backward_begins()
        clock.pass_ms(1)
        recorder.backward_ends(float(i))
        recorder.phase("forward", clock(), clock())
        recorder.loop_reported(float(i), {"accuracy": 0.5})
    assert len(recorder._under_way.phases) <= MAX_PHASES + 4
    assert len(recorder._under_way.reported) == 1
    recorder.end_step()
    _, frame = frames.taken[0]
    assert frame["loss"] == 9_999 / 2
    assert frame["backward_ms"] == 10_000
    assert frame["samples_per_s"] == pytest.approx(8e3)


def test_times_of_frames_rise_even_when_the_clock_stands_still(clock):
    recorder, frames = make()
    for _ in range(5):
        recorder.end_step()
    times = [time for time, _ in frames.taken]
    assert times == sorted(set(times))


def test_a_value_still_on_a_device_delays_its_frame_and_those_behind_it(clock):
    recorder, frames = make()
    late = Late()
    one_step(recorder, clock, loss=late)
    one_step(recorder, clock, loss=2.0)
    assert frames.taken == []
    late.number = 5.0
    one_step(recorder, clock, loss=3.0)
    assert [(v["step"], v["loss"]) for _, v in frames.taken] == [(1, 5.0), (2, 2.0), (3, 3.0)]
    assert frames.taken[1][1]["loss_delta"] == -3.0
    assert recorder.decision.reason == NOT_ASKED


def test_a_device_that_never_delivers_costs_its_values_and_no_frame(clock):
    recorder, frames = make()
    for _ in range(20):
        one_step(recorder, clock, loss=Late())
    recorder.flush()
    assert [v["step"] for _, v in frames.taken] == list(range(1, 21))
    assert all("loss" not in v and v["nonfinite"] == 0 for _, v in frames.taken)


def test_an_exception_inside_is_told_once_and_reaches_nobody(clock, caplog):
    recorder, frames = make()
    frames.frame = lambda *_: 1 / 0
    one_step(recorder, clock)
    one_step(recorder, clock)
    assert len(caplog.records) == 1
    assert "the run continues" in caplog.text


def test_a_recorder_that_is_switched_off_does_nothing(clock):
    recorder, frames = make()
    recorder.switch_off()
    one_step(recorder, clock)
    assert (frames.taken, recorder.step) == ([], 0)
