"""What ranks tell each other: bytes of which each gets the greatest."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.decisions import (
    NOT_AGREED,
    NOT_ASKED,
    Action,
    Decision,
    Finding,
    Proposal,
    SeedOperation,
    Severity,
    unanswered,
)
from esper_otel.ranks.agreement import (
    MESSAGE_BYTES,
    Agreement,
    DisagreementError,
    LeaderMessage,
    SeedCommand,
    decode_round,
    encode_round,
)
from esper_otel.ranks.process_group import ProcessGroupError

pytestmark = pytest.mark.torch

COMMAND = SeedCommand(Proposal("s", SeedOperation.GERMINATE), "1", "residual_mlp")


def greatest(posts: list[bytes]) -> bytes:
    """What the collective gives."""
    assert len({len(each) for each in posts}) == 1
    return bytes(map(max, *posts)) if len(posts) > 1 else posts[0]


def decided(step: int, **changes) -> Decision:
    given = {"action": Action.OPTIMIZER, "severity": Severity.HIGH, "reason": "loss_spike"}
    return Decision(id=f"d/{step}", run="r", step=step, observed_step=step, **given, **changes)


@given(
    step=st.integers(1, 2**60),
    digest=st.integers(0, 2**32 - 1),
    flags=st.lists(st.binary(min_size=5, max_size=5), min_size=1, max_size=6),
    reason=st.text(max_size=50),
)
def test_all_get_the_leaders_word_and_every_flag(step, digest, flags, reason) -> None:
    message = LeaderMessage(unanswered("r", step, reason), COMMAND)
    posts = [
        encode_round(step, digest, each, None if rank else message)
        for rank, each in enumerate(flags)
    ]
    came = decode_round(step, digest, 5, greatest(posts))
    assert came.message == message
    assert came.flags == (bytes(map(max, *flags)) if len(flags) > 1 else flags[0])


@given(
    mine=st.tuples(st.integers(1, 2**60), st.integers(0, 2**32 - 1)),
    other=st.tuples(st.integers(1, 2**60), st.integers(0, 2**32 - 1)),
)
def test_a_rank_that_differs_is_noticed_by_both(mine, other) -> None:
    message = LeaderMessage(unanswered("r", 1, "nominal"))
    maxima = greatest([encode_round(*mine, b"", message), encode_round(*other, b"", None)])
    for step, digest in (mine, other):
        if mine == other:
            assert decode_round(step, digest, 0, maxima).message == message
        else:
            with pytest.raises(DisagreementError, match="the ranks differ"):
                decode_round(step, digest, 0, maxima)


def test_a_decision_too_long_goes_without_its_findings() -> None:
    finding = Finding("a", Action.PAUSE, Severity.HIGH, "t" * MESSAGE_BYTES, {})
    said = encode_round(1, 0, b"", LeaderMessage(decided(1, findings=[finding])))
    assert decode_round(1, 0, 0, said).message.decision == decided(1)


def test_such_a_decision_keeps_the_values_that_decided() -> None:
    """A momentum that jumped is taken back from the one that was seen."""
    others = [Finding("a", Action.PAUSE, Severity.HIGH, "t" * 99, {"loss": 1.0})] * 50
    seen = {"optimizer_momentum": 0.999}
    found = Finding("loss_spike", Action.OPTIMIZER, Severity.HIGH, "t", seen)
    said = encode_round(1, 0, b"", LeaderMessage(decided(1, findings=[*others, found])))
    (kept,) = decode_round(1, 0, 0, said).message.decision.findings
    assert (kept.rule, kept.values) == ("loss_spike", seen)


def test_one_that_is_too_long_all_the_same_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4096 at most"):
        encode_round(1, 0, b"", LeaderMessage(decided(1, table_version="t" * MESSAGE_BYTES)))


# --- the agreement, over a group of the test's own


class Table:
    """A group of ranks in one thread: what they sent is met when all have."""

    def __init__(self, size: int) -> None:
        self.sent: list[list[bytes]] = [[] for _ in range(size)]
        self.broken = ""

    def group(self, rank: int):
        table = self

        class PendingReduce:
            def __init__(self, number: int) -> None:
                self.number = number

            def wait(self) -> bytes:
                if table.broken:
                    raise ProcessGroupError(table.broken)
                return greatest([each[self.number] for each in table.sent])

        class ProcessGroup:
            leads = rank == 0
            left = 0

            def send(self, data: bytes) -> PendingReduce:
                table.sent[rank].append(data)
                return PendingReduce(len(table.sent[rank]) - 1)

            def leave(self) -> None:
                self.left += 1

        return ProcessGroup()


class Heard:
    """Takes part in an agreement, and remembers what came."""

    def __init__(
        self, flags: bytes = b"\0", digest: int = 7, command: SeedCommand | None = None
    ):
        self.flags, self.digest, self.command = lambda: flags, lambda: digest, lambda: command
        self.came: list[tuple[bytes, SeedCommand | None]] = []
        self.ends = 0

    def on_round(self, flags: bytes, command: SeedCommand | None) -> None:
        self.came.append((flags, command))

    def on_agreement_lost(self) -> None:
        self.ends += 1


def meeting(*shared: Heard) -> tuple[Table, list[Agreement]]:
    table = Table(len(shared))
    agreements = []
    for rank, each in enumerate(shared):
        agreement = Agreement(table.group(rank), "r")
        agreement.shared = each
        agreements.append(agreement)
    return table, agreements


def one_step(agreements: list[Agreement], step: int, *, asked: bool = True) -> list[Decision]:
    """What each rank is to apply at the end of ``step``, about which the leader then asks.

    The answer has come when the next step ends, if the question could be asked.
    """
    told = [each.settle(step) for each in agreements]
    if asked:
        agreements[0].submit_answer(decided(step))
    return told


def test_every_rank_gets_the_decision_about_the_step_before() -> None:
    shared = Heard(command=COMMAND), Heard(flags=b"\1"), Heard()
    _, agreements = meeting(*shared)
    for step in range(1, 5):
        told = one_step(agreements, step)
        if step == 1:
            assert {each.reason for each in told} == {NOT_ASKED}
        else:
            assert told == [decided(step - 1)] * 3
    assert all(each.came == [(b"\1", COMMAND)] * 3 for each in shared)


def test_every_rank_hears_whether_one_of_them_had_trouble_of_its_own() -> None:
    _, agreements = meeting(Heard(), Heard(), Heard())
    heard = []
    for step in range(1, 6):
        agreements[2].unsound = step == 2
        one_step(agreements, step)
        heard.append([each.any_unsound for each in agreements])
    assert heard == [[False] * 3, [False] * 3, [True] * 3, [False] * 3, [False] * 3]


def test_the_leader_posts_when_it_has_its_answer_and_the_others_at_once() -> None:
    table, agreements = meeting(Heard(), Heard(), Heard())
    leader, *others = agreements
    for step in range(1, 4):
        for each in agreements:
            each.settle(step)
        assert [len(sent) for sent in table.sent] == [step - 1, step, step]
        for each in others:
            each.submit_answer(decided(step))  # what they are told goes nowhere
        assert [len(sent) for sent in table.sent] == [step - 1, step, step]
        leader.submit_answer(decided(step))
        leader.submit_answer(decided(step))
        assert [len(sent) for sent in table.sent] == [step] * 3


def test_what_could_not_be_asked_is_settled_as_not_asked_on_every_rank() -> None:
    shared = Heard(command=COMMAND), Heard(flags=b"\1")
    _, agreements = meeting(*shared)
    told = [one_step(agreements, step, asked=step != 2) for step in range(1, 6)]
    for first, second in told:
        assert first == second
    assert [(first.step, first.reason) for first, _ in told[1:]] == [
        (1, "loss_spike"),
        (2, NOT_ASKED),
        (3, "loss_spike"),
        (4, "loss_spike"),
    ]
    assert all(each.holds for each in agreements)
    assert [len(each.came) for each in shared] == [4, 4]


def test_a_rank_posts_what_it_was_like_at_the_end_of_the_step() -> None:
    """And not what it has become by the time the leader's answer is there."""
    leader, other = Heard(digest=7), Heard(digest=7)
    _, agreements = meeting(leader, other)
    for each in agreements:
        each.settle(1)
    leader.digest = leader.flags = None
    agreements[0].submit_answer(decided(1))
    leader.digest, leader.flags = (lambda: 7), (lambda: b"\0")
    assert [each.settle(2) for each in agreements] == [decided(1)] * 2


def test_who_takes_part_from_a_step_on_hears_nothing_of_before() -> None:
    """As a garden that is planted in the middle of a run."""
    shared = Heard(command=COMMAND), Heard(flags=b"\1")
    _, agreements = meeting(*shared)
    for each in agreements:
        each.shared = None
    for step in (1, 2):
        one_step(agreements, step)
    for each, takes_part in zip(agreements, shared, strict=True):
        each.shared = takes_part
    told = [one_step(agreements, step) for step in (3, 4)]
    assert told == [[decided(2)] * 2, [decided(3)] * 2]
    assert [each.came for each in shared] == [[(b"\1", COMMAND)]] * 2


def test_an_answer_before_the_first_step_or_after_the_end_goes_nowhere() -> None:
    table, agreements = meeting(Heard(), Heard())
    agreements[0].submit_answer(decided(0))
    assert table.sent == [[], []]
    one_step(agreements, 1)
    for each in agreements:
        each.close()
    agreements[0].submit_answer(decided(2))
    assert [len(sent) for sent in table.sent] == [1, 1]


def test_an_answer_that_cannot_be_posted_ends_the_agreement_and_raises_nothing(caplog) -> None:
    shared = Heard(), Heard()
    _, agreements = meeting(*shared)
    for each in agreements:
        each.settle(1)
    agreements[0].group.send = lambda data: 1 / 0
    agreements[0].submit_answer(decided(1))
    assert not agreements[0].holds
    assert shared[0].ends == 1
    assert agreements[0].settle(2).reason == NOT_AGREED
    assert len(caplog.records) == 1


@pytest.mark.parametrize("trouble", ["broken", "another state", "a fault"])
def test_trouble_ends_it_for_good_and_is_told_once(trouble, caplog) -> None:
    shared = Heard(), Heard(digest=8 if trouble == "another state" else 7)
    table, agreements = meeting(*shared)
    one_step(agreements, 1)
    if trouble == "broken":
        table.broken = "Connection closed by peer"
    elif trouble == "a fault":
        for each in shared:
            each.on_round = None
    with caplog.at_level(logging.WARNING, "esper_otel"):
        for step in range(2, 6):
            told = one_step(agreements, step)
            assert {(each.action, each.reason) for each in told} == {
                (Action.CONTINUE, NOT_AGREED)
            }
    assert [each.ends for each in shared] == [1, 1]
    assert [each.group.left for each in agreements] == [1, 1]
    assert len(caplog.records) == 2
    assert "the ranks of this run no longer synchronise decisions" in caplog.text
