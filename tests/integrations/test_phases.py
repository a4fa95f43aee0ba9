"""Phases of a training: what begins one, and what is no other training."""

import gc

import pytest

torch = pytest.importorskip("torch")

import esper_otel  # noqa: E402
from integrations.trainings import Training, all_steps, whole  # noqa: E402


def test_an_optimizer_made_anew_for_the_same_model_begins_a_phase(watched):
    training = Training().train(12)
    training.optimizer = torch.optim.AdamW(training.model.parameters())
    training.train(12)
    assert all_steps(watched) == {"job": whole(24)}
    assert [frame["phase"] for frame in watched.frames("job")] == [0.0] * 12 + [1.0] * 12


def test_an_optimizer_made_when_that_of_before_is_gone_begins_a_phase_as_well(watched):
    training = Training().train(12)
    del training.optimizer
    gc.collect()
    training.optimizer = torch.optim.AdamW(training.model.parameters())
    training.train(12)
    assert all_steps(watched) == {"job": whole(24)}


@pytest.mark.parametrize("swaps", [False, True], ids=["set", "swapped"])
def test_a_model_that_has_moved_to_other_memory_is_the_same_training(watched, swaps):
    training = Training().train(12)
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        training.model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    training.optimizer = torch.optim.AdamW(training.model.parameters())  # that of before goes
    gc.collect()
    training.train(12)
    assert all_steps(watched) == {"job": whole(24)}


def test_layers_that_are_unfrozen_are_of_the_same_training(watched):
    training = Training()
    head = training.model[2]
    training.optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    training.train(12)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01)
    training.train(12)
    assert all_steps(watched) == {"job": whole(24)}


def test_the_script_says_that_a_phase_begins(streams):
    training = Training()
    run = esper_otel.start(training.optimizer, span_every=0, span_slow_factor=1e9)
    training.train(5)
    run.phase_begins("curriculum-2")
    run.phase_begins("curriculum-3")
    training.train(5)
    with pytest.raises(TypeError, match="expected a name"):
        run.phase_begins(3)
    saved = run.state_dict()
    run.close()
    assert [frame["phase"] for frame in streams.frames("job")] == [0.0] * 5 + [2.0] * 5
    ((_, stream),) = streams.made
    assert [(t.step, t.phase) for t in stream.timelines] == [(6, "curriculum-3")]
    again = esper_otel.start(run_id="again")
    again.load_state_dict(saved)
    again.step()
    again.close()
    assert streams.frames("again")[0]["phase"] == 2.0


def test_under_zero_code_a_phase_is_of_the_training_under_way(watched):
    run = esper_otel.start()
    Training().train(12)
    second = Training().train(12)
    run.phase_begins("longer sequences")
    second.train(3)
    all_steps(watched)
    assert {frame["phase"] for frame in watched.frames("job")} == {0.0}
    assert [frame["phase"] for frame in watched.frames("job-2")] == [0.0] * 12 + [1.0] * 3


def test_a_loader_of_longer_sequences_begins_a_phase(watched):
    training = Training()
    for tokens in (4, 8):
        batches = torch.utils.data.DataLoader(torch.randn(160, tokens, 4), batch_size=8)
        for batch in batches:
            training.train(1, loss=lambda model, batch=batch: model(batch).square().mean())
    all_steps(watched)
    assert [frame["phase"] for frame in watched.frames("job")] == [0.0] * 21 + [1.0] * 19


def test_a_phase_of_a_named_training_is_its_own(watched):
    first, second = Training(), Training()
    run = esper_otel.start(first.optimizer)
    first.train(3)
    other = esper_otel.start(second.optimizer)
    second.train(3)
    run.phase_begins("harder")
    second.train(3)
    first.train(3)
    assert other.run_id == "job-2"
    all_steps(watched)
    assert [frame["phase"] for frame in watched.frames("job")] == [0.0] * 3 + [1.0] * 3
    assert {frame["phase"] for frame in watched.frames("job-2")} == {0.0}
