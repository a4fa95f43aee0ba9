"""Explain: one decision in words, from the journal alone.

Which rule decided and what it saw, since when, what was not heard because of it, and what
the run did afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import msgspec

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    LR_SCALE,
    MAX_NORM,
    NOMINAL,
    RANK_OF,
    RESTORE,
    SKIP_STEP,
)
from esper_tamiyo.journaling.entries import (
    AnyEntry,
    Changed,
    Decided,
    Found,
    Reported,
    RuleText,
    TableInUse,
    format_values,
    rfc3339,
)
from esper_tamiyo.journaling.field_reports import WATCHED
from esper_tamiyo.judging.observer import RuleState

LATEST = "latest"
OF_UPDATE = "/update"
"""End of the ids of decisions about updates."""
NEAR = 5
"""Ids offered in place of one that is not there."""

MODES = {
    "enforce": "The trainer is in enforce mode.",
    "advise": "The trainer is in advise mode: it reports decisions and applies none.",
    "": "Whether the trainer applies decisions is not known.",
}
"""What was applied is told by :func:`applied`, from what updates were made with."""


class UnknownDecisionError(Exception):
    """No such decision in the journal; the text says what there is."""


class Story(NamedTuple):
    """A decision and what belongs to it."""

    decision: Decided
    report: Reported | None
    rules: dict[str, RuleText]
    """The rules of the table that decided, as far as the journal has them."""
    ended: int | None
    """The step at which the rule that decided let go, None when it was not seen to."""


def find_decision(entries: Iterable[AnyEntry], wanted: str, run: str = "") -> Story:
    """The story of the decision with the id ``wanted``, or of the latest (of ``run``).

    Of several with one id (a step asked about twice, a restarted run) it is the last.
    Raises :class:`UnknownDecisionError`.
    """
    search = _Search(wanted, run)
    for entry in entries:
        search.see(entry)
    return search.story()


class _Search:
    """What of the entries seen so far belongs to the decision that is looked for."""

    def __init__(self, wanted: str, run: str) -> None:
        self._wanted = wanted
        self._run = run
        self._decision: Decided | None = None
        self._report: Reported | None = None
        self._ended: int | None = None
        self._tables: dict[str, TableInUse] = {}
        self._run_of: dict[str, str] = {}
        """By id, of every decision."""

    def see(self, entry: AnyEntry) -> None:
        """The next entry of the journal."""
        if isinstance(entry, TableInUse):
            self._tables[entry.version] = entry
        elif isinstance(entry, Decided):
            self._run_of[entry.id] = entry.run
            if self._is_wanted(entry):
                self._decision, self._report, self._ended = entry, None, None
        elif self._decision is not None:
            self._see_what_followed(entry, self._decision)

    def story(self) -> Story:
        """Raises :class:`UnknownDecisionError` when there was no such decision."""
        decision = self._decision
        if decision is None:
            raise UnknownDecisionError(_unknown(self._wanted, self._run, self._run_of))
        table = self._tables.get(decision.table_version)
        rules = {rule.id: rule for rule in table.rules} if table else {}
        return Story(decision, self._report, rules, self._ended)

    def _is_wanted(self, entry: Decided) -> bool:
        if self._wanted == LATEST and self._run in ("", entry.run):
            return True
        return entry.id == self._wanted

    def _see_what_followed(self, entry: AnyEntry, decision: Decided) -> None:
        if isinstance(entry, Reported):
            if entry.decision == decision.id:
                self._report = entry
        elif isinstance(entry, Changed) and self._ended is None and _lets_go(entry, decision):
            self._ended = entry.step


def format_story(story: Story) -> Iterator[str]:
    """The story for people."""
    decision = story.decision
    about = f" for seed {decision.target_seed}" if decision.target_seed else ""
    yield f"{decision.id}: {decision.action} ({decision.severity}){about}"
    if decision.update:
        yield f"about the update of step {decision.step}, before it was made"
    yield f"at {rfc3339(decision.time_unix_nano)}, by table {decision.table_version}"
    yield from _why(story)
    yield from _what(story)
    yield from _unheard(story)
    yield from _afterwards(story)


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
        }
    )
    return told


def _why(story: Story) -> Iterator[str]:
    decision = story.decision
    yield ""
    if decision.reason == NOMINAL:
        yield "Nothing was wrong, so what was proposed is granted."
    elif decision.reason == CONSERVATIVE_MODE:
        yield "Conservative mode: seeds wait until the run has been calm for a while."
    for found in decision.findings:
        if found.rule == decision.reason:
            yield f"{found.rule} decided: {found.text}"
            yield from _evidence(found, story.rules.get(found.rule))
            break


def _evidence(found: Found, rule: RuleText | None) -> Iterator[str]:
    if rule is not None:
        yield f"  it asks for: {rule.when}"
    for line in format_values(found.values):
        yield f"  it saw: {line}"
    if found.seed_id is not None:
        yield f"  about seed {found.seed_id}"
    if found.pending_since is not None and found.pending_since != found.firing_since:
        yield f"  it held since step {found.pending_since}"
    if found.firing_since is not None:
        yield f"  firing since step {found.firing_since}"


def _what(story: Story) -> Iterator[str]:
    decision = story.decision
    yield ""
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
            yield "What its updates were made with has not been seen yet."
        else:
            yield from applied(story.report, decision.parameters)


def applied(report: Reported, parameters: Mapping[str, float]) -> Iterator[str]:
    """What updates were really made with, as far as ``parameters`` asked something of them."""
    if RESTORE in parameters:
        yield "Whether a snapshot was put back is in the metric restored of the steps after it."
    if SKIP_STEP in parameters and (report.update or RESTORE not in parameters):
        yield _left_out(report)
    if LR_SCALE in parameters:
        which = "lower" if parameters[LR_SCALE] < 1.0 else "higher"
        yield _rate_of_update(report, which) if report.update else _rate_since(report, which)
    if MAX_NORM in parameters:
        yield "Whether gradients were scaled down to max_norm is not in the telemetry."


def _left_out(report: Reported) -> str:
    if report.skipped is None:
        return f"Whether the update of step {report.step} was left out is not known."
    return f"The update of step {report.step} was {'' if report.skipped else 'not '}left out."


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
    lower = [found for found in decision.findings if found.rule != decision.reason]
    for found in sorted(lower, key=lambda found: -RANK_OF[found.severity]):
        seen = ", ".join(format_values(found.values))
        unheard.append(
            f"{found.rule} ({found.action}, {found.severity}): {found.text} [{seen}]"
        )
    unheard += [
        f"{silenced.rule}: inhibited by {silenced.by}" for silenced in decision.silenced
    ]
    proposal = decision.proposal
    if proposal is not None and decision.seed_operation is None:
        unheard.append(f"the proposal to {proposal.operation} seed {proposal.seed_id}")
    if unheard:
        yield ""
        yield "Not followed, as this was stronger:"
        yield from (f"  {line}" for line in unheard)


def _afterwards(story: Story) -> Iterator[str]:
    yield ""
    report = story.report
    if report is None:
        yield "Afterwards: no field report yet, its steps have not been seen."
    else:
        yield f"Afterwards ({report.observed} of {report.window} steps): {report.outcome}"
        if report.because:
            yield f"  {report.because}"
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
        yield f"{story.decision.reason} let go at step {story.ended}."


def _lets_go(entry: Changed, decision: Decided) -> bool:
    """Whether the rule that decided ends with it."""
    return (
        (entry.run, entry.rank, entry.rule, entry.seed_id)
        == (decision.run, decision.rank, decision.reason, decision.target_seed)
        and entry.step > decision.step
        and entry.after is RuleState.INACTIVE
    )


def _involved(decision: Decided) -> list[str]:
    found = [found.rule for found in decision.findings]
    return [*found, *(silenced.rule for silenced in decision.silenced)]


def _unknown(wanted: str, run: str, ids: dict[str, str]) -> str:
    if not ids:
        return "the journal holds no decision other than CONTINUE yet"
    if wanted == LATEST:
        runs = sorted(set(ids.values()))
        return f"the journal holds no decision about run {run}; it knows {_some(runs)}"
    return (
        f"{wanted}: the journal holds no such decision (a CONTINUE is not written down); "
        f"near it are {_some(_near(wanted, list(ids)))}"
    )


def _near(wanted: str, ids: list[str]) -> list[str]:
    """The ids of the same rank with the nearest steps, else those spelt most like it."""
    run_and_rank, step = _parts(wanted)
    same = [one for one in ids if _parts(one)[0] == run_and_rank]
    if same and step.isdecimal():
        return sorted(same, key=lambda one: abs(int(_parts(one)[1]) - int(step)))[:NEAR]
    return get_close_matches(wanted, ids, NEAR, 0.0)


def _parts(decision: str) -> tuple[str, str]:
    """Run and rank, and the step, of an id."""
    run_and_rank, _, step = decision.removesuffix(OF_UPDATE).rpartition("/")
    return run_and_rank, step


def _some(names: list[str]) -> str:
    rest = len(names) - NEAR
    return ", ".join(names[:NEAR]) + (f" and {rest} more" if rest > 0 else "")
