"""Runs: groups trainers into runs, and describes each run as a whole."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from esper_otel.leyline.metrics import INSTANCE_ID, LOCAL_RANK, RANK, RUN_ID, RUN_NAME
from esper_otel.report.columns import Attributes
from esper_otel.report.rulings import Happening, RuleSpell, Ruling
from esper_otel.report.sources import Archive
from esper_otel.report.trainers import TrainerCurves

_OF_ONE_PROCESS = frozenset({RUN_ID, RANK, LOCAL_RANK, INSTANCE_ID, "process.pid", "host.id"})
"""Attributes that say which process it was, and not how the run was set."""


class ShownRun(msgspec.Struct, kw_only=True):
    """One run as a report shows it: its ranks, and what was decided about it.

    ``settings`` are its resource attributes and its config. ``title`` is
    ``name`` with the name that people gave the run, if any.
    """

    name: str
    ranks: list[TrainerCurves]
    settings: Attributes
    rulings: list[Ruling]
    happenings: list[Happening]
    rules: list[RuleSpell]
    title: str


def runs_of(archive: Archive) -> list[ShownRun]:
    """The runs that were read, in order of their names and then of time.

    A process that went on behind the last step of another of the same rank belongs to its
    run. One whose steps overlap is a run of its own, with a number behind its name, and
    a problem of ``archive`` says so.
    """
    by_name: dict[str, list[TrainerCurves]] = defaultdict(list)
    for trainer in archive.trainers.values():
        by_name[trainer.source.run].append(trainer)
    for name in archive.ledger.runs():
        by_name.setdefault(name, [])
    found: list[ShownRun] = []
    for name, trainers in sorted(by_name.items()):
        generations = _generations(trainers) or [{}]
        if len(generations) > 1:
            archive.problems.append(
                f"run {name}: recorded {len(generations)} times under one name, "
                f"shown as {name} (1) to ({len(generations)})"
            )
        shown = name or "(no run id)"
        for number, ranks in enumerate(generations, 1):
            found.append(
                _shown(
                    archive,
                    name,
                    f"{shown} ({number})" if len(generations) > 1 else shown,
                    [ranks[rank] for rank in sorted(ranks)],
                    is_last=number == len(generations),
                )
            )
    return found


def _generations(trainers: list[TrainerCurves]) -> list[dict[int, TrainerCurves]]:
    """Trainers of one run, by rank, one for each time that its steps began anew."""
    generations: list[dict[int, TrainerCurves]] = []
    for trainer in sorted(trainers, key=lambda each: each.span()[0]):
        rank = trainer.source.rank
        newest = next((each for each in reversed(generations) if rank in each), None)
        if newest is not None and trainer.steps()[1] > newest[rank].steps()[2]:
            newest[rank].absorb(trainer)
            continue
        room = next(
            (each for each in generations if rank not in each and _meets(each, trainer)), None
        )
        if room is None:
            room = {}
            generations.append(room)
        room[rank] = trainer
    return generations


def _meets(generation: dict[int, TrainerCurves], trainer: TrainerCurves) -> bool:
    """Whether the trainer ran while others of the generation did."""
    start, end = trainer.span()
    others = (other.span() for other in generation.values())
    return any(start <= other_end and other_start <= end for other_start, other_end in others)


def _shown(
    archive: Archive, name: str, label: str, ranks: list[TrainerCurves], *, is_last: bool
) -> ShownRun:
    ledger = archive.ledger
    spans = [rank.span() for rank in ranks]
    start = min((span[0] for span in spans), default=0.0)
    end = max((span[1] for span in spans), default=float("inf"))
    settings: Attributes = {}
    for rank in ranks:
        for key, value in rank.attributes.items():
            if key not in _OF_ONE_PROCESS:
                settings.setdefault(key, value)
    settings.update(ledger.configs.get(name, {}))
    called = settings.get(RUN_NAME)

    def is_here(time_unix_nano: int) -> bool:
        return label == name or is_last or start <= time_unix_nano <= end

    return ShownRun(
        name=label,
        title=f"{called} ({label})" if called else label,
        ranks=ranks,
        settings=settings,
        rulings=sorted(
            (v for v in ledger.rulings.values() if v.run == name and is_here(v.time_unix_nano)),
            key=lambda ruling: (ruling.step, ruling.rank),
        ),
        happenings=sorted(
            (h for h in ledger.happenings if h.run == name and is_here(h.time_unix_nano)),
            key=lambda happening: happening.step,
        ),
        rules=ledger.states(name) if is_last else [],
    )
