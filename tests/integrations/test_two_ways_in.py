"""Two ways in at once: a step counts once, and settings are those of the first."""

import pytest

torch = pytest.importorskip("torch")

import esper_otel  # noqa: E402
from esper_otel import loop  # noqa: E402
from esper_otel.integrations.training import Training  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402
from integrations.ways_in import WITH_TRAINERS, instrumenting, train  # noqa: E402
from testkit.framework_loops import BATCH, ROWS, network  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


@pytest.mark.parametrize("framework", WITH_TRAINERS)
def test_both_ways_in_at_once_count_a_step_once(captured, way, framework):
    way(framework, True, watch=True)
    assert len(captured.frames) == ROWS // BATCH


def test_a_framework_under_zero_code_tells_nothing_of_settings(
    captured, way, monkeypatch, caplog
):
    monkeypatch.setattr(loop, "_told", set())
    monkeypatch.delenv("ESPER_MODE")  # so that it is not the one that a line in code means
    for watch in (False, True):
        way("transformers", True, watch=watch)
    assert len(captured.frames) == 2 * ROWS // BATCH
    assert "already instrumented" not in caplog.text


def test_settings_that_zero_code_does_not_have_are_told_once(captured, monkeypatch, caplog):
    monkeypatch.setattr(loop, "_told", set())
    with instrumenting():
        for _ in range(2):
            esper_otel.start(mode="enforce", recording_dir="/nowhere", summary="text")
        training = Training(mode="enforce", span_every=7)
        training.start()
        training.stop()
        with pytest.raises(SettingsError, match="moode='off': there is no such setting"):
            esper_otel.start(moode="off")
    told = [r.message for r in caplog.records if "already instrumented" in r.message]
    assert [message.partition("; ignoring ")[2] for message in told] == [
        "mode='enforce' (active: 'off'), recording_dir='/nowhere' (active: '')",
        "mode='enforce' (active: 'off'), span_every='7' (active: '50')",
    ]


def test_decisions_are_applied_only_where_that_is_asked_for(captured, monkeypatch):
    monkeypatch.delenv("ESPER_MODE")
    run = esper_otel.start()
    assert run.settings.mode == "advise"
    run.close()
    run = esper_otel.start(mode="enforce")
    assert run.settings.mode == "enforce"
    run.close()


def test_a_script_that_closes_its_run_twice_is_recorded_to_the_end(captured):
    with instrumenting():
        for _ in range(2):
            model = network()
            optimizer = torch.optim.Adam(model.parameters())
            run = esper_otel.start(optimizer)
            garden = run.plant(model, ["1"])
            train(model, optimizer)
            run.close()
            assert garden.closed
        model = network()
        train(model, torch.optim.Adam(model.parameters()))  # of which the script tells nothing
    steps = ROWS // BATCH  # of each: another model is another training
    assert [frame["step"] for frame in captured.frames] == 3 * list(range(1, steps + 1))
    grew = [frame.get("kasmina.seeds_live") for frame in captured.frames]
    assert grew == [0.0] * (2 * steps) + [None] * steps
