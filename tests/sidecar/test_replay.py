"""Replays: what a live sidecar answered, told again from what the run left behind."""

import json
import random
import time
from itertools import cycle

import msgspec
import pytest

from esper_otel.leyline.decisions import Proposal, SeedOperation, Severity
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import ABSENT
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.wire import Ask, SeedRow
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream
from esper_tamiyo.commands import plain
from esper_tamiyo.language.table_file import load, shipped_tables
from esper_tamiyo.replaying.recordings import RecordedRuns
from esper_tamiyo.replaying.replay import replay
from sidecar.frames_made import frame, otlp_of
from sidecar.recorded_runs import FORMATS, cut, proposed
from sidecar.running import sidecar, tamiyo

STEPS = 330
STEP_NS = 20_000_000
PROPOSALS = {
    30: Proposal("s1", SeedOperation.TRAIN),
    60: Proposal("s1", SeedOperation.BLEND),
    120: None,
    135: Proposal("s2", SeedOperation.GERMINATE),
    260: None,
}
"""From which step on the garden of rank 0 proposes what."""


def values_of(rank, step, draw):
    """A run with trouble of most kinds, one after the other."""
    loss = 2.0 * 0.995**step * (1 + 0.01 * draw.random())
    spike = 8.0 * 1.4 ** (step - 100) if 100 <= step < 108 else 1.0
    values = {
        "step": float(step),
        "loss": loss * spike,
        "loss_delta": loss * (spike - 1.0) + 0.001 * draw.random(),
        "loss_volatility": 0.01 * (spike + draw.random()),
        "loss_ewma": loss,
        "gradient_norm": 1.0 + 0.1 * draw.random() + 30.0 * (spike > 1.0),
        "grad_var": 0.01 + (2.0 if 150 < step < 160 else 0.0),
        "optimizer_lr": 0.1 if step < 200 else 0.5,
        "step_latency_ms": 20.0 + draw.random() + (25.0 if rank and step > 220 else 0.0),
        "input_wait_ms": 15.0 if 198 < step < 220 else 0.1,
        "hook_latency_ms": 0.2,
        "nonfinite": 0.0,
    }
    if step == 140:
        values["nonfinite"] = 1.0
        del values["loss"], values["loss_delta"]
    return values


def seeds_of(step):
    """One seed, whose kernel fails for a while."""
    if step < 40:
        return {}
    fallback = 1.0 if 70 <= step < 75 else 0.0
    values = {
        "stage": 4.0,
        "alpha": min(1.0, step / 100),
        "kernel_attached": 1.0,
        "last_kernel_latency_ms": 0.1,
        "isolation_violations": 0.0,
        "fallback_used": fallback,
    }
    return {"s1": {f"kasmina.seed.{key}": value for key, value in values.items()}}


class Trainer:
    """One rank as a trainer is to the world: it asks, streams and records."""

    def __init__(self, running, client, rank, folder, start_ns):
        self.rank = rank
        self.client = client
        self.answers = {}
        self._draw = random.Random(rank)
        self._proposal = None
        self._start = start_ns + rank * 1_000_000
        settings = EsperSettings(
            rank=rank, world_size=2, recording_dir=str(folder), spool_dir=str(folder / "spool")
        )
        self.stream = Stream(
            settings,
            run_id="run",
            instance_id=f"process{rank}",
            environ={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{running.words['otlp_http']}"},
        )
        self.stream.start()
        client.hello(instance=f"process{rank}", rank=rank)

    def step(self, step):
        time_ns = self._start + step * STEP_NS
        if step > 300:  # a pause long enough to be noticed
            time_ns += 60_000_000_000
        values = values_of(self.rank, step, self._draw)
        row = [values.get(key, ABSENT) for key in STEP_KEYS]
        seeds = [
            (seed_id, [of_seed.get(key, ABSENT) for key in SEED_KEYS])
            for seed_id, of_seed in (seeds_of(step) if self.rank == 0 else {}).items()
        ]
        if self.rank == 0 and step in PROPOSALS:
            self._proposal = PROPOSALS[step]
            self._tell(step, time_ns)
        self.stream.frame(time_ns, list(row), seeds)
        told = [SeedRow(seed_id, values) for seed_id, values in seeds]
        answer = self.client.call(Ask(step, step, time_ns, row, told, self._proposal))
        self.answers[self.rank, step] = answer.decision

    def _tell(self, step, time_ns):
        operation = self._proposal.operation if self._proposal else "none"
        attributes = {"esper.step": step, "esper.operation": str(operation)}
        if self._proposal:
            attributes["esper.seed.id"] = self._proposal.seed_id
        name = "esper.seed.proposed"
        self.stream.event(Event(name, time_ns, Severity.NORMAL, "proposed", attributes))


@pytest.fixture(scope="module", params=shipped_tables())
def live(request, tmp_path_factory):
    """(table, folder, answers) of a run of two ranks that a real sidecar decided about."""
    folder = tmp_path_factory.mktemp("live")
    socket = tmp_path_factory.mktemp("s") / "t.sock"
    with (
        sidecar(socket, "--table", request.param, ingest=True) as running,
        running.client() as one,
        running.client() as two,
    ):
        start_ns = time.time_ns()
        trainers = [
            Trainer(running, client, rank, folder, start_ns)
            for rank, client in enumerate((one, two))
        ]
        for step in range(1, STEPS + 1):
            for trainer in trainers:
                trainer.step(step)
        for trainer in trainers:
            assert trainer.stream.close(10.0).metrics.dropped == 0
    answers = {place: answer for each in trainers for place, answer in each.answers.items()}
    return request.param, folder, answers


def replayed(path, table):
    """What a replay decides, by rank and step."""
    recording = RecordedRuns(path)
    decided = {
        (judged.frame.rank, judged.frame.step): judged.decision
        for judged in replay(recording.steps(), load(table))
        if judged.is_step
    }
    assert recording.problems == []
    return decided


def test_the_live_run_had_decisions_of_every_kind(live):
    table, _, answers = live
    assert {str(each.action) for each in answers.values()} == {
        "CONTINUE",
        "SEED",
        "OPTIMIZER",
        "PAUSE",
    }
    reasons = {each.reason for each in answers.values()}
    assert {"nominal", "conservative_mode", "nonfinite_loss"} <= reasons
    if table == "default":
        assert {"straggler_rank", "seed_fallback", "slow_input", "loss_diverging"} <= reasons
    else:
        assert "loss_spike" in reasons


def test_a_replay_gives_exactly_the_decisions_of_the_live_run(live):
    table, folder, answers = live
    assert replayed(folder, table) == answers


@pytest.mark.parametrize("shape", ["json", "proto, each zstd"])
def test_so_does_what_a_collector_wrote_of_it(live, shape, tmp_path):
    """In batches that are cut anywhere, of both ranks, one after the other."""
    table, folder, answers = live
    frames = [frame for frame, _ in RecordedRuns(folder).steps()]
    told = [
        (step, proposal.operation if proposal else "none", proposal.seed_id if proposal else "")
        for step, proposal in PROPOSALS.items()
    ]
    requests = [proposed(*told, instance="process0")]
    for start in range(0, len(frames), 40):
        batch = sorted(frames[start : start + 40], key=lambda frame: frame.rank)
        requests += cut(batch, cycle([97]))
    path = tmp_path / "collected"
    path.write_bytes(FORMATS[shape](requests))
    assert replayed(path, table) == answers


def test_the_command_prints_the_same_for_machines(live):
    table, folder, answers = live
    done = tamiyo("replay", folder, "--table", table, "--all", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = map(json.loads, done.stdout.splitlines())
    decided = {}
    for line in lines:
        extras = {key: line.pop(key) for key in ("rank", "time_unix_nano", "silence")}
        if not extras["silence"]:
            decided[extras["rank"], line["step"]] = line
    assert decided == {
        place: json.loads(json.dumps(plain(answer))) for place, answer in answers.items()
    }
    assert last["summary"]["steps"] == 2 * STEPS
    assert sum(row["steps"] for row in last["summary"]["decided"]) == len(lines)


# The command, for people.


@pytest.fixture
def spiked(tmp_path):
    """A recording in which step 3 breaks a rule of the prototype."""
    frames = [frame(step, loss_delta=0.2 if step == 3 else 0.0) for step in range(1, 6)]
    path = tmp_path / "run-rank0.metrics.otlp"
    path.write_bytes(FORMATS["proto"]([otlp_of(*frames)]))
    return path


def test_what_is_nominal_is_counted_and_not_shown(spiked):
    done = tamiyo("replay", spiked, "--table", "prototype")
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    shown = "run/0/3 PAUSE HIGH loss_spike, conservative mode (loss_delta 0.2)"
    assert " ".join(first.split()) == shown
    assert rest[0].startswith("5 steps of 1 rank, 0.0 s recorded, by table prototype-1+")
    assert [line.split() for line in rest[1:3]] == [
        ["4", "CONTINUE", "nominal"],
        ["1", "PAUSE", "loss_spike"],
    ]
    assert "steps/s" in rest[3]
    assert len(rest) == 4


def test_all_shows_every_step(spiked):
    shown = tamiyo("replay", spiked, "--table", "prototype", "--all").stdout.splitlines()
    assert [line.split()[0] for line in shown[:5]] == [f"run/0/{step}" for step in range(1, 6)]


def test_a_damaged_tail_is_a_warning(spiked):
    spiked.write_bytes(spiked.read_bytes() + b"\0\0")
    done = tamiyo("replay", spiked, "--table", "prototype")
    assert done.returncode == 0
    assert "run/0/3" in done.stdout
    assert done.stderr.startswith(f"tamiyo: warning: {spiked}: byte ")
    assert done.stderr.endswith(": the file ends inside a size; read up to there\n")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "there is no step of a training run in it"),
        (b"{}\n", "there is no step of a training run in it"),
        (None, "No such file or directory"),
    ],
)
def test_nothing_to_read_is_an_error(content, problem, tmp_path):
    path = tmp_path / "recording"
    if content is not None:
        path.write_bytes(content)
    done = tamiyo("replay", path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"tamiyo: {path}: {problem}"
    assert "Traceback" not in done.stderr


def test_metrics_of_somebody_else_are_said_to_be_that(tmp_path):
    path = tmp_path / "recording"
    path.write_bytes(FORMATS["json"]([otlp_of(frame(1, **{"http.server.duration": 1.0}))]))
    content = path.read_bytes().replace(b"tolaria.step", b"another.step")
    path.write_bytes(content)
    done = tamiyo("replay", path)
    assert done.returncode == 1
    assert "in it, only 2 points of other metrics" in done.stderr


def test_a_run_that_is_not_in_it_names_those_that_are(spiked):
    done = tamiyo("replay", spiked, "--run", "other")
    assert done.returncode == 1
    assert done.stderr == f"tamiyo: --run other: not in {spiked}, which has run\n"


def test_a_table_that_cannot_be_used_is_said_first(spiked, tmp_path):
    table = tmp_path / "mine.yaml"
    table.write_text("version: 1\nrules: none\n")
    done = tamiyo("replay", spiked, "--table", table)
    assert done.returncode == 1
    assert f"{table}:2: rules: expected a list" in done.stderr


def test_a_step_that_was_delivered_twice_is_decided_once():
    proposal = Proposal("s1", SeedOperation.TRAIN)
    twice = [(frame(step, loss=1.0), proposal) for step in (1, 2, 2, 1, 3)]
    decided = list(replay(twice, load("prototype")))
    assert [judged.decision.step for judged in decided] == [1, 2, 3]


def test_a_rank_that_falls_silent_is_told_by_the_clock_of_the_others():
    """Nothing of its own ever comes again, so no frame of it can end its silence."""
    frames = [
        msgspec.structs.replace(frame(step, rank=rank), time_unix_nano=step * 1_000_000_000)
        for step in range(1, 101)
        for rank in (0, 1)
        if rank == 0 or step <= 20
    ]
    table = load("default")
    decided = list(replay(((frame, None) for frame in frames), table))
    (silence,) = [judged for judged in decided if not judged.is_step]
    assert (silence.frame.rank, silence.decision.step) == (1, 20)
    assert silence.decision.reason == "telemetry_quiet"
