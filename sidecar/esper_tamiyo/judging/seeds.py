"""The seeds of one rank: those of its newest step record, and the past of some removed ones."""

from __future__ import annotations

from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.limits import MAX_SEEDS_PER_FRAME
from esper_tamiyo.judging.history import History
from esper_tamiyo.judging.rule_status import RuleTarget
from esper_tamiyo.judging.rulebook import Rulebook

MAX_SEEDS = MAX_SEEDS_PER_FRAME
"""Seeds of a rank that are kept, those that are gone included: of these the one not seen for
longest is forgotten first."""


NEW_AT_ONCE = 16
"""Seeds that are taken up in one step; more wait for the next ones, in which they are there as
well. To begin a past takes 0.1 ms, and asks of others have five."""


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
