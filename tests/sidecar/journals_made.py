"""Journals for tests: a pause with its outcome and other runs beside it, and a notice."""

import msgspec

from esper_otel.leyline.decisions import Action, SeedOperation, Severity
from esper_tamiyo.journaling.entries import Proposed, Silenced
from sidecar.entries_made import changed, decided, found, reported, table

SPIKE = decided(
    61,
    findings=[
        msgspec.structs.replace(
            found("loss_spike", loss=3.0, **{"baseline(loss)": 0.5}),
            pending_since=60,
            firing_since=61,
        ),
        msgspec.structs.replace(
            found("loss_warning", loss_delta=2.5, **{"previous(loss_delta)": 0.1}),
            severity=Severity.WARNING,
            action=Action.OPTIMIZER,
        ),
    ],
    silenced=[Silenced("grad_variance_high", "loss_spike")],
    proposal=Proposed("s1", SeedOperation.BLEND),
    conservative=True,
)
JOURNAL = [
    table("loss_spike", "loss_warning", "other"),
    decided(20),
    SPIKE,
    changed(70),
    reported(61),
    decided(7, run="another"),
    changed(90),
]


def notice(step, *rules, **changes):
    """A CONTINUE at which these rules only told something."""
    findings = [
        msgspec.structs.replace(
            found(rule, loss=3.0, **{"baseline(loss)": 1.0}),
            action=Action.CONTINUE,
            severity=severity,
        )
        for rule, severity in zip(rules, (Severity.WARNING, Severity.HIGH), strict=False)
    ]
    ordinary = {
        "action": Action.CONTINUE,
        "severity": Severity.NORMAL,
        "reason": "nominal",
        "findings": findings,
    }
    return decided(step, **(ordinary | changes))


NOTICED = [
    table("loss_drift", "jump"),
    notice(40, "loss_drift", "jump"),
    reported(40, "came_back"),
    changed(60, "jump"),
]
