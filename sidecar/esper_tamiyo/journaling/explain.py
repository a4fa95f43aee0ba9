"""Explain: one decision, or notice, in words, from the journal alone.

Which rule decided, what it saw and what it had expected, since when, what was not heard
because of it, what the run did afterwards, and what to change if it was a false alarm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from esper_otel.leyline.decisions import (
    CLEAR_GRADIENTS,
    CONSERVATIVE_MODE,
    LR_SCALE,
    MAX_NORM,
    MOMENTUM_SCALE,
    NOMINAL,
    RANK_OF,
    RESTORE,
    SKIP_STEP,
    WARMING_UP,
    Action,
)
from esper_tamiyo.journaling.entries import Decided, Found, Reported, rfc3339
from esper_tamiyo.journaling.expectations import expected, if_false_alarm
from esper_tamiyo.journaling.field_reports import WATCHED
from esper_tamiyo.journaling.lines import OUTCOMES, format_values, why_unheard
from esper_tamiyo.journaling.stories import Story, main_rule

MODES = {
    "enforce": "The trainer is in enforce mode.",
    "advise": "The trainer is in advise mode: it reports decisions and applies none.",
    "": "Whether the trainer applies decisions is not known.",
}
"""What was applied is told by :func:`applied`, from what updates were made with."""


def format_story(story: Story) -> Iterator[str]:
    """The story for people."""
    decision = story.decision
    about = f" for seed {decision.target_seed}" if decision.target_seed else ""
    if decision.action is Action.CONTINUE:
        yield f"{decision.id}: notice"
    else:
        yield f"{decision.id}: {decision.action} ({decision.severity}){about}"
    if decision.update:
        yield f"about the update of step {decision.step}, before it was made"
    yield f"at {rfc3339(decision.time_unix_nano)}, by table {decision.table_version}"
    yield from _why(story)
    yield from _what(story)
    yield from _unheard(story)
    yield from _afterwards(story)
    yield from _otherwise(story)


def plain(story: Story) -> dict[str, Any]:
    """The story for machines: the journal's own entries, and the texts of the rules."""
    told: dict[str, Any] = msgspec.to_builtins(
        {
            "decision": story.decision,
            "field_report": story.report,
            "rules": {
                rule: story.rules[rule]
                for rule in _involved(story.decision)
                if rule in story.rules
            },
            "let_go_at_step": story.ended,
            "expected": {found.rule: list(_expected(found, story)) for found in story.told},
            "if_false_alarm": list(_otherwise(story))[1:],
        }
    )
    return told


def _why(story: Story) -> Iterator[str]:
    decision = story.decision
    yield ""
    if decision.action is Action.CONTINUE:
        for found in story.told:
            yield f"{found.rule} ({found.severity}): {found.text}"
            yield from _evidence(found, story)
        return
    if decision.reason == NOMINAL:
        yield "Nothing was wrong, so the proposal is granted."
    elif decision.reason == WARMING_UP:
        yield "No rule fired, and those that compare with the past have none yet:"
        yield "the proposal is granted."
    elif decision.reason == CONSERVATIVE_MODE:
        yield "Conservative mode: seeds wait until the run has been calm for a while."
    for found in story.told:
        yield f"{found.rule} decided: {found.text}"
        yield from _evidence(found, story)


def _evidence(found: Found, story: Story) -> Iterator[str]:
    rule = story.rules.get(found.rule)
    if rule is not None:
        yield f"  it asks for: {rule.when}"
    sentences = list(_expected(found, story))
    yield from (f"  {sentence}" for sentence in sentences)
    if not sentences:  # a journal of before there were conditions in it
        yield from (f"  it saw: {line}" for line in format_values(found.values))
    if found.seed_id is not None:
        yield f"  about seed {found.seed_id}"
    if found.pending_since is not None and found.pending_since != found.firing_since:
        yield f"  it held since step {found.pending_since}"
    if found.firing_since is not None:
        yield f"  firing since step {found.firing_since}"


def _expected(found: Found, story: Story) -> Iterator[str]:
    rule, table = story.rules.get(found.rule), story.table
    if rule is not None and rule.condition is not None and table is not None:
        yield from expected(rule.condition, found.values, table)


def _otherwise(story: Story) -> Iterator[str]:
    """What to change if it was a false alarm."""
    for found in story.told:
        rule, table = story.rules.get(found.rule), story.table
        if rule is not None and table is not None:
            yield ""
            yield from if_false_alarm(found, rule, table, story.decision.run)


def _what(story: Story) -> Iterator[str]:
    decision = story.decision
    yield ""
    if decision.action is Action.CONTINUE:
        yield "It is a notice: it requests nothing of the run."
        return
    for name, value in decision.parameters.items():
        yield f"{name} {value:g}"
    if decision.seed_operation is not None:
        yield f"granted: {decision.seed_operation} of seed {decision.target_seed}"
    if decision.conservative:
        yield "Conservative mode is on: operations on seeds wait."
    if decision.observed_step > decision.step:
        yield f"It had already seen step {decision.observed_step}."
    yield MODES.get(decision.mode, MODES[""])
    if decision.parameters:
        if story.report is None:
            yield "The factor of its updates is not known yet."
        else:
            yield from applied(story.report, decision.parameters)


def applied(report: Reported, parameters: Mapping[str, float]) -> Iterator[str]:
    """What updates were really made with, as far as ``parameters`` asked something of them."""
    if RESTORE in parameters:
        yield "The metric restored of the following steps says whether a snapshot was restored."
    if SKIP_STEP in parameters and (report.update or RESTORE not in parameters):
        yield _left_out(report)
    if LR_SCALE in parameters:
        which = "lower" if parameters[LR_SCALE] < 1.0 else "higher"
        yield _rate_of_update(report, which) if report.update else _rate_since(report, which)
    if CLEAR_GRADIENTS in parameters:
        yield "The metric gradients_kept of the following steps is 1 as long as they were not."
    if MOMENTUM_SCALE in parameters:
        yield "The metric optimizer_momentum of the step is the momentum of its update."
    if MAX_NORM in parameters:
        yield "Whether gradients were scaled down to max_norm is not in the telemetry."


def _left_out(report: Reported) -> str:
    if report.skipped is None:
        return f"Whether the update of step {report.step} was skipped is not known."
    return f"The update of step {report.step} was {'' if report.skipped else 'not '}skipped."


def _rate_of_update(report: Reported, which: str) -> str:
    update, scale = f"update of step {report.step}", report.lr_scale
    if scale is None:
        return f"Whether the {update} was made with a {which} rate is not known."
    if scale == 1.0:
        return f"The {update} was not made with a {which} rate."
    return f"The {update} was made at {scale:g} times the script's rate."


def _rate_since(report: Reported, which: str) -> str:
    scale, since = report.lr_scale_after, report.scaled_from
    if scale is None:
        return f"Whether updates were made with a {which} rate is not known."
    if since is not None:
        return f"Updates were made at {scale:g} times the script's rate from step {since} on."
    if scale == 1.0:
        return f"No update was made with a {which} rate."
    return f"Updates were made at {scale:g} times the script's rate, as before."


def _unheard(story: Story) -> Iterator[str]:
    decision = story.decision
    unheard = []
    is_notice = decision.action is Action.CONTINUE
    lower = [
        found for found in decision.findings if found.rule != decision.reason and not is_notice
    ]
    for found in sorted(lower, key=lambda found: -RANK_OF[found.severity]):
        seen = ", ".join(format_values(found.values))
        unheard.append(
            f"{found.rule} ({found.action}, {found.severity}): {found.text} [{seen}]"
        )
    unheard += [
        f"{silenced.rule}: {why_unheard(silenced.by)}" for silenced in decision.silenced
    ]
    proposal = decision.proposal
    if proposal is not None and decision.seed_operation is None:
        unheard.append(f"the proposal to {proposal.operation} seed {proposal.seed_id}")
    if unheard:
        yield ""
        yield "Suppressed:" if is_notice else "Overridden by the stronger rule:"
        yield from (f"  {line}" for line in unheard)


def _afterwards(story: Story) -> Iterator[str]:
    yield ""
    report = story.report
    if report is None:
        yield "Afterwards: no outcome report yet, its steps have not arrived."
    else:
        outcome = OUTCOMES.get(report.outcome, report.outcome)
        yield f"Afterwards ({report.observed} of {report.window} steps): {outcome}"
        yield from (f"  {words}" for words in (report.because, report.comparison) if words)
        for key in WATCHED:
            parts = [
                f"{when} {values[key]:.4g}"
                for when, values in (
                    ("before", report.before),
                    ("at the decision", report.during),
                    ("after", report.after),
                )
                if key in values
            ]
            if parts:
                yield f"  {key}: {', '.join(parts)}"
    if story.ended is not None:
        yield f"{main_rule(story.decision)[0]} let go at step {story.ended}."


def _involved(decision: Decided) -> list[str]:
    found = [found.rule for found in decision.findings]
    return [*found, *(silenced.rule for silenced in decision.silenced)]
