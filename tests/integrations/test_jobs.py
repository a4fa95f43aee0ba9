"""Several trainings in one process: which steps are whose, told by optimizers alone."""

import gc
import sys

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel import run as runs  # noqa: E402
from esper_otel.integrations import jobs  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.leyline import wire  # noqa: E402
from esper_otel.leyline.endings import end_by  # noqa: E402
from esper_otel.stream import read_frames  # noqa: E402
from integrations.conftest import CapturedStream  # noqa: E402
from sidecar.running import sidecar  # noqa: E402
from tamiyo.fake_sidecar import FakeSidecar, all_is_well, answer, decision_about  # noqa: E402
from testkit.fork_server import fork_server  # noqa: E402
from testkit.loops import generator_and_critic, generator_first, in_backward  # noqa: E402


class Streams(dict):
    """The frames of each run by its name, as far as it has any."""

    def open(self, *_, run_id, **__):
        stream = CapturedStream()
        self.made.append((run_id, stream))
        return stream

    def __init__(self):
        self.made = []

    def steps(self):
        told = {}
        for name, stream in self.made:
            if stream.frames:
                assert name not in told
                told[name] = [frame["step"] for frame in stream.frames]
        return told

    def frames(self, name):
        (frames,) = [s.frames for n, s in self.made if n == name and s.frames]
        return frames


@pytest.fixture
def streams(monkeypatch):
    made = Streams()
    monkeypatch.setattr(runs, "Stream", made.open)
    monkeypatch.setenv("ESPER_MODE", "off")
    monkeypatch.setenv("ESPER_RUN_ID", "job")
    return made


@pytest.fixture
def watched(streams):
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield streams
    TorchInstrumentor().uninstrument()


def all_steps(streams):
    """Steps by run, when the process has ended."""
    TorchInstrumentor().uninstrument()
    return streams.steps()


def whole(n):
    return list(range(1, n + 1))


X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Training:
    """A model and its optimizer."""

    def __init__(self, make=torch.optim.SGD, lr=0.01):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = make(self.model.parameters(), lr=lr)
        self.losses = []

    def train(self, steps, loss=None):
        for _ in range(steps):
            self.optimizer.zero_grad()
            value = self.model(X).square().mean() if loss is None else loss(self.model)
            value.backward()
            self.optimizer.step()
            self.losses.append(value.item())
        return self


# One after the other.


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


# In turn.


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


# One training with several optimizers.


def sac(cycles, *, frozen=False, first=0):
    """Actor, critic and temperature, of disjoint parameters, step in each cycle."""
    actor, critic = nn.Linear(4, 2), nn.Linear(6, 1)
    temperature = torch.zeros(1, requires_grad=True)
    of_critic = torch.optim.Adam(critic.parameters())
    of_actor = torch.optim.Adam(actor.parameters())
    of_temperature = torch.optim.Adam([temperature])
    for cycle in range(first + cycles):
        of_critic.zero_grad()
        action = actor(X).detach()
        (critic(torch.cat([X, action], 1)) - 1).square().mean().backward()
        of_critic.step()
        if cycle < first:
            continue
        critic.requires_grad_(not frozen)
        of_actor.zero_grad()
        (-critic(torch.cat([X, actor(X)], 1)).mean()).backward()
        of_actor.step()
        critic.requires_grad_(True)
        of_temperature.zero_grad()
        (temperature.exp() * 0.5).sum().backward()
        of_temperature.step()
    return cycles


@pytest.mark.parametrize("frozen", [False, True], ids=["through the critic", "frozen critic"])
def test_an_actor_its_critic_and_their_temperature_are_one_training(watched, frozen):
    sac(30, frozen=frozen)
    assert all_steps(watched) == {"job": whole(30)}


def test_a_second_agent_is_a_training_of_its_own(watched):
    sac(30)
    sac(25)
    assert all_steps(watched) == {"job": whole(30), "job-2": whole(25)}


@pytest.mark.parametrize("frozen", [False, True], ids=["through the critic", "frozen critic"])
def test_an_actor_that_begins_late_takes_over(watched, frozen):
    sac(10, first=20, frozen=frozen)
    steps = all_steps(watched)
    assert list(steps) == ["job"]
    # The critic steps once more before the actor does. Where no gradient shows that they belong
    # together, the actor's first step is held back and then no step of the run's.
    actors = 10 - frozen
    assert [frame["phase"] for frame in watched.frames("job")] == [0.0] * 21 + [1.0] * actors


@pytest.mark.parametrize("loop", [generator_and_critic, generator_first])
def test_a_generator_and_its_critic_are_one_training(watched, loop):
    cycles = loop()
    assert all_steps(watched) == {"job": whole(cycles)}


def test_two_optimizers_that_share_a_model_are_one_training(watched):
    """As Muon for matrices and AdamW for the rest."""
    model = Training().model
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.01)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2])
    for _ in range(30):
        model.zero_grad()
        model(X).square().mean().backward()
        matrices.step()
        rest.step()
    assert all_steps(watched) == {"job": whole(30)}


@pytest.mark.parametrize("within", [True, False], ids=["within backward", "behind it"])
def test_many_optimizers_of_one_model_are_one_training_in_one_phase(watched, within):
    for _ in range(2):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(15)))
        optimizers = {p: torch.optim.SGD([p], lr=0.001) for p in model.parameters()}

        def step(parameter, optimizers=optimizers):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            if within:
                parameter.register_post_accumulate_grad_hook(step)
        for _ in range(12):
            model(X).square().mean().backward()
            for parameter in () if within else optimizers:
                step(parameter)
    assert all_steps(watched) == {"job": whole(12), "job-2": whole(12)}
    phases = {frame["phase"] for name in ("job", "job-2") for frame in watched.frames(name)}
    assert phases == {0.0}


def test_a_weighted_copy_changes_nothing(watched):
    training = Training()
    average = torch.optim.swa_utils.AveragedModel(training.model)
    for _ in range(30):
        training.train(1)
        average.update_parameters(training.model)
    assert all_steps(watched) == {"job": whole(30)}


# Phases.


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


def test_parameters_at_the_places_of_others_that_are_gone_are_not_those(watched):
    """Their ids are given anew; a sweep whose trainings go one by one meets that often."""
    for _ in range(6):
        Training().train(10)
        gc.collect()
    assert all_steps(watched) == {"job": whole(10)} | {
        f"job-{number}": whole(10) for number in range(2, 7)
    }


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


# Named ones.


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


# Decisions.


@pytest.fixture
def asked(tmp_path, streams, monkeypatch):
    """Instruments in enforce; yields the sidecar that is asked."""
    with FakeSidecar(tmp_path / "s.sock", all_is_well) as sidecar:
        monkeypatch.setenv("ESPER_MODE", "enforce")
        monkeypatch.setenv("ESPER_TAMIYO_SOCKET", str(tmp_path / "s.sock"))
        monkeypatch.setenv("ESPER_TAMIYO_DEADLINE_MS", "5000")
        monkeypatch.setenv("ESPER_RELEASE_STEPS", "100000")
        TorchInstrumentor().instrument(skip_dep_check=True)
        yield sidecar
        TorchInstrumentor().uninstrument()


def cut_job_at(step):
    """The first run is told to cut its rate at ``step``, no other is."""

    def reply(ask, hello):
        if hello.run != "job" or ask.step != step:
            return all_is_well(ask)
        cut = structs.replace(decision_about(ask), parameters={"lr_scale": 0.25})
        return [wire.encode(wire.Answer(ask.request_id, cut))]

    return reply


def test_each_training_asks_for_itself_about_every_step(asked, streams):
    trainings = [Training(), Training()]
    for _ in range(3):
        for training in trainings:
            training.train(20)
    told = all_steps(streams)
    assert told == {"job": whole(60), "job-2": whole(60)}
    assert [hello.run for hello in asked.hellos] == ["job", "job-2"]
    assert len({hello.instance for hello in asked.hellos}) == 2
    assert {name: [ask.step for ask in asks] for name, asks in asked.asks_of.items()} == told


def test_a_cut_of_one_training_never_scales_another(asked, streams):
    asked.reply_to_run = cut_job_at(5)
    trainings = [Training(), Training()]
    for _ in range(2):
        for training in trainings:
            training.train(20)
    all_steps(streams)
    assert [frame["lr_scale"] for frame in streams.frames("job")] == [1.0] * 5 + [0.25] * 35
    assert {frame["lr_scale"] for frame in streams.frames("job-2")} == {1.0}
    assert {frame["optimizer_lr"] for frame in streams.frames("job-2")} == {0.01}


def test_an_optimizer_of_a_closed_run_is_not_scaled_by_another_run(
    tmp_path, streams, monkeypatch
):
    first, second = Training(), Training()
    used = []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    first.optimizer = Seen(first.model.parameters(), lr=0.5)
    options = {
        "mode": "enforce",
        "tamiyo_socket": str(tmp_path / "s.sock"),
        "tamiyo_deadline_ms": 5000.0,
        "release_steps": 100_000,
    }
    with FakeSidecar(tmp_path / "s.sock", all_is_well) as fake:
        run = esper_otel.start(first.optimizer, **options)
        first.train(3)
        run.close()
        fake.reply = answer  # which cuts at every step
        other = esper_otel.start(second.optimizer, **options)
        second.train(3)
        first.train(3)
        other.close()
    assert used == [0.5] * 6


SWEEP = """
import sys, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
data = torch.randn(256, 16)
labels = (data @ torch.randn(16, 4)).argmax(1)
for rate in (0.05, 0.1, 0.2):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for epoch in range(12):
        for i in torch.randperm(256).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[i]), labels[i]).backward()
            optimizer.step()
    print([p.double().sum().item().hex() for p in model.parameters()])
"""


def test_a_sweep_under_the_default_table_is_left_alone(tmp_path):
    from test_end_to_end import ESPER, environment

    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    bare = fork_server().run([sys.executable, script])
    env = environment(tmp_path, ESPER_SUMMARY="text", OTEL_SDK_DISABLED="false")
    env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    with sidecar(tmp_path / "s.sock") as tamiyo:
        command = [ESPER, "run", "--enforce", "--socket", str(tmp_path / "s.sock")]
        done = fork_server().run([*command, "--run-id", "sweep", str(script)], env=env)
        with tamiyo.client() as client:
            report = client.status()
    assert done.returncode == 0, done.stderr
    assert done.stdout == bare.stdout
    told = done.stderr
    assert "run sweep, 3 trainings, 576 steps" in told
    for name in ("sweep", "sweep-2", "sweep-3"):
        assert f"training  {name}: 192 steps, loss" in told
    assert "OPTIMIZER" not in told
    assert "PAUSE" not in told
    assert "sweep-3" in str(report)


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
