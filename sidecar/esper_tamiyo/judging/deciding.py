"""From findings to one decision: force, severity, the proposal and conservative mode."""

from __future__ import annotations

from collections.abc import Sequence

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    FORCE,
    NOMINAL,
    Action,
    Decision,
    Finding,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_tamiyo.judging.rules import CompiledRule


def decide(
    key: tuple[str, int],
    step: int,
    newest: int,
    fired: Sequence[tuple[CompiledRule, Finding]],
    proposal: Proposal | None,
    *,
    conservative: bool,
    table_version: str,
) -> Decision:
    """The decision about ``step`` of a run and rank that is known up to ``newest``."""
    action, severity, reason = Action.CONTINUE, Severity.NORMAL, NOMINAL
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
            target_seed, parameters = finding.seed_id, rule.parameters
    if proposal is not None and FORCE[action] < FORCE[Action.SEED]:
        if conservative:
            action, severity, reason = Action.PAUSE, Severity.WARNING, CONSERVATIVE_MODE
            target_seed = None
        else:
            action, severity, reason = Action.SEED, Severity.NORMAL, NOMINAL
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


def _weight(fired: tuple[CompiledRule, Finding]) -> tuple[int, int]:
    return fired[0].weight
