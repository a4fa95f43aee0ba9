"""Several trainings in one process: which steps are whose, told by optimizers alone."""

import gc

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel.integrations import jobs  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline.endings import end_by  # noqa: E402
from esper_otel.stream import read_frames  # noqa: E402
from integrations.trainings import Training, X, all_steps, whole  # noqa: E402
from testkit.fork_server import fork_server  # noqa: E402
from testkit.loops import in_backward  # noqa: E402


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "let go"])
def test_trainings_one_after_the_other_are_runs_of_their_own(watched, kept):
    held = []
    for steps in (12, 20, 3, 15):
        training = Training().train(steps)
        if kept:
            held.append(training)
    told = all_steps(watched)
    assert told == {"job": whole(12), "job-2": whole(20), "job-3": whole(3), "job-4": whole(15)}
    for name, training in zip(told, held, strict=False):
        assert [frame["loss"] for frame in watched.frames(name)] == training.losses


def test_the_first_step_of_another_training_knows_nothing_of_the_one_before(watched):
    first, second = Training().train(12), Training().train(12)
    all_steps(watched)
    frame = watched.frames("job-2")[0]
    assert "loss_delta" not in frame
    assert frame["loss_ewma"] == second.losses[0]
    assert "step_latency_ms" not in frame
    assert min(frame[key] for key in ("forward_ms", "backward_ms", "gradient_norm")) > 0
    assert first.losses[-1] == watched.frames("job")[-1]["loss"]


def test_a_training_whose_optimizer_is_gone_is_over_at_once_and_closed(watched):
    Training().train(12)
    gc.collect()
    other = Training().train(1)
    assert [frame["step"] for frame in watched.frames("job-2")] == [1]
    third = Training().train(10)
    del other
    gc.collect()
    fourth = Training().train(10)
    assert [stream.closed for name, stream in watched.made if name == "job-2"] == [True]
    assert all_steps(watched)["job-4"] == whole(10)
    assert [len(each.losses) for each in (third, fourth)] == [10, 10]


def test_closures_begin_trainings_as_well(watched):
    held = []
    for _ in range(2):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        held.append(optimizer)

        def evaluate(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(X) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(12):
            optimizer.step(evaluate)
    assert all_steps(watched) == {"job": whole(12), "job-2": whole(12)}


def test_optimizers_of_single_parameters_are_one_training_each_time(watched):
    kept = [in_backward(), in_backward(), in_backward()]
    told = all_steps(watched)
    assert [len(steps) for steps in told.values()] == kept
    assert list(told) == ["job", "job-2", "job-3"]


def ends(streams):
    return {name: stream.ends for name, stream in streams.made if stream.frames}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "let go"])
def test_each_training_says_that_it_is_done_when_another_has_taken_its_place(watched, kept):
    held = []
    for steps in (12, 20, 15):
        training = Training().train(steps)
        if kept:
            held.append(training)
    known = ends(watched)
    assert (known["job"], known["job-3"]) == ([(12, "done")], [])
    all_steps(watched)
    assert ends(watched) == {
        "job": [(12, "done")],
        "job-2": [(20, "done")],
        "job-3": [(15, "done")],
    }


def test_an_exception_ends_the_training_under_way_and_no_other(watched):
    held = [Training().train(12), Training().train(12)]
    run = esper_otel.process.automatic()
    run._end(end=end_by(ValueError()))
    assert len(held) == 2
    assert ends(watched) == {"job": [(12, "done")], "job-2": [(12, "exception ValueError")]}


def test_a_training_that_the_script_closes_and_goes_on_with_ends_twice(watched):
    training = Training()
    run = esper_otel.start(training.optimizer)
    training.train(12)
    run.close()
    run.close()
    training.train(3)
    assert ends(watched) == {"job": [(12, "done")]}
    training.train(1)
    with pytest.raises(KeyError), run:
        raise KeyError
    all_steps(watched)
    assert ends(watched) == {"job": [(12, "done"), (16, "exception KeyError")]}


def test_what_is_handled_while_a_run_begins_did_not_end_it(streams):
    try:
        raise MemoryError
    except MemoryError:  # the script tries once more, with smaller batches
        training = Training()
        run = esper_otel.start(training.optimizer)
        training.train(2)
        run.close()
    assert ends(streams) == {"job": [(2, "done")]}


def test_trainings_in_turn_lose_no_step(watched):
    trainings = [Training(), Training(), Training()]
    for _ in range(4):
        for training in trainings:
            training.train(20)
    told = all_steps(watched)
    assert told == {name: whole(80) for name in ("job", "job-2", "job-3")}
    for name, training in zip(told, trainings, strict=True):
        frames = watched.frames(name)
        assert [frame["loss"] for frame in frames] == training.losses
        # What the others did meanwhile is in no step's time.
        for frame in frames[1:]:
            parts = ("forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")
            assert sum(frame[part] for part in parts) == pytest.approx(
                frame["step_latency_ms"], rel=0.05, abs=0.05
            )


def test_parameters_at_the_places_of_others_that_are_gone_are_not_those(watched):
    """Their ids are given anew; a sweep whose trainings go one by one meets that often."""
    for _ in range(6):
        Training().train(10)
        gc.collect()
    assert all_steps(watched) == {"job": whole(10)} | {
        f"job-{number}": whole(10) for number in range(2, 7)
    }


def test_start_returns_the_run_of_that_training(watched):
    first, second = Training(), Training()
    run = esper_otel.start(first.optimizer)
    assert run.run_id == "job"
    first.train(3)
    other = esper_otel.start(second.optimizer)
    assert other.run_id == "job-2"
    second.train(3)
    assert esper_otel.start(first.optimizer) is run
    first.train(3)
    assert watched.steps() == {"job": whole(6), "job-2": whole(3)}
    other.close()
    second.train(3)
    assert watched.steps()["job-2"] == whole(6)


def test_what_the_script_reports_is_the_training_under_ways(watched):
    run = esper_otel.start()
    Training().train(12)
    other = Training()
    for _ in range(12):
        other.model(X).sum().backward()
        run.report(loss=7.0)
        other.optimizer.step()
    all_steps(watched)
    assert [frame["loss"] for frame in watched.frames("job-2")] == [7.0] * 12


def test_a_primary_that_was_chosen_makes_all_of_it_one_run(streams, monkeypatch):
    monkeypatch.setenv("ESPER_PRIMARY_OPTIMIZER", "1")
    TorchInstrumentor().instrument(skip_dep_check=True)
    Training().train(12)
    Training().train(12)
    assert all_steps(streams) == {"job": whole(12)}


def test_of_many_trainings_the_one_that_rested_longest_is_closed(watched, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_OPEN", 3)
    trainings = [Training().train(10) for _ in range(5)]
    TorchInstrumentor._watch.jobs.close()
    closed = {name: stream.closed for name, stream in watched.made if stream.frames}
    assert watched.steps() == {"job": whole(10)} | {f"job-{n}": whole(10) for n in range(2, 6)}
    trainings[1].train(10)  # whose run is closed: it is one more
    assert all_steps(watched)["job-6"] == whole(10)
    assert closed["job-2"]


FORKING = """
import os, torch
from torch import nn

def train():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    return optimizer

kept = [train()]
held = nn.Linear(4, 1)
of_held = torch.optim.SGD(held.parameters(), lr=0.01)
held(torch.ones(2, 4)).sum().backward()
of_held.step()
if os.fork() == 0:
    kept += [train(), train()]
    of_held.step()
    raise SystemExit(0)
os.wait()
kept.append(train())
"""


def test_a_forked_child_begins_no_trainings(tmp_path):
    from test_end_to_end import ESPER, environment

    script = tmp_path / "forking.py"
    script.write_text(FORKING)
    env = environment(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    command = [ESPER, "run", "--mode", "off", "--record", str(tmp_path), "--run-id", "job"]
    done = fork_server().run([*command, str(script)], env=env)
    assert done.returncode == 0, done.stderr
    told = {
        file.name.removesuffix("-rank0.metrics.otlp"): [
            frame.step for frame in read_frames(file)
        ]
        for file in tmp_path.glob("*.metrics.otlp")
    }
    assert told == {"job": whole(12), "job-2": [1], "job-3": whole(12)}
