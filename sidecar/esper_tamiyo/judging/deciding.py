"""From the rules that fired to one decision, after a step or before an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from operator import itemgetter

from esper_otel.leyline.decisions import (
    CLEAR_GRADIENTS,
    CONSERVATIVE_MODE,
    FORCE,
    LR_SCALE,
    MAX_NORM,
    MOMENTUM_SCALE,
    NOMINAL,
    RESTORE,
    SKIP_STEP,
    WARMING_UP,
    Action,
    Decision,
    Finding,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_tamiyo.judging.rules import CompiledRule
from esper_tamiyo.language.parameters import USUAL_MOMENTUM, USUAL_NORM, USUAL_RATE

Fired = tuple[CompiledRule, Finding]
"""A rule that fired, and what it saw."""


def decide(
    key: tuple[str, int],
    step: int,
    newest: int,
    fired: Sequence[Fired],
    proposal: Proposal | None,
    *,
    conservative: bool,
    table_version: str,
    warming_up: bool = False,
) -> Decision:
    """The decision about ``step`` of a run and rank that is known up to ``newest``.

    The strongest rule decides. What a rule asks that has weights restored, or gradients
    cleared, is asked beside it, as far as the strongest leaves it open: a pause of seeds heals
    no weights, and a smaller rate clears no gradients. With
    ``warming_up`` rules had no past to compare with, and nothing is called nominal.
    """
    nominal = WARMING_UP if warming_up else NOMINAL
    action, severity, reason = Action.CONTINUE, Severity.NORMAL, nominal
    target_seed: str | None = None
    operation: SeedOperation | None = None
    parameters: dict[str, float] = {}
    findings: list[Finding] = []
    if fired:
        counted = [
            entry for entry in fired if proposal is not None or not entry[0].rule.downgrade
        ]
        findings = [finding for _, finding in counted]
        acting = [entry for entry in counted if entry[0].acts]
        if acting:
            winner, finding = max(acting, key=_weight)
            rule = winner.rule
            action, severity, reason = rule.action, rule.severity, rule.id
            target_seed, parameters = finding.seed_id, _asked(winner, finding)
            restoring = _asking_for(RESTORE, acting)
            if restoring and RESTORE not in parameters:
                parameters = {**_asked(*max(restoring, key=_weight)), **parameters}
            if _asking_for(CLEAR_GRADIENTS, acting):
                parameters = {**parameters, CLEAR_GRADIENTS: 1.0}
    if proposal is not None and FORCE[action] < FORCE[Action.SEED]:
        if conservative:
            action, severity, reason = Action.PAUSE, Severity.WARNING, CONSERVATIVE_MODE
            target_seed = None
        else:
            action, severity, reason = Action.SEED, Severity.NORMAL, nominal
            target_seed, operation = proposal.seed_id, proposal.operation
    run, rank = key
    return Decision(
        f"{run}/{rank}/{step}",
        run,
        step,
        newest,
        action,
        severity,
        reason,
        findings,
        target_seed,
        operation,
        parameters,
        conservative,
        table_version,
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

    To put a snapshot back in its place wins over all, and then to leave it out. Else the
    strongest rule with a factor scales its rates, or its momentum, and the smallest norm of
    all holds its gradients. That goes with it also when the update is to be left out or
    replaced: a trainer that leaves out no more of them, or has no snapshot, makes it so.
    """
    action, severity, reason = Action.CONTINUE, Severity.NORMAL, NOMINAL
    parameters: dict[str, float] = {}
    if fired:
        restoring, skipping = _asking_for(RESTORE, fired), _asking_for(SKIP_STEP, fired)
        winner = max(restoring or skipping or fired, key=_weight)[0].rule
        action, severity, reason = winner.action, winner.severity, winner.id
        parameters = _bounded(fired)
        if skipping:
            parameters[SKIP_STEP] = 1.0
        if restoring:
            parameters[RESTORE] = 1.0
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


def _bounded(fired: Sequence[Fired]) -> dict[str, float]:
    """By how much an update is made smaller."""
    parameters = {}
    asked = [(entry.weight, _asked(entry, finding)) for entry, finding in fired]
    for factor in (LR_SCALE, MOMENTUM_SCALE):
        scaling = [one for one in asked if factor in one[1]]
        if scaling:
            parameters[factor] = max(scaling, key=itemgetter(0))[1][factor]
    norms = [one[MAX_NORM] for _, one in asked if MAX_NORM in one]
    if norms:
        parameters[MAX_NORM] = min(norms)
    return parameters


def _asked(entry: CompiledRule, finding: Finding) -> dict[str, float]:
    """What a rule asks of updates, what is usual worked out of what it saw."""
    parameters = entry.rule.parameters
    usual = {USUAL_NORM, USUAL_RATE, USUAL_MOMENTUM} & {*parameters}
    if not usual:
        return parameters
    asked = {name: value for name, value in parameters.items() if name not in usual}
    if USUAL_NORM in parameters and (norm := usual_norm(finding.values)) > 0.0:
        asked[MAX_NORM] = min(norm, asked.get(MAX_NORM, inf))
    for name, factor in ((USUAL_RATE, LR_SCALE), (USUAL_MOMENTUM, MOMENTUM_SCALE)):
        if name in usual:
            metric = SETTING_OF[name]
            now = finding.values.get(metric, 0.0)
            if 0.0 < (target := usual_setting(metric, finding.values)) < now:
                asked[factor] = target / now
    return asked


SETTING_OF = {USUAL_RATE: "optimizer_lr", USUAL_MOMENTUM: "optimizer_momentum"}
"""The setting of the optimizer that a parameter takes back to what is usual."""


def usual_norm(seen: Mapping[str, float]) -> float:
    """The norm that gradients have at most, from what a rule sees; 0.0 where nothing tells."""
    level, scatter = seen.get("level(gradient_norm)"), seen.get("scatter(gradient_norm)")
    if level is not None and scatter is not None:
        return level + scatter
    usual = (f"{kind}(gradient_norm)" for kind in ("baseline", "frozen", "lowest", "highest"))
    return next((seen[name] for name in usual if name in seen), 0.0)


def usual_setting(metric: str, seen: Mapping[str, float]) -> float:
    """The baseline of a setting, from what a rule sees; 0.0 where nothing tells."""
    baselines = (f"{kind}({metric})" for kind in ("highest", "baseline", "frozen"))
    return next((seen[name] for name in baselines if name in seen), 0.0)


def _asking_for(parameter: str, fired: Sequence[Fired]) -> list[Fired]:
    return [each for each in fired if parameter in each[0].rule.parameters]


def _weight(fired: Fired) -> tuple[int, int]:
    return fired[0].weight
