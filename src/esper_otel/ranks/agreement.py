"""Agreement: one decision for all ranks, applied by each at the end of the same step.

The leader asks about step N and, as soon as it has the answer, posts it with what it
proposed; the others post at the end of step N. At the end of step N+1 every rank takes what
came of what was posted of step N, and applies that. The leader has its answer before the
optimizer of step N+1 steps, and by then each rank has been through a backward pass in which
all took part, so whoever is late at that point holds up the training itself.

What a rank posts is some bytes, as many on all ranks, and each gets the greatest at every
place. So what one rank alone writes (the leader's message) arrives as it is where the others
write zeros; a flag that any rank raises is up; and where a number and its complement are both
sent, all ranks have the same number exactly if both maxima are one's own. One collective does
for all three, and what it carries does not grow with the number of ranks.

The wait for it is bounded all the same. After one failure (a rank that died or stands
still, ranks that differ) the agreement is over for good on every rank that notices: it
says so once, answers CONTINUE with the reason ``not_agreed``, and seeds stay as they are.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

import msgspec

from esper_otel.leyline.decisions import NOT_AGREED, NOT_ASKED, Decision, Proposal, unanswered
from esper_otel.ranks.process_group import PendingReduce, ProcessGroup, ProcessGroupError

log = logging.getLogger("esper_otel")


MESSAGE_BYTES = 4096
"""Room for the leader's message: a decision with its findings takes some hundred bytes."""

_LENGTH_BYTES = 2
_SAME_BYTES = 12


class SeedCommand(msgspec.Struct, frozen=True, array_like=True):
    """A proposal, and all that another rank needs to carry it out as this one does."""

    proposal: Proposal
    slot: str
    blueprint: str = ""
    reason: str = ""


class LeaderMessage(msgspec.Struct, frozen=True, array_like=True):
    """What the leader says at the end of a step: the decision, and what it is about."""

    decision: Decision
    command: SeedCommand | None = None


_DECODER = msgspec.msgpack.Decoder(LeaderMessage)
_ENCODER = msgspec.msgpack.Encoder()


class RoundResult(NamedTuple):
    """What has come of what all ranks have posted of a step."""

    message: LeaderMessage
    flags: bytes


class DisagreementError(RuntimeError):
    """The ranks are not at the same step, or not in the same state."""


def encode_round(step: int, digest: int, flags: bytes, message: LeaderMessage | None) -> bytes:
    """The bytes of one rank; ``digest`` (32 bits) and ``step`` must be those of all."""
    said = b"" if message is None else _encoded(message)
    same = _same(step, digest)
    return b"".join(
        (
            same,
            bytes(255 - each for each in same),
            flags,
            len(said).to_bytes(_LENGTH_BYTES, "little"),
            said.ljust(MESSAGE_BYTES, b"\0"),
        )
    )


def decode_round(step: int, digest: int, flags: int, maxima: bytes) -> RoundResult:
    """What ``maxima`` of all that was posted of ``step`` say; ``flags`` is how many there are.

    Raises :class:`DisagreementError`.
    """
    same = _same(step, digest)
    if maxima[:_SAME_BYTES] != same or maxima[_SAME_BYTES : 2 * _SAME_BYTES] != bytes(
        255 - each for each in same
    ):
        raise DisagreementError(f"the ranks differ at step {step}")
    start = 2 * _SAME_BYTES
    said = start + flags + _LENGTH_BYTES
    length = int.from_bytes(maxima[start + flags : said], "little")
    try:
        message = _DECODER.decode(maxima[said : said + length])
    except msgspec.DecodeError as error:
        raise DisagreementError(f"the leader's decision for step {step}: {error}") from None
    return RoundResult(message, maxima[start : start + flags])


def _encoded(message: LeaderMessage) -> bytes:
    said = _ENCODER.encode(message)
    if len(said) > MESSAGE_BYTES:
        # Its findings are for reading, and the leader's telemetry has them. Of the one that
        # decided, the values count: they tell from where a momentum is taken back.
        decision = message.decision
        values = [
            msgspec.structs.replace(each, text="")
            for each in decision.findings
            if each.rule == decision.reason
        ]
        bare = msgspec.structs.replace(decision, findings=values)
        said = _ENCODER.encode(msgspec.structs.replace(message, decision=bare))
    if len(said) > MESSAGE_BYTES:
        raise ValueError(
            f"the decision takes {len(said)} bytes: expected {MESSAGE_BYTES} at most"
        )
    return said


def _same(step: int, digest: int) -> bytes:
    return step.to_bytes(8, "little") + digest.to_bytes(4, "little")


class Shared(Protocol):
    """What the ranks must do alike: a garden, seen from here."""

    def on_round(self, flags: bytes, command: SeedCommand | None) -> None:
        """What came of what was posted of the step before."""

    def flags(self) -> bytes:
        """Of this rank, as many at every step, each 0 or 1; any rank's 1 counts."""

    def digest(self) -> int:
        """A number of 32 bits that is the same on all ranks while they are alike."""

    def command(self) -> SeedCommand | None:
        """On the leader: what it has proposed in this step."""

    def on_agreement_lost(self) -> None:
        """There will be no agreement any more."""


class _Prepared(NamedTuple):
    """What this rank is to post of a step, as it was at the step's end.

    ``shared`` is who took part in it: a garden may be planted later.
    """

    step: int
    digest: int
    flags: bytes
    command: SeedCommand | None
    shared: Shared | None


class Agreement:
    """Settles with the other ranks what is decided; see the module.

    ``shared`` (settable before the first step) takes part in it.
    """

    def __init__(self, group: ProcessGroup, run: str) -> None:
        self.group = group
        self.shared: Shared | None = None
        self.unsound = self.any_unsound = False
        """Whether this rank had trouble of its own in the step that is settled next; and
        whether any rank had, in the one that was settled last."""
        self.holds = True
        """False once it is over."""
        self._run = run
        self._prepared: _Prepared | None = None
        self._sent: tuple[_Prepared, PendingReduce] | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank asks for all."""
        return self.group.leads

    def submit_answer(self, decision: Decision) -> None:
        """On the leader: the answer about the step that was settled last. Never raises."""
        try:
            self._post(decision)
        except Exception as error:
            self._give_up_after(error)

    def settle(self, step: int) -> Decision:
        """Prepare what this rank posts of ``step``; returns what all have settled before.

        The decision returned is about the step before, ``not_asked`` at the first,
        ``not_agreed`` once the agreement is over. Never raises.
        """
        settled: RoundResult | None = None
        if self.holds:
            try:
                if self._prepared is not None:  # the leader's question was not even sent
                    self._post(unanswered(self._run, step - 1, NOT_ASKED))
                settled = self._take()
                self._prepare(step)
            except Exception as error:
                self._give_up_after(error)
                settled = None
        if settled is not None:
            return settled.message.decision
        if self.holds:
            return unanswered(self._run, step - 1, NOT_ASKED)
        return unanswered(self._run, step, NOT_AGREED)

    def give_up(self, why: str) -> None:
        """End it; ``why`` is told, once."""
        if self.holds:
            self._give_up(why)

    def close(self) -> None:
        """The run is over."""
        self.holds = False
        self._sent = self._prepared = None
        self.group.leave()

    def _take(self) -> RoundResult | None:
        """What came of what was posted of the step before; who took part in it hears of it."""
        if self._sent is None:
            return None
        (prepared, sent), self._sent = self._sent, None
        settled = decode_round(prepared.step, prepared.digest, len(prepared.flags), sent.wait())
        self.any_unsound = settled.flags[0] > 0
        if prepared.shared is not None:
            prepared.shared.on_round(settled.flags[1:], settled.message.command)
        return settled

    def _prepare(self, step: int) -> None:
        shared, flag = self.shared, bytes((self.unsound,))
        if shared is None:
            self._prepared = _Prepared(step, 0, flag, None, None)
        else:
            command = shared.command() if self.leads else None
            flags = flag + shared.flags()
            self._prepared = _Prepared(step, shared.digest(), flags, command, shared)
        if not self.leads:
            self._post(None)

    def _post(self, decision: Decision | None) -> None:
        """``decision`` is the leader's answer, None on the others."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        message = None if decision is None else LeaderMessage(decision, prepared.command)
        posted = encode_round(prepared.step, prepared.digest, prepared.flags, message)
        self._sent = prepared, self.group.send(posted)

    def _give_up_after(self, error: Exception) -> None:
        known = isinstance(error, ProcessGroupError | DisagreementError)
        self._give_up(str(error) if known else repr(error))

    def _give_up(self, why: str) -> None:
        self.close()
        log.warning(
            "the ranks of this run no longer synchronise decisions (%s): no decision is "
            "applied from here on, and seeds stay as they are",
            why,
        )
        if self.shared is not None:
            self.shared.on_agreement_lost()
