"""Whatever a frame or a message says, the process that serves all goes on."""

import socket

from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.frames import MAX_RANK, MAX_STEP, MAX_TIME_UNIX_NANO, StepFrame
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.leyline.wire import (
    PROTOCOL,
    Ask,
    Check,
    Hello,
    LatestRequest,
    RecentRequest,
    SeedRow,
    SilenceRequest,
    Status,
    StatusRequest,
    WireError,
    decode_to_server,
    encode,
)
from esper_tamiyo.journaling.decision_log import MAX_COUNT
from esper_tamiyo.journaling.messages import Heartbeat, decode_messages, pack
from esper_tamiyo.journaling.reporter import Reporter
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load
from esper_tamiyo.latency import GarbageSchedule
from esper_tamiyo.serving.connection import ClientConnection
from esper_tamiyo.serving.recent_steps import RecentSteps
from esper_tamiyo.serving.replies import Replies

DEFAULT = load("default")

EDGES = (0, 1, 2, 3, MAX_RANK, MAX_STEP, MAX_TIME_UNIX_NANO)
SIGNED, UNSIGNED = -(1 << 63), (1 << 64) - 1
INTEGERS = st.sampled_from(
    [*EDGES, *(edge + 1 for edge in EDGES), -1, SIGNED, 1 << 63, UNSIGNED]
) | st.integers(SIGNED, UNSIGNED)
SOUND = st.sampled_from(EDGES[:4]) | st.integers(0, 1000)
NUMBERS = INTEGERS | SOUND
NAMES = st.sampled_from(["", "a", "b", "x" * 256, "x" * 257, "\n\x1b[31m", "\U0001f600" * 256])
FLOATS = st.floats() | st.sampled_from([1e308, -1e308, 5e-324, 0.0, 1.0])
FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1e308, -1e308])

PROPOSALS = st.none() | st.builds(Proposal, NAMES, st.sampled_from(SeedOperation))
STEP_VALUES = st.dictionaries(st.sampled_from(STEP_KEYS), FINITE, max_size=6)
SEEDS = st.dictionaries(
    NAMES, st.dictionaries(st.sampled_from(SEED_KEYS), FINITE, max_size=3), max_size=3
)
FRAMES = st.builds(StepFrame, NAMES, NAMES, NUMBERS, NUMBERS, NUMBERS, STEP_VALUES, SEEDS)


@st.composite
def rows(draw, columns=STEP_KEYS):
    """A row of that many columns, mostly absent values."""
    row = [float("nan")] * len(columns)
    for place in draw(st.lists(st.integers(0, len(columns) - 1), max_size=6)):
        row[place] = draw(FLOATS)
    return row


SEED_ROWS = st.lists(st.builds(SeedRow, NAMES, rows(SEED_KEYS)), max_size=3)
HELLOS = st.builds(
    Hello,
    st.just(PROTOCOL),
    st.sampled_from(["", "a", "b", "x" * 257]),
    NAMES,
    NUMBERS,
    NUMBERS,
    st.just(list(STEP_KEYS)) | st.lists(NAMES, max_size=4),
    st.just(list(SEED_KEYS)) | st.lists(NAMES, max_size=4),
    st.sampled_from(["", "enforce", "advise", "x" * 257]),
    NUMBERS,
)
ASKS = st.builds(Ask, INTEGERS, NUMBERS, NUMBERS, rows(), SEED_ROWS, PROPOSALS)
MESSAGES = st.one_of(
    HELLOS,
    ASKS,
    ASKS,
    st.builds(Check, INTEGERS, NUMBERS, NUMBERS, rows()),
    st.just(StatusRequest()),
    st.builds(LatestRequest, NAMES, INTEGERS),
    st.builds(RecentRequest, NAMES, INTEGERS, NAMES, INTEGERS, INTEGERS),
    st.builds(
        SilenceRequest,
        st.sampled_from(["a", "b", ""]),
        st.sampled_from(["loss_diverging", "none"]),
        st.none() | INTEGERS,
        st.booleans(),
    ),
)


class Desk:
    """All that judges, answers and writes down, without a loop around it."""

    def __init__(self):
        self.reporter = Reporter(None, trace_every=1)
        self.log = self.reporter.decision_log
        self.recent = RecentSteps(self.log)
        self.engine = Engine(DEFAULT, observer=self.recent)
        self.replies = Replies(
            *(self.engine, self.reporter, GarbageSchedule(), self.recent, self.status),
            lambda: None,
        )
        self.clock_ns = 0

    def status(self):
        return {"engine": self.engine.overview(self.clock_ns), **self.reporter.status()}

    def stream(self, frame):
        self.clock_ns += 1_000_000
        self.log.set_context(self.clock_ns, asked=False)
        self.engine.observe(frame, at_ns=self.clock_ns)

    def check(self):
        """Everything can be told; and nothing was refused but for a reason."""
        self.engine.tick(self.clock_ns)
        entries = [*self.log.make_entries(1000, 0.0), *self.log.expire(1e9)]
        assert self.log.dropped == 0
        beat = Heartbeat(beat=1, began_unix_nano=1, report=self.status(), distributions={})
        assert len(decode_messages(pack([*entries, beat]))) == len(entries) + 1
        encode(Status(self.status()))
        report = self.engine.overview()
        assert report["frames"]["bad"] == sum(report["refused"].values())
        assert report["witness_failed"] == 0


@given(st.lists(FRAMES, max_size=12))
def test_a_frame_that_says_anything_at_all_is_judged_or_refused(frames):
    desk = Desk()
    for frame in frames:
        desk.stream(frame)
    desk.check()


@given(st.lists(MESSAGES | FRAMES, max_size=12))
def test_a_message_that_says_anything_at_all_is_answered(messages):
    desk = Desk()
    ours, theirs = socket.socketpair()
    connection = ClientConnection(ours)
    with theirs:
        for message in messages:
            if isinstance(message, StepFrame):
                desk.stream(message)
                continue
            desk.clock_ns += 1_000_000
            try:
                body = decode_to_server(encode(message)[4:])
                assert desk.replies.reply(connection, body, desk.clock_ns)
            except WireError:
                continue
            assert theirs.recv(1 << 20)
        desk.check()
        desk.replies.part(connection)
        assert desk.engine.overview()["asking"] == 0
    connection.close()


def test_sums_of_what_frames_say_stay_within_what_a_message_can_carry():
    desk = Desk()
    for run in range(2050):
        for step in (0, MAX_STEP):
            values = {"step": float(step), "loss": 1.0}
            desk.engine.observe(
                StepFrame(f"m{run}", "i", 0, step, 1 + step, values), at_ns=step, asked=True
            )
            desk.log.make_entries(1000, 0.0)
    assert desk.log.missed == MAX_COUNT
    desk.check()


def test_a_step_at_every_edge_can_be_told():
    desk = Desk()
    for rank, time_ns in ((0, 0), (MAX_RANK, MAX_TIME_UNIX_NANO)):
        for step in (0, 1, 2, 5000, MAX_STEP - 1, MAX_STEP):
            values = {"step": float(step), "nonfinite": 3.0}
            frame = StepFrame("x" * 256, "y" * 256, rank, step, time_ns, values)
            decision = desk.engine.observe(frame, at_ns=step, asked=True)
            assert decision.reason == "nonfinite_loss"
    desk.check()
