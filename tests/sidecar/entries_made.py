"""Journal entries for tests: everything that is not named is something ordinary."""

import msgspec

from esper_otel.leyline.decisions import Action, Severity
from esper_tamiyo.journaling.entries import (
    Changed,
    Decided,
    Found,
    Reported,
    RuleText,
    TableInUse,
)
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.table import Condition

WHEN = Condition("loss", Operator.ABOVE_BASELINE, 2.0, "loss")

AT = 1_790_000_000_000_000_000


def found(rule, **values):
    """A finding of a HIGH rule that pauses."""
    return Found(
        rule=rule,
        action=Action.PAUSE,
        severity=Severity.HIGH,
        text=f"{rule} in words.",
        values=values,
    )


def decided(step, rule="loss_spike", run="run", rank=0, **changes):
    """A PAUSE because of ``rule``."""
    entry = Decided(
        time_unix_nano=AT + step,
        id=f"{run}/{rank}/{step}",
        run=run,
        rank=rank,
        instance="one",
        step=step,
        observed_step=step,
        action=Action.PAUSE,
        severity=Severity.HIGH,
        reason=rule,
        target_seed=None,
        seed_operation=None,
        parameters={},
        conservative=False,
        table_version="t-1",
        mode="enforce",
        asked=True,
        decided_unix_nano=AT + step + 5,
        took_ms=0.1,
        proposal=None,
        findings=[found(rule, loss=3.0)],
        silenced=[],
    )
    return msgspec.structs.replace(entry, **changes)


def changed(step, rule="loss_spike", after=RuleState.INACTIVE, **changes):
    """A rule that fired and now is in another state."""
    entry = Changed(
        time_unix_nano=AT + step,
        run="run",
        rank=0,
        step=step,
        rule=rule,
        severity=Severity.HIGH,
        seed_id=None,
        before=RuleState.FIRING,
        after=after,
        since_step=0,
        values={},
        silenced_by="",
    )
    return msgspec.structs.replace(entry, **changes)


def reported(step, outcome="improved", run="run"):
    """An outcome report about the decision of that step."""
    return Reported(
        time_unix_nano=AT + step + 32,
        decision=f"{run}/0/{step}",
        run=run,
        rank=0,
        step=step,
        action=Action.PAUSE,
        reason="loss_spike",
        mode="enforce",
        outcome=outcome,
        because="loss is back to its earlier value",
        window=32,
        observed=32,
        before={"loss": 0.5},
        during={"loss": 3.0},
        after={"loss": 0.6},
    )


def table(*rules):
    """The table t-1."""
    texts = [
        RuleText(rule, Action.PAUSE, Severity.HIGH, str(WHEN), "Words.", WHEN) for rule in rules
    ]
    return TableInUse(
        time_unix_nano=AT, version="t-1", rules=texts, source="default", window=64
    )
