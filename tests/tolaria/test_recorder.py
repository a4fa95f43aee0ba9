import math
from math import inf

import pytest
from tolaria.loops import MS, Late, Optimizer, make, one_step
from tolaria.sidecars import Sidecar, decided

from esper_otel.leyline.decisions import NOT_ASKED, Action
from esper_otel.leyline.metrics import BY_KEY
from esper_otel.tolaria.fetches import Source
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


def test_phases_and_the_hook_before_add_up_to_the_step(clock):
    recorder, frames = make(client=Sidecar(clock, takes_ms=0.7, sends_ms=0.2))
    for _ in range(3):
        one_step(recorder, clock)
    _, last = frames.taken[-1]
    parts = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")
    assert sum(last[part] for part in parts) == pytest.approx(last["step_latency_ms"])
    assert last["tamiyo_latency_ms"] == pytest.approx(0.2 + 0.7)
    assert last["hook_latency_ms"] == pytest.approx(0.2 + 0.5 + 0.7)


PARTS = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")


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


def test_the_ask_carries_exactly_the_frame_that_is_streamed(clock):
    sidecar = Sidecar(clock)
    recorder, frames = make(client=sidecar)
    for _ in range(3):
        one_step(recorder, clock)
    assert [(time, values) for _, time, values in sidecar.asked] == frames.taken


def test_the_loss_of_micro_batches_is_their_mean_and_their_samples_add_up(clock):
    recorder, frames = make()
    for _ in range(2):
        for loss in (1.0, 2.0, 6.0):
            recorder.batch_came(clock(), (8, 0))
            recorder.backward_begins()
            clock.pass_ms(2)
            recorder.backward_ends(loss)
        recorder.optimizer_begins(clock(), 1.0)
        recorder.optimizer_ends()
        recorder.end_step()
    _, last = frames.taken[-1]
    assert last["loss"] == 3.0
    assert last["backward_ms"] == 6.0
    assert last["samples_per_s"] == pytest.approx(24 / 6e-3)


def test_a_reported_loss_takes_the_place_of_what_backward_saw(clock):
    recorder, frames = make()
    recorder.loop_reported(0.25, {})
    one_step(recorder, clock, loss=9.0)
    one_step(recorder, clock, loss=9.0)
    assert [values["loss"] for _, values in frames.taken] == [0.25, 9.0]


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


def test_rates_and_momenta_are_means_over_groups(clock):
    recorder, frames = make()
    recorder.optimizer = Optimizer(
        {"lr": 0.1, "betas": (0.9, 0.999)}, {"lr": 0.3, "betas": (0.7, 0.999)}
    )
    one_step(recorder, clock)
    recorder.optimizer = Optimizer({"lr": 0.5})
    one_step(recorder, clock)
    assert frames.taken[0][1]["optimizer_lr"] == pytest.approx(0.2)
    assert frames.taken[0][1]["optimizer_momentum"] == pytest.approx(0.8)
    assert "optimizer_momentum" not in frames.taken[1][1]


def test_fetches_of_a_validation_loop_are_not_charged_to_training(clock):
    recorder, frames = make()
    one_step(recorder, clock)
    for _ in range(5):
        asked_for = clock()
        clock.pass_ms(100)
        recorder.batch_came(asked_for, (1000, 0), Source(2, 2))
    one_step(recorder, clock, wait=1.0, samples=32)
    _, last = frames.taken[-1]
    assert last["input_wait_ms"] == pytest.approx(1.0)
    assert last["samples_per_s"] == pytest.approx(32e3 / last["step_latency_ms"])


def evaluate(recorder, clock, *, last_batch_ms=10):
    """Five batches of a validation loader, while no gradients are recorded."""
    for _ in range(5):
        asked_for = clock()
        clock.pass_ms(5)
        recorder.batch_came(asked_for, (256, 0), Source(7, 8, graded=False))
        clock.pass_ms(last_batch_ms)
    recorder.batches_ended(7)


def one_step_on_tensors(recorder, clock):
    clock.pass_ms(2)
    recorder.backward_begins()
    clock.pass_ms(2)
    recorder.backward_ends(1.0)
    recorder.optimizer_begins(clock(), 1.0)
    recorder.optimizer_ends()
    recorder.end_step()


def test_an_evaluation_is_in_no_step_that_fetches_nothing_itself(clock):
    recorder, frames = make(span_every=1)
    evaluate(recorder, clock)
    for _ in range(4):
        one_step_on_tensors(recorder, clock)
    evaluate(recorder, clock)
    one_step_on_tensors(recorder, clock)
    first, *others = (values for _, values in frames.taken)
    assert first["forward_ms"] == 2.0
    for frame in others:
        assert frame["step_latency_ms"] == 4.0
        assert frame["forward_ms"] == 2.0
    for frame in (first, *others):
        assert not frame.keys() & {"input_wait_ms", "samples_per_s"}
    last = frames.timelines[-1]
    assert last.end_unix_nano - last.start_unix_nano == 4 * MS
    assert "train.input_wait" not in {name for name, _, _ in last.phases}


def test_an_evaluation_between_micro_batches_is_in_none_of_their_time(clock):
    recorder, frames = make()
    for _ in range(2):
        clock.pass_ms(2)
        recorder.backward_begins()
        recorder.backward_ends(1.0)
        evaluate(recorder, clock)
        one_step(recorder, clock, wait=1.0, norm_ms=0.0)
    _, last = frames.taken[-1]
    assert last["step_latency_ms"] == pytest.approx(2.0 + 13.0)
    assert last["forward_ms"] == pytest.approx(2.0 + 4.0)
    assert last["input_wait_ms"] == pytest.approx(1.0)


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


def test_losses_that_are_shares_add_up_until_they_are_none_any_more(clock):
    recorder, frames = make()

    def step():
        for loss in (1.0, 2.0, 6.0):
            recorder.backward_begins()
            recorder.backward_ends(loss)
        recorder.end_step()

    step()
    recorder.losses_prescaled()
    step()
    step()
    recorder.losses_prescaled(False)
    step()
    recorder.under_way.losses.prescaled()
    step()
    step()
    assert [values["loss"] for _, values in frames.taken] == [3.0, 9.0, 9.0, 3.0, 9.0, 3.0]


def test_frames_that_wait_for_a_device_keep_what_their_losses_were(clock):
    recorder, frames = make()
    late = Late(), Late()
    recorder.losses_prescaled()
    for loss in late:
        recorder.backward_begins()
        recorder.backward_ends(loss)
    recorder.end_step()
    recorder.losses_prescaled(False)
    late[0].number, late[1].number = 1.0, 2.0
    recorder.flush()
    assert frames.taken[0][1]["loss"] == 3.0


def test_reported_losses_are_nobodys_shares(clock):
    """A loop reports what it computed; a framework divides what backward begins from."""
    recorder, frames = make()
    recorder.losses_prescaled()
    recorder.loop_reported(1.0, {})
    recorder.loop_reported(3.0, {})
    one_step(recorder, clock, loss=9.0)
    assert frames.taken[0][1]["loss"] == 2.0


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


def test_an_enforced_decision_changes_the_next_update_and_not_the_optimizer(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(enforce=True, client=sidecar)
    used = [one_step(recorder, clock) for _ in range(2)]
    assert used == [0.1, 0.05]
    assert recorder.optimizer.param_groups[0]["lr"] == 0.1
    assert frames.column("optimizer_lr") == used
    assert frames.column("lr_scale") == [1.0, 0.5]
    (timeline,) = frames.timelines
    assert timeline.decision is sidecar.decisions[1] is recorder.decision
    assert (timeline.step, timeline.applied) == (1, True)


def test_a_step_without_an_update_has_no_scaled_rate(clock):
    """A loop that only calls ``run.step()``: nobody makes its updates smaller."""
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(enforce=True, client=sidecar)
    recorder.optimizer = None
    for _ in range(3):
        clock.pass_ms(5.0)
        recorder.end_step()
    recorder.flush()
    assert frames.column("lr_scale") == [1.0, 1.0, 1.0]
    assert not any(timeline.applied for timeline in frames.timelines)


def test_a_schedule_sees_nothing_of_the_factor(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, _ = make(enforce=True, client=sidecar)
    used = []
    for step in range(5):
        recorder.optimizer.param_groups[0]["lr"] = 0.1 / 2**step
        used.append(one_step(recorder, clock))
        assert recorder.optimizer.param_groups[0]["lr"] == 0.1 / 2**step
    assert used == [0.1, *(0.05 / 2**step for step in range(1, 5))]


def test_spans_go_to_every_nth_step_to_slow_ones_and_to_findings(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[17] = decided(17, Action.PAUSE)
    recorder, frames = make(span_every=10, client=sidecar)
    for step in range(1, 31):
        one_step(recorder, clock, forward=40.0 if step == 24 else 4.0)
    assert [timeline.step for timeline in frames.timelines] == [10, 17, 20, 24]
    recorder.flush()
    assert [timeline.step for timeline in frames.timelines] == [10, 17, 20, 24, 30]
    for timeline in frames.timelines:
        assert timeline.decision.step == timeline.step


def test_the_spans_of_a_step_tile_it_and_its_decision_follows(clock):
    recorder, frames = make(span_every=2, client=Sidecar(clock, takes_ms=0.7, sends_ms=0.2))
    for _ in range(3):
        one_step(recorder, clock, norm_ms=0.5)
    (timeline,) = frames.timelines
    *within, (decide, sent, taken), (apply, applied, done) = timeline.phases
    assert [name for name, _, _ in within] == [
        "train.input_wait",
        "train.forward",
        "train.backward",
        "tolaria.gradient_norm",
        "train.optimizer",
    ]
    ends = [timeline.start_unix_nano]
    for name, began, ended in within:
        # The decision about the step before is taken in between: a span of its own.
        collected = 0.7 if name == "train.optimizer" else 0.0
        assert began == ends[-1] + int(collected * MS)
        ends.append(ended)
    assert ends[-1] == timeline.end_unix_nano
    assert (decide, apply) == ("tamiyo.decide", "kasmina.apply")
    # Sent when the step had ended, taken when the next update was about to be made.
    assert sent == timeline.end_unix_nano
    assert taken == sent + round((0.2 + 1 + 4 + 6 + 0.5 + 0.7) * MS)
    # The update is made, and what becomes of seeds follows at the end of that step.
    assert applied == done == taken + 2 * MS


def test_the_first_step_of_an_explicit_loop_begins_with_its_first_phase(clock):
    recorder, frames = make(span_every=1)
    clock.pass_ms(500.0)
    began = clock.now
    for name in ("forward", "backward", "optimizer"):
        since = clock.now
        clock.pass_ms(2.0)
        recorder.phase(name, since, clock.now)
    recorder.end_step()
    (timeline,) = frames.timelines
    assert timeline.start_unix_nano == timeline.phases[0][1] == began + recorder.clock.offset
    assert timeline.end_unix_nano - timeline.start_unix_nano == 6 * MS


def test_what_the_registry_does_not_know_is_a_custom_value_of_the_step(clock):
    recorder, frames = make()
    recorder.loop_reported(None, {"acuracy": 1.0, "kl": 0.5})
    recorder.loop_reported(None, {"kl": 0.25})
    one_step(recorder, clock)
    one_step(recorder, clock)
    assert frames.customs == [{"acuracy": 1.0, "kl": 0.25}, {}]
    assert [row.get("custom_nonfinite") for row in frames.rows] == [0.0, None]


def test_a_custom_value_that_is_not_finite_is_counted_apart(clock):
    recorder, frames = make()
    recorder.loop_reported(1.0, {"perplexity": inf, "kl": 0.5})
    one_step(recorder, clock)
    assert frames.customs == [{"kl": 0.5}]
    (row,) = frames.rows
    assert (row["custom_nonfinite"], row["nonfinite"]) == (1.0, 0.0)


def test_a_step_waits_for_a_custom_value_from_a_device(clock):
    recorder, frames = make()
    late = Late()
    recorder.loop_reported(1.0, {"kl": late})
    one_step(recorder, clock)
    assert frames.customs == []
    late.number = 0.5
    one_step(recorder, clock)
    assert frames.customs == [{"kl": 0.5}, {}]


def test_what_no_step_follows_is_left_over_once(clock):
    recorder, _ = make()
    one_step(recorder, clock)
    recorder.loop_reported(None, {"val_loss": 0.5, "lost": Late(), "inf": inf})
    assert recorder.leftover() == {"val_loss": 0.5}
    assert recorder.leftover() == {}


def test_an_update_that_was_left_out_by_a_scaler_keeps_what_was_evaluated(clock):
    recorder, frames = make()
    recorder.loop_reported(None, {"val_loss": 0.5})
    recorder.skipped()
    one_step(recorder, clock)
    assert frames.customs == [{"val_loss": 0.5}]


def test_an_exception_inside_is_told_once_and_reaches_nobody(clock, caplog):
    recorder, frames = make()
    frames.frame = lambda *_: 1 / 0
    one_step(recorder, clock)
    one_step(recorder, clock)
    assert len(caplog.records) == 1
    assert "the run continues" in caplog.text


def test_switched_off_it_does_nothing(clock):
    recorder, frames = make()
    recorder.switch_off()
    one_step(recorder, clock)
    assert (frames.taken, recorder.step) == ([], 0)


def test_switched_off_it_touches_no_update_either(clock):
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, _ = make(enforce=True, client=sidecar)
    one_step(recorder, clock)
    recorder.switch_off()
    assert one_step(recorder, clock) == 0.1


def test_in_advise_the_factor_is_always_one(clock):
    """Also where the run goes on from one that enforced, and held something."""
    sidecar = Sidecar(clock)
    sidecar.decisions[1] = decided(1, lr_scale=0.5)
    recorder, frames = make(enforce=False, client=sidecar)
    held = {"factor": 0.25, "wait": 10, "clean_steps": 0, "return_factor": 1.0}
    recorder._responses.rate.load_state_dict(held)
    used = [one_step(recorder, clock) for _ in range(4)]
    assert used == frames.column("optimizer_lr") == [0.1] * 4
    assert frames.column("lr_scale") == [1.0] * 4
    recorder.flush()
    assert not any(timeline.applied for timeline in frames.timelines)
