"""The explicit way in: what a script adds to its loop, and what it is refused."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402
from integrations.plain_loops import explicit_loop  # noqa: E402
from integrations.ways_in import METRICS  # noqa: E402


def test_three_added_lines_record_a_loop(captured):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    losses = explicit_loop(run, model, optimizer)
    run.close()
    frames = captured.frames
    assert [frame["loss"] for frame in frames] == losses
    assert frames[-1].keys() >= METRICS - {"forward_ms", "backward_ms"} | {"accuracy"}
    assert frames[-1]["optimizer_momentum"] == pytest.approx(0.9)


def test_a_script_can_tell_the_phases_of_a_step(captured):
    run = esper_otel.start()
    for _ in range(2):
        with run.phase("forward"):
            pass
        with run.phase("backward"):
            pass
        run.report(loss=torch.tensor(2.0), gradient_norm=1.5)
        run.step()
    run.close()
    assert captured.frames[-1].keys() >= {"forward_ms", "backward_ms", "gradient_norm", "loss"}


def test_both_ways_in_count_a_step_once(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    losses = explicit_loop(run, model, optimizer)
    assert [frame["step"] for frame in instrumented.frames] == list(range(1, 7))
    assert [frame["loss"] for frame in instrumented.frames] == losses
    for frame in instrumented.frames[1:]:
        assert frame["samples_per_s"] * frame["step_latency_ms"] / 1e3 == pytest.approx(32)


def test_a_closed_run_takes_its_hooks_off(captured):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    explicit_loop(run, model, optimizer, epochs=1)
    run.close()
    plain = len(captured.frames)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert len(captured.frames) == plain == 3


class Broken:
    """Stands where an agreement or an optimizer's hook stands, and cannot be ended."""

    def close(self):
        raise RuntimeError("not while the interpreter ends")

    remove = close


def test_what_was_recorded_is_sent_whatever_cannot_be_ended(captured, caplog):
    run = esper_otel.start()
    run._loop._handles, run._sharing.agreement = [Broken()], Broken()
    run.step()
    assert run.close() is captured
    run.step()
    assert len(captured.frames) == 1
    told = "a part of the run could not be ended"
    assert [r.message[: len(told)] for r in caplog.records] == [told] * 2


def test_a_setting_that_does_not_exist_or_fit_is_refused_at_once(captured):
    with pytest.raises(SettingsError, match="no such setting"):
        esper_otel.start(moode="advise")
    with pytest.raises(SettingsError, match="mode='always'"):
        esper_otel.start(mode="always")


def test_a_disabled_sdk_disables_everything(captured, monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    explicit_loop(run, model, optimizer)
    run.close()
    assert captured.frames == []


def test_a_phase_that_there_is_not_is_refused_before_its_block_runs(captured):
    run = esper_otel.start()
    ran = []
    with pytest.raises(ValueError, match="phase 'validation': expected one of forward"):  # noqa: SIM117
        with run.phase("validation"):
            ran.append(1)
    assert ran == []
    with pytest.raises(RuntimeError, match="the script's own"), run.phase("forward"):
        raise RuntimeError("the script's own")
    run.close()
