"""The state of a rule for a rank and its seeds: the conditions to fire, and to stop."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from esper_otel.leyline.frames import MAX_SEEDS_PER_FRAME, StepFrame
from esper_tamiyo.judging.history import History
from esper_tamiyo.judging.observer import RuleChange, RuleState
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.judging.rules import CompiledRule, Values, Verdict

NEVER = -(1 << 62)

MAX_SEEDS = MAX_SEEDS_PER_FRAME
"""Seeds of a rank that are kept, those that are gone included: of these the one not seen for
longest is forgotten first."""

NEW_AT_ONCE = 16
"""Seeds that are taken up in one step; more wait for the next ones, in which they are there as
well. To begin a past takes 0.1 ms, and asks of others have five."""

ONCE = 2
"""Steps on which gradients far beyond the usual ones are still a single event."""

_INACTIVE, _PENDING, _FIRING, _RECOVERING, _UNKNOWN = RuleState

_AT_REST = (_UNKNOWN, _INACTIVE)
_HELD = (_FIRING, _RECOVERING)

_NOTHING = object()
_IDLE: dict[RuleState, object] = {_INACTIVE: False, _UNKNOWN: None}


class RuleStatus:
    """The memory of one rule.

    A rule fires when its condition holds and has held for ``for`` observations, in a row
    or of the last ``of``. It goes on until the condition with the easier numbers of
    ``release`` is false; without a release, until fewer than ``for`` of the last ``of``
    hold, which in a row is at once. An observation that is unknown changes none of this.
    """

    __slots__ = (
        "active",
        "fired_at",
        "hits",
        "idle",
        "recent",
        "silenced_by",
        "since",
        "state",
    )

    def __init__(self) -> None:
        self.state = _UNKNOWN
        self.since = -1
        """Step at which ``state`` began, -1 before the rule was first judged."""
        self.idle: object = None
        """The verdict that would change nothing: most rules are false, or unknown, for
        most of a run, and need no more than this comparison."""
        self.active = False
        """Fired and not yet released; may be true while the state is unknown."""
        self.hits = 0
        self.recent = 0
        self.fired_at = NEVER
        self.silenced_by = ""

    def kept(
        self, entry: CompiledRule, verdict: Verdict, values: Values, history: History
    ) -> Verdict:
        """The verdict with the easier numbers, where it matters: while the rule is active and
        ``verdict`` is not true."""
        if self.active and not verdict and entry.keeps is not None:
            return entry.keeps(values, history)
        return None

    def advance(self, entry: CompiledRule, verdict: Verdict, kept: Verdict) -> RuleState:
        """The state after one more observation.

        ``kept`` is the verdict that :meth:`kept` gives.
        """
        if verdict is None and (not self.active or entry.keeps is None or kept is None):
            return _UNKNOWN
        if verdict is not None:
            self._count(entry, verdict)
        enough = self.hits >= entry.rule.persistence
        if verdict and (enough or self.active):
            self.active = True
            return _FIRING
        if self.active:
            stays = enough if entry.keeps is None else kept
            if stays is None:
                return _UNKNOWN
            if stays:
                return _RECOVERING
            self.active = False
            if entry.keeps is not None:  # what was seen before the release is settled
                self.hits = self.recent = 0
        return _PENDING if self.hits else _INACTIVE

    def peek(self, entry: CompiledRule, verdict: Verdict, kept: Verdict) -> RuleState:
        """The state that :meth:`advance` would give; changes nothing."""
        trial = RuleStatus()
        trial.active, trial.hits, trial.recent = self.active, self.hits, self.recent
        return trial.advance(entry, verdict, kept)

    def enter(self, state: RuleState, step: int) -> None:
        """Be in ``state`` from ``step`` on."""
        self.state, self.since = state, step
        self.idle = _NOTHING if self.active else _IDLE.get(state, _NOTHING)

    def _count(self, entry: CompiledRule, verdict: bool) -> None:
        if entry.window:
            self.recent = (self.recent << 1 | verdict) & entry.window
            self.hits = self.recent.bit_count()
        else:
            self.hits = self.hits + 1 if verdict else 0

    def reset(self) -> None:
        """Forget all but the cool-down: nobody can say how it stands any more."""
        self.active = False
        self.hits = self.recent = 0
        self.silenced_by = ""


_OF_OTHERS = RuleStatus()


class RuleTransition(NamedTuple):
    """A rule's state changed, or who inhibits it."""

    entry: CompiledRule
    seed_id: str | None
    before: RuleState
    after: RuleState
    since_step: int
    values: dict[str, float]
    silenced_by: str

    @property
    def whose(self) -> tuple[str, str | None]:
        """Id of the rule, and of the seed it is about."""
        return self.entry.rule.id, self.seed_id

    def as_change(self, run: str, rank: int, step: int, time_unix_nano: int) -> RuleChange:
        """What an observer is told of it."""
        rule = self.entry.rule
        return RuleChange(
            run=run,
            rank=rank,
            step=step,
            time_unix_nano=time_unix_nano,
            rule=rule.id,
            severity=rule.severity,
            seed_id=self.seed_id,
            before=self.before,
            after=self.after,
            since_step=self.since_step,
            values=self.values,
            silenced_by=self.silenced_by,
        )


class RuleTarget:
    """Whom rules are judged for: a rank, one of its seeds, or a rank in hindsight.

    It has a past, and each rule has a status with it. ``values`` are those of the frame that
    is judged.
    """

    __slots__ = ("history", "seed_id", "statuses", "values")

    def __init__(
        self,
        seed_id: str | None,
        rules: int,
        history: History,
        places: Iterable[int] | None = None,
    ) -> None:
        """``places`` are those of the rules that are about it, all of them unless said: the
        others have one status in common, which nothing changes."""
        self.seed_id = seed_id
        self.history = history
        if places is None:
            self.statuses = [RuleStatus() for _ in range(rules)]
        else:
            self.statuses = [_OF_OTHERS] * rules
            for place in places:
                self.statuses[place] = RuleStatus()
        self.values: Values = {}

    def rearrange(self, places: list[int | None], history: History) -> None:
        """Another table: ``places`` says for each rule where it was, None for a new one."""
        self.history = history
        self.statuses = [
            RuleStatus() if place is None else self.statuses[place] for place in places
        ]

    def lost(
        self, rules: Sequence[CompiledRule], kept: Container[int]
    ) -> Iterator[RuleTransition]:
        """What becomes unknown when only the rules at ``kept`` places stay."""
        for place, (entry, status) in enumerate(zip(rules, self.statuses, strict=True)):
            before = status.state
            if place not in kept and before not in _AT_REST:
                yield RuleTransition(
                    entry, self.seed_id, before, _UNKNOWN, status.since, {}, ""
                )

    def unrest(self, rules: Sequence[CompiledRule]) -> Iterator[dict[str, str | int]]:
        """The rules that are pending or have fired, as plain data."""
        for entry, status in zip(rules, self.statuses, strict=True):
            if status.active or status.state not in _AT_REST:
                yield {
                    "rule": entry.rule.id,
                    "state": status.state.value,
                    "since_step": status.since,
                    **({} if self.seed_id is None else {"seed_id": self.seed_id}),
                    **({"silenced_by": status.silenced_by} if status.silenced_by else {}),
                }


def usual(
    values: Values,
    active: Iterable[tuple[CompiledRule, RuleStatus, RuleTarget]],
    step: int,
    is_warming_up: bool = False,
) -> Values:
    """``values`` without the gradient norm while updates are made with the usual one.

    It would become the usual one itself, and the next update be made with it. The first such
    steps count: single ones belong to what the run is used to.

    In the warm-up of a phase the learning rate is the script's own, where decisions have cut
    the one that is used: later rates are compared with it, and the cut will end.
    """
    for entry, status, _ in active:
        if entry.keeps_norm and step - status.since >= ONCE:
            values = {key: value for key, value in values.items() if key != "gradient_norm"}
            break
    if is_warming_up and "optimizer_lr" in values:
        factor = values.get("lr_scale", 1.0)
        if 0.0 < factor < 1.0:
            values = {**values, "optimizer_lr": values["optimizer_lr"] / factor}
    return values


def would_hold(
    place: int,
    entry: CompiledRule,
    values: Values,
    rank: RuleTarget,
    seeds: Sequence[RuleTarget],
) -> bool:
    """Whether the rule at ``place`` would have fired and not be released by ``values``; as it
    stands now with the rank, or with any of its seeds, if these cannot tell."""
    rule = entry.rule
    if not (rule.about_seeds or rule.about_ranks):
        status = rank.statuses[place]
        verdict = entry.test(values, rank.history)
        kept = status.kept(entry, verdict, values, rank.history)
        after = status.peek(entry, verdict, kept)
        if after is not _UNKNOWN:
            return after in _HELD
    targets = seeds if rule.about_seeds else (rank,)
    return any(
        status.active and status.state in _HELD
        for status in (target.statuses[place] for target in targets)
    )


def bring_up(
    kept: dict[str, RuleTarget], frame: StepFrame, book: Rulebook, of_rank: History
) -> list[RuleTarget]:
    """The seeds of a frame, in its order, with their past; new ones are added to ``kept``.

    Those seen last are last in ``kept``.
    """
    live = []
    taken_up = 0
    for seed_id, own in frame.seeds.items():
        known = kept.pop(seed_id, None)
        if known is None:
            taken_up += 1
            if taken_up > NEW_AT_ONCE:
                continue
            past = History(book.seed_watch, of_rank)
            known = RuleTarget(seed_id, len(book.rules), past, book.seed_places)
        kept[seed_id] = known
        known.values = book.values_of_seed(frame.values, own)
        live.append(known)
    while len(kept) > MAX_SEEDS:
        del kept[next(iter(kept))]
    return live
