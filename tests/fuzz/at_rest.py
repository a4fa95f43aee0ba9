"""Targets that lie in files: tables, recordings, journals, spool files and kept state."""

from __future__ import annotations

import io
import json
import logging
import random
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import msgspec
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

import esper_otel.cli
import esper_tamiyo.cli
from esper_otel.leyline.otlp_file import RecordingError, framed
from esper_otel.leyline.wire import Status, encode
from esper_otel.stream import read_recording, redelivery, resend
from esper_otel.stream.recording import read_frames
from esper_otel.stream.transport import SendResult, Verdict
from esper_tamiyo.journaling.explain import format_story, plain
from esper_tamiyo.journaling.journal import Damage, encode_entry, read
from esper_tamiyo.journaling.lines import format_entry
from esper_tamiyo.journaling.stories import UnknownDecisionError, find_decision
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.keeping.restoring import last_table, restore
from esper_tamiyo.keeping.segments import (
    EntryKind,
    entries,
    segments_of,
)
from esper_tamiyo.keeping.segments import (
    framed as framed_entry,
)
from esper_tamiyo.language.lint import doubts
from esper_tamiyo.language.table_file import (
    SHIPPED,
    TableError,
    TableSource,
    files_behind,
    load,
    locate,
    shipped_tables,
)
from esper_tamiyo.replaying.recordings import RecordedRuns
from esper_tamiyo.replaying.replay import replay
from fuzz.fuzzing import Target
from fuzz.mutations import mutate, mutations
from fuzz.otlp_made import REQUESTS, point_count
from sidecar.entries_made import changed, decided, found, reported, table
from sidecar.frames_made import frame, otlp_of, runs
from sidecar.recorded_runs import FORMATS, proposed
from sidecar.running import sidecar
from sidecar.test_any_message import FRAMES
from sidecar.test_table_mistakes import tables, written
from testkit.kept_state import KeptEngine

ODD = (
    *(None, True, -1, 0, 1, 2**53, 2**63, 2**64 - 1, 10**400, 0.5, 1e308, -1e308, 5e-324),
    *("", "a", "9" * 5000, "²", "\n\x1b[31m", "run/0/x", "run/0/61", "loss", "baseline(loss)"),
    *([], {}, [[]], {"a": 1}, ["a"], "INACTIVE", "firing", "HIGH", "CONTINUE", "nan"),
)
"""Values that take the place of others."""


def altered(value: object, seed: int, changes: int, odd: tuple[object, ...] = ODD) -> object:
    """Plain data in which so many parts, wherever they are, are another value or gone."""
    chance = random.Random(seed)
    for _ in range(changes):
        value = _altered(value, chance, odd)
    return value


def _altered(value: object, chance: random.Random, odd: tuple[object, ...]) -> object:
    if not isinstance(value, dict | list) or not value or chance.random() < 0.05:
        alike = [each for each in odd if isinstance(each, type(value))]
        return chance.choice(alike if alike and chance.random() < 0.7 else odd)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = chance.choice(keys)
    copy = value.copy()
    if chance.random() < 0.1:
        del copy[key]
    elif chance.random() < 0.1:
        copy[key] = value[chance.choice(keys)]
    else:
        copy[key] = _altered(value[key], chance, odd)
    return copy


SEEDS = st.integers(0, 2**32 - 1)


def said_by(command, *words: object) -> tuple[int, str]:
    """Exit status and output of a command that runs within this process."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        return command([*map(str, words)]), out.getvalue()


# Tables.

WORDS = [
    *(
        b"&a ",
        b"*a",
        b"extends: default\n",
        b"<<: *a",
        b"!!python/name:os.system ",
        b"? ",
        b"|\n",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"- ",
        b": ",
        b"metric: loss",
        b"above_baseline: 2",
        b"all: [",
        b"any:\n",
    ),
    *(
        b"release: 1e400",
        b"for: 99999999999999999999",
        b"of: 1",
        b"id: [a]",
        b"'",
        b"%YAML 1.1\n",
    ),
    *(b"extends: ../../../dev/null\n", b"extends: t.yaml\n", b"---\n", b"version: 1\n", b"\t"),
    *(
        b"0x1f",
        b"1_000",
        b".inf",
        b"1:30",
        b"2001-01-01",
        b"~",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\x85",
    ),
    b"rules: &r [*r]\n",
]
WRITTEN = [(SHIPPED / f"{name}.yaml").read_bytes() for name in shipped_tables()]
TABLES = mutations(
    st.sampled_from(WRITTEN) | tables().map(lambda one: written(one).encode()),
    [*WRITTEN, *WORDS * 3],
    most=8,
)
CALLS_AT_LEAST, CALLS_PER_BYTE = 2_000_000, 3_000
"""Calls of Python functions that reading a table may take."""


@contextmanager
def table_files(folder: Path):
    """Tables as text that is nearly one."""
    path = folder / "t.yaml"
    seen = {True: 0, False: 0}

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with counted_calls(CALLS_AT_LEAST + CALLS_PER_BYTE * len(data)):
            files_behind(str(path))
            try:
                one = locate(TableSource(str(path), data), warn=False).table
            except TableError:
                seen[False] += 1
                return
            seen[True] += 1
            doubts(one)
        engine = Engine(one)
        for step in range(3):
            engine.observe(frame(step, loss=1.0 + step, gradient_norm=1.0), asked=True)
        encode(Status(engine.overview()))

    yield check
    assert all(seen.values()), seen


@contextmanager
def counted_calls(limit: int):
    """Fails where more Python functions are called; by count, as clocks are not for tests."""
    count = 0

    def count_one(_frame, event, _arg) -> None:
        nonlocal count
        if event == "call":
            count += 1
            assert count < limit, "it takes longer than its size explains"

    before = sys.getprofile()
    sys.setprofile(count_one)
    try:
        yield
    finally:
        sys.setprofile(before)


# Recordings.

TOLD = proposed((1, "advance", "s1"), (2, "none", ""), run="run", instance="one")
BIG = proposed((1, "cull", "s1"))
BIG.resource_logs[0].scope_logs[0].log_records[0].attributes[0].value.string_value = "9" * 5000
OTHER_SIGNALS = [ExportLogsServiceRequest(), TOLD, BIG]
RECORDED = st.lists(
    REQUESTS.map(lambda data: data)
    | runs(4).map(lambda made: otlp_of(*made).SerializeToString()),
    min_size=1,
    max_size=3,
)


@st.composite
def recordings(draw):
    """(bytes of a file, its name, points in it where it is whole)."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )

    form = draw(st.sampled_from(["proto"] * 4 + sorted(FORMATS)))
    requests = []
    for data in draw(RECORDED):
        with suppress(Exception):
            requests.append(ExportMetricsServiceRequest.FromString(data))
    points = sum(point_count(each.SerializeToString()) or 0 for each in requests)
    if draw(st.booleans()):
        requests.append(draw(st.sampled_from(OTHER_SIGNALS)))
    whole = FORMATS[form](requests)
    if form.startswith("json") and draw(st.booleans()) and requests:
        lines = [altered(json.loads(_json(each)), draw(SEEDS), 2) for each in requests]
        whole, points = b"".join(json.dumps(each).encode() + b"\n" for each in lines), None
    changes = draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
    data = mutate(
        whole, draw(SEEDS), changes, [framed(b""), b"(\xb5/\xfd", b"\x1f\x8b", b"{}\n"]
    )
    name = draw(st.sampled_from(["r.metrics.otlp", "r.logs.otlp", "r", "r.json"]))
    return data, name, points if data == whole and name != "r.logs.otlp" else None


def _json(request) -> bytes:
    from sidecar.recorded_runs import as_json

    return as_json(request)


@contextmanager
def recording_files(folder: Path):
    """Recordings of ours and of Collectors, cut and torn."""
    default = load("default")
    seen = dict.fromkeys(("steps", "problems", "shown"), 0)

    def check(recording) -> None:
        data, name, points = recording
        for path in folder.iterdir():
            path.unlink()
        path = folder / name
        path.write_bytes(data)
        recorded = RecordedRuns(path)
        seen["steps"] += sum(1 for _ in replay(recorded.steps(), default))
        seen["problems"] += len(recorded.problems)
        tally = recorded.points
        if points is not None and not recorded.problems:
            assert tally.used + tally.foreign + tally.unusable + tally.old == points
        if len(data) % 2:
            assert said_by(esper_tamiyo.cli.main, "replay", path)[0] in (0, 1)
        status, judged = said_by(esper_tamiyo.cli.main, "replay", path, "--json", "--all")
        assert status in (0, 1)
        with suppress(RecordingError):
            for _ in read_frames(path):
                seen["shown"] += 1
        if len(data) % 2:
            said_by(esper_otel.cli.main, "show", path)
        status, shown = said_by(esper_otel.cli.main, "show", "--json", path)
        assert status in (0, 1)
        for line in [*judged.splitlines(), *shown.splitlines()]:
            json.loads(line, parse_constant=_no_json)

    yield check
    assert all(seen.values()), seen


def _no_json(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


# Journals.

SPIKE = decided(
    61, findings=[found("loss_spike", loss=3.0, **{"baseline(loss)": 0.5, "left(loss)": 1.0})]
)
ENTRIES = [
    *(table("loss_spike", "other"), decided(20), SPIKE, changed(70), reported(61)),
    decided(7, run="another", parameters={"lr_scale": 0.5}, update=True),
    changed(90),
]
LINES = [encode_entry(entry) for entry in ENTRIES]
JOURNALS = st.builds(
    lambda lines, seed, changes: mutate(b"".join(lines), seed, changes, LINES),
    st.lists(
        st.sampled_from(LINES)
        | st.builds(
            lambda line, seed, changes: (
                json.dumps(altered(json.loads(line), seed, changes)).encode() + b"\n"
            ),
            st.sampled_from(LINES),
            SEEDS,
            st.integers(1, 3),
        ),
        max_size=10,
    ),
    SEEDS,
    st.sampled_from([0, 0, 1, 3]),
)
WANTED = st.sampled_from(
    [
        "latest",
        "run/0/61",
        "run/0/62",
        "another/0/7/update",
        "run/0/x",
        "x",
        "",
        "run/0/²",
        "run/0/" + "9" * 5000,
        "/",
        "run/0/١",
    ]
)


@contextmanager
def journal_files(folder: Path):
    """Journals with lines that are no entries, and entries that say odd things."""
    path = folder / "journal-000001.jsonl"
    seen = dict.fromkeys(("entries", "damaged", "stories"), 0)

    def check(made) -> None:
        data, wanted, run = made
        path.write_bytes(data)
        told = list(read(folder))
        lines = [line for line in data.splitlines() if line.strip()]
        assert len(told) == len(lines)
        known = [entry for entry in told if not isinstance(entry, Damage)]
        seen["entries"] += len(known)
        seen["damaged"] += len(told) - len(known)
        for entry in known:
            assert format_entry(entry)
            encode_entry(entry)
        ids = [entry.id for entry in known if hasattr(entry, "id")]
        for each in (wanted, "latest", *ids):
            with suppress(UnknownDecisionError):
                story = find_decision(known, each, run)
                assert list(format_story(story))
                json.dumps(plain(story))
                seen["stories"] += 1

    yield check
    assert all(seen.values()), seen


# Spool files.

OUTCOMES = st.lists(
    st.sampled_from(
        [SendResult(verdict) for verdict in Verdict]
        + [SendResult(Verdict.DELIVERED, "some", 2), SendResult(Verdict.DELIVERED, "", 10**9)]
        + [SendResult(Verdict.RETRY, "later", 0, 5.0), OSError(28, "full"), ValueError("odd")]
    ),
    max_size=8,
)
BATCHES = st.lists(
    REQUESTS | st.sampled_from([TOLD.SerializeToString(), b"", b"\xff"]), max_size=4
)
SPOOLED = mutations(
    BATCHES.map(lambda bodies: b"".join(map(framed, bodies))),
    [framed(TOLD.SerializeToString()), framed(b"\x0a\x00")],
    most=3,
)
SPOOL_NAMES = st.sampled_from(
    [
        "run-rank0-7-abcd.000001.metrics.otlp",
        "run-rank0-7-abcd.000002.logs.otlp",
        "run.traces.otlp",
        "run.metrics.otlp",
        "x",
    ]
)


class Receiver:
    """A transport that answers as it is told, and remembers what it has taken."""

    def __init__(self, outcomes: list[SendResult | Exception]) -> None:
        self._outcomes = outcomes.copy()
        self.taken = 0

    def send(self, body: bytes, timeout_s: float) -> SendResult:
        outcome = self._outcomes.pop(0) if self._outcomes else SendResult(Verdict.DELIVERED)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome.verdict is Verdict.DELIVERED:
            self.taken += len(body)
        return outcome

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def spool_files(folder: Path):
    """What earlier processes left, cut and torn, to receivers of all kinds."""
    seen = dict.fromkeys(("delivered", "rejected", "kept", "cut"), 0)

    def check(made) -> None:
        files, outcomes = made
        for path in folder.iterdir():
            path.unlink()
        before = {}
        for name, data in files:
            (folder / name).write_bytes(data)
            before[folder / name] = data
        receiver = Receiver(outcomes)
        with mock.patch.object(redelivery, "open_transport", return_value=receiver):
            for path, data in before.items():
                requests, bad_from = readable(path), 0
                taken = receiver.taken
                report = resend([path], {}, sleep=lambda _: None).files[0]
                seen["delivered"] += report.delivered
                seen["rejected"] += report.rejected
                seen["kept"] += report.kept
                seen["cut"] += report.cut_bytes
                after = path.read_bytes() if path.exists() else b""
                whole = sum(map(len, requests))
                bad_from = whole + 4 * len(requests)
                left = readable(path) if path.exists() else []
                assert receiver.taken - taken + report.cut_bytes <= len(data)
                assert after.endswith(data[bad_from:]) or report.cut_bytes
                if signal_is_known(path):
                    kept = sum(map(len, left))
                    assert receiver.taken - taken + kept == whole, (report, len(left))
                else:
                    assert after == data

    yield check
    assert all(seen.values()), seen


def signal_is_known(path: Path) -> bool:
    return redelivery.signal_of(path) is not None


def readable(path: Path) -> list[bytes]:
    """The requests of a file up to the first that is none."""
    signal = redelivery.signal_of(path)
    found: list[bytes] = []
    with suppress(RecordingError):
        for body in read_recording(path):
            if signal is None or not redelivery._items(body, signal):
                break
            found.append(body)
    return found


# State.

KEPT_TABLE = load("default")


def kept_entries(folder: Path) -> list[tuple[int, bytes]]:
    """The entries of a segment that a sidecar of a made-up run has written."""
    one = KeptEngine(folder, KEPT_TABLE)
    try:
        for step in range(40):
            for rank in (0, 1):
                seeds = {"s1": {"kasmina.seed.alpha": 0.1, "kasmina.seed.stage": 3.0}}
                loss = 9.0 if step == 38 else 1.0 + step % 3
                one.judge(
                    frame(step, seeds, rank=rank, loss=loss, gradient_norm=1.0, nonfinite=0.0)
                )
    finally:
        one.kill()
    segment = segments_of(folder)[-1]
    return [(kind, bytes(body)) for kind, body in entries(segment.read_bytes(), "s")]


CHANGED = st.lists(
    st.tuples(
        st.sampled_from([EntryKind.RANK, EntryKind.RANK, EntryKind.STEPS, None]),
        st.integers(0, 3) | st.integers(0, 200),
        st.sampled_from(["bytes", "values", "values", "values"]),
        SEEDS,
    ),
    max_size=3,
)
TORN_STATE = st.tuples(
    CHANGED, SEEDS, st.sampled_from([0, 0, 0, 1, 3]), st.lists(FRAMES, max_size=2)
)
ODD_STATE = tuple(value for value in ODD if value != 10**400)
STARTED_EACH = 150
"""Every so many folders a sidecar of its own is started on one."""


@contextmanager
def errors_told(name: str):
    """The records of that logger from ERROR on, a list; what is less grave goes nowhere."""
    told: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = told.append
    logger = logging.getLogger(name)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


@contextmanager
def state_files(folder: Path):
    """Kept state that is torn, or says odd things under a right checksum."""
    made = kept_entries(folder / "made")
    torn = folder / "torn"
    torn.mkdir()
    log = folder / "log"
    seen = {"restored": 0, "problems": 0, "unfit": 0}
    count = 0

    def check(example) -> None:
        nonlocal count
        count += 1
        changes, seed, cuts, frames = example
        lying = made.copy()
        for wanted, number, how, of in changes:
            places = [at for at, (kind, _) in enumerate(made) if wanted in (None, kind)]
            place = places[-1 - number % len(places)]
            kind, body = lying[place]
            lying[place] = kind, _lied(kind, body, how, of)
        data = b"".join(framed_entry(EntryKind(kind), body) for kind, body in lying)
        data = mutate(data, seed, cuts)
        for path in torn.iterdir():
            path.unlink()
        segment = torn / "state-000001.log"
        segment.write_bytes(data)
        with errors_told("tamiyo") as told:
            last_table(torn, "a table")
            engine, restored = restore(torn, KEPT_TABLE)
        assert not told, "nobody expected it"
        seen["restored"] += restored.ranks
        seen["problems"] += bool(restored.problem)
        seen["unfit"] += restored.unfit
        for rank in (0, 1):
            engine.observe(frame(41, rank=rank, loss=1.0), asked=True)
        for each in frames:
            engine.observe(each)
        engine.tick(10**9)
        assert engine.observe(frame(9, run="another")).reason == "warming_up"
        with suppress(ValueError):  # where it is too much for one message
            encode(Status(engine.overview()))
        if count % STARTED_EACH == 1:
            segment.write_bytes(data)
            with (
                log.open("w") as stderr,
                sidecar(folder / "t.sock", "--state", torn, stderr=stderr) as running,
            ):
                assert running.status()["engine"]["frames"]["bad"] == 0
            assert "Traceback" not in log.read_text(), log.read_text()

    yield check
    assert all(seen.values()), seen


def _lied(kind: int, body: bytes, how: str, seed: int) -> bytes:
    if how == "values":
        with suppress(msgspec.MsgspecError, ValueError, RecursionError):
            told = msgspec.msgpack.decode(body)
            is_rank = kind == EntryKind.RANK and isinstance(told, list) and told
            if is_rank and seed % 5:  # what is known of it, and not whose it is
                told[-1] = altered(told[-1], seed, 1 + seed % 3, ODD_STATE)
            else:
                told = altered(told, seed, 1 + seed % 3, ODD_STATE)
            return msgspec.msgpack.encode(told)
    return mutate(body, seed, 1 + seed % 3)


TARGETS = (
    Target("tables", table_files, TABLES, 40),
    Target("recordings", recording_files, recordings(), 25),
    Target(
        "journal", journal_files, st.tuples(JOURNALS, WANTED, st.sampled_from(["", "run"])), 200
    ),
    Target(
        "spool",
        spool_files,
        st.tuples(
            st.dictionaries(SPOOL_NAMES, SPOOLED, min_size=1, max_size=2).map(
                lambda d: [*d.items()]
            ),
            OUTCOMES,
        ),
        100,
    ),
    Target("state", state_files, TORN_STATE, 60),
)
