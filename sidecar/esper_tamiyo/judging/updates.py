"""Updates that are not made yet: which rules speak of one, and what they ask of it.

Before an update is made only some of its step is known. Which rules and conditions are
about that is for :mod:`esper_tamiyo.language.updates` to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from esper_otel.leyline.decisions import (
    LR_SCALE,
    MAX_NORM,
    NOMINAL,
    SKIP_STEP,
    Action,
    Decision,
    Finding,
    Severity,
)
from esper_tamiyo.judging.rules import CompiledRule, compiled
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.updates import acts_on_updates, tells

Fired = tuple[CompiledRule, Finding]


class UpdateRules:
    """The rules of a table by which updates are checked, each with its place in the table.

    ``acting`` act on updates; ``silencing`` are those that silence one of them.
    """

    __slots__ = ("acting", "silencing")

    def __init__(self, table: Table) -> None:
        acting = {rule.id for rule in table.rules if acts_on_updates(rule)}
        placed = [(place, compiled(rule, tells)) for place, rule in enumerate(table.rules)]
        self.acting = tuple(one for one in placed if one[1].rule.id in acting)
        self.silencing = tuple(
            one for one in placed if one[1].acts and not acting.isdisjoint(one[1].rule.silences)
        )


def decide_update(
    key: tuple[str, int],
    step: int,
    newest: int,
    fired: Sequence[Fired],
    *,
    conservative: bool,
    table_version: str,
) -> Decision:
    """The decision about the update of ``step``, which is not made yet.

    To leave it out wins over all. Else the strongest rule with a factor scales its rates,
    and the smallest norm of all holds its gradients.
    """
    action, severity, reason = Action.CONTINUE, Severity.NORMAL, NOMINAL
    parameters: dict[str, float] = {}
    if fired:
        skipping = [entry for entry, _ in fired if SKIP_STEP in entry.rule.parameters]
        winner = max(skipping or [entry for entry, _ in fired], key=_weight).rule
        action, severity, reason = winner.action, winner.severity, winner.id
        parameters = {SKIP_STEP: 1.0} if skipping else _smaller(fired)
    run, rank = key
    return Decision(
        f"{run}/{rank}/{step}/update",
        run,
        step,
        newest,
        action,
        severity,
        reason,
        [finding for _, finding in fired],
        parameters=parameters,
        conservative=conservative,
        table_version=table_version,
    )


def _smaller(fired: Sequence[Fired]) -> dict[str, float]:
    parameters = {}
    scaling = [entry for entry, _ in fired if LR_SCALE in entry.rule.parameters]
    if scaling:
        parameters[LR_SCALE] = max(scaling, key=_weight).rule.parameters[LR_SCALE]
    norms = [
        entry.rule.parameters[MAX_NORM]
        for entry, _ in fired
        if MAX_NORM in entry.rule.parameters
    ]
    if norms:
        parameters[MAX_NORM] = min(norms)
    return parameters


def _weight(entry: CompiledRule) -> tuple[int, int]:
    return entry.weight
