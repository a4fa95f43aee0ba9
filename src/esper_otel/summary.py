"""The summary at the end of a run, for people and for machines."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from esper_otel.final_report import write_beside
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    NOT_AGREED,
    PROTOCOL_ERROR,
    SUPERSEDED,
    TIMEOUT,
    UNREACHABLE,
)
from esper_otel.leyline.terminal import counted, printable, printable_json, sparkline, tell
from esper_otel.settings import EsperSettings, Summaries
from esper_otel.stream import StreamReport
from esper_otel.stream.spool_files import resend_words
from esper_otel.tolaria.restoring import SnapshotReport

if TYPE_CHECKING:
    from esper_otel.stream.totals import RunTotals

log = logging.getLogger("esper_otel")

_LOST = "values could not be read without waiting for a device, and are omitted"

PHASES = {
    "input wait": "input_wait_ms",
    "forward": "forward_ms",
    "backward": "backward_ms",
    "optimizer": "optimizer_ms",
    "instrumentation": "hook_latency_ms",
}
"""Parts of a step as people call them, and the metrics that measure them."""

_MOST_OF_IT = 0.5
"""Share of a step from which on a phase is most of it."""

_STARVED, _STARVED_MS = 0.3, 1000.0
"""Share of the steps' time, and milliseconds in all, that waiting for data is worth a word."""

_CURVE = 24
"""Blocks of a loss curve at most."""

_WHY = {
    TIMEOUT: "no answer within the deadline",
    UNREACHABLE: "nothing listens at its socket",
    BREAKER_OPEN: "the circuit breaker is open after several failures",
    PROTOCOL_ERROR: "the answer was invalid",
    SUPERSEDED: "a newer process is this rank",
    NOT_AGREED: "the ranks did not synchronise decisions",
}
"""Why nobody judged a step, in words."""


class DecisionCount(msgspec.Struct, frozen=True):
    """How often something was decided, and how often that changed the run."""

    action: str
    reason: str
    times: int
    applied: int


SHOWN = 5
"""Trainings that are told apart; the others are added up."""


class TrainingSummary(msgspec.Struct, frozen=True):
    """One of several trainings of a process, or all those that are not told apart.

    ``run`` is the name of its run, "" of several.
    """

    run: str
    trainings: int
    steps: int
    step_ms: float | None
    first_loss: float | None
    last_loss: float | None
    decisions: int
    losses: list[float | None] = []

    def as_text(self) -> str:
        """What follows its name in a line."""
        parts = [counted(self.steps, "step")]
        if self.first_loss is not None and self.last_loss is not None:
            parts.append(f"loss {_curve(self.losses, self.first_loss, self.last_loss)}")
        if self.step_ms:
            parts.append(f"{self.step_ms:.3g} ms a step")
        if self.decisions:
            parts.append(counted(self.decisions, "decision"))
        return ", ".join(parts)


class Summary(msgspec.Struct, frozen=True):
    """One run in short. Times are means per step, in milliseconds.

    Of a process with several ``trainings`` all but those is of all of them together; each of
    the first ones is listed, and the rest in one.

    ``skipped_updates`` were left out by decisions, ``scaled_updates`` made with learning rates
    that decisions had scaled; ``before_updates`` has how often each reason changed an update
    before it was made. At ``unjudged_steps`` the newest decision
    request had not been answered, and at ``held_unjudged_steps`` of them decisions of before
    still scaled the learning rates; ``unanswered`` says why, as far as the steps that have
    spans show it.
    ``snapshots`` says what became of those that were kept, or asked for; None without any.
    ``lost_values`` of losses and gradients could not be read without waiting for a device.
    ``slowest`` names the phase that took most, None when no phase was seen. ``losses`` are
    means over equal parts of the steps: null where none is known or finite. ``telemetry``
    has for each signal what was produced, delivered, spooled and dropped, and which part of
    that the receiver did not want; ``unsent`` are
    files for ``esper-otel resend``, ``recordings`` those that hold everything, and ``page`` is
    the report that was written of it.
    """

    run: str
    rank: int
    steps: int
    seconds: float
    step_ms: float | None
    phases: dict[str, float]
    slowest: str | None
    first_loss: float | None
    last_loss: float | None
    nonfinite_steps: int
    skipped_updates: int
    unjudged_steps: int
    held_unjudged_steps: int
    decisions: list[DecisionCount]
    unanswered: list[str]
    telemetry: dict[str, dict[str, int]]
    unsent: list[str]
    recordings: list[str]
    lost_values: int = 0
    snapshots: SnapshotReport | None = None
    trainings: list[TrainingSummary] = []
    page: str = ""
    losses: list[float | None] = []
    scaled_updates: int = 0
    before_updates: dict[str, int] = {}

    def as_json(self) -> str:
        """One line of JSON."""
        return msgspec.json.encode(self).decode()

    def as_text(self) -> str:
        """A few lines for a terminal."""
        several = sum(each.trainings for each in self.trainings)
        lines = [
            f"esper-otel: run {self.run}, "
            + (f"{several:,} trainings, " if several else "")
            + f"{counted(self.steps, 'step')} in {_seconds(self.seconds)}"
        ]
        if self.first_loss is not None and self.last_loss is not None:
            curve = _curve(self.losses, self.first_loss, self.last_loss)
            lines.append(f"  loss      {curve}")
        if self.step_ms:
            split = ", ".join(
                f"{name} {took:.3g} ({took / self.step_ms:.0%})"
                for name, took in self.phases.items()
            )
            is_most = self.phases.get(self.slowest or "", 0.0) >= _MOST_OF_IT * self.step_ms
            most = f", most of it {self.slowest}" if is_most else ""
            lines.append(f"  a step    {self.step_ms:.3g} ms{most}: {split}")
        for each in self.trainings:
            name = each.run or f"{each.trainings:,} more"
            lines.append(f"  training  {name}: {each.as_text()}")
        if self.nonfinite_steps:
            lines.append(
                f"  values    NaN or infinite in {counted(self.nonfinite_steps, 'step')}"
            )
        if self.lost_values:
            lines.append(f"  lost      {self.lost_values:,} {_LOST}")
        lines += self._decided()
        if self.snapshots is not None:
            lines.append(f"  snapshots {'; '.join(_of_snapshots(self.snapshots))}")
        if self.unanswered or self.unjudged_steps:
            lines.append(f"  Tamiyo    {self._unjudged()}")
        lines.append(f"  telemetry {self._telemetry()}")
        if self.recordings:
            lines.append(f"  recorded  {' '.join(self.recordings)}")
        if self.page:
            lines.append(f"  report    {self.page}")
        lines += (f"  next      {advice}" for advice in self._advice())
        return "\n".join(map(printable, lines))

    def _decided(self) -> Iterator[str]:
        """What was decided about steps and updates, and what became of the updates."""
        told = [
            f"{each.action} {each.reason} × {each.times:,}"
            + (f" ({each.applied:,} applied)" if each.applied else "")
            for each in self.decisions
        ]
        for reason, times in self.before_updates.items():
            told.append(f"{reason} × {times:,} before an update")
        if told:
            yield f"  decided   {', '.join(told)}"
        made = []
        if self.scaled_updates:
            made.append(f"{self.scaled_updates:,} made with a scaled learning rate")
        if self.skipped_updates:
            made.append(f"{self.skipped_updates:,} skipped by decisions")
        if made:
            yield f"  updates   {', '.join(made)}"

    def _unjudged(self) -> str:
        text = "did not answer"
        if self.unjudged_steps:
            text += f" for {counted(self.unjudged_steps, 'step')}"
        if self.unanswered:
            text += f" ({', '.join(_WHY.get(each, each) for each in self.unanswered)})"
        if self.held_unjudged_steps:
            held = f"; for {self.held_unjudged_steps:,} of them the learning rate stayed"
            text += f"{held} scaled by an earlier decision"
        return text

    def _advice(self) -> Iterator[str]:
        """What to do about what went wrong, a line for each."""
        if self.unsent:
            yield f"esper-otel resend {resend_words(self.unsent)}"
        if {UNREACHABLE, BREAKER_OPEN} & set(self.unanswered):
            yield "is the sidecar running? `tamiyo serve` starts it, `tamiyo status` checks it"
        elif self.unanswered or self.unjudged_steps:
            yield "`tamiyo status` shows the health of the sidecar and its answer times"
        waited = self.phases.get("input wait", 0.0)
        if self.step_ms and waited >= max(_STARVED * self.step_ms, _STARVED_MS / self.steps):
            yield (
                f"the loop waits for data for {waited / self.step_ms:.0%} of its time: more "
                "workers (num_workers of its DataLoader), or less work for each batch"
            )

    def _telemetry(self) -> str:
        told = []
        names = {"metrics": "points", "traces": "spans", "logs": "events"}
        for signal, account in self.telemetry.items():
            if not account["produced"]:
                continue
            text = f"{account['delivered']:,} of {account['produced']:,} {names[signal]} sent"
            if account["refused"]:
                whole = account["refused"] == account["produced"]
                kind = "" if not whole else f": it does not accept {signal}"
                text += f", {account['refused']:,} rejected by the receiver{kind}"
            if account["dropped"] > account["refused"]:
                text += f", {account['dropped'] - account['refused']:,} DROPPED"
            told.append(text)
        return "; ".join(told) or "none sent"


def _of_snapshots(report: SnapshotReport) -> Iterator[str]:
    """What a person is told of them."""
    if report.taken:
        last = "none" if report.good_step is None else f"the last of step {report.good_step:,}"
        yield (
            f"{report.taken:,} made in {report.copy_ms:.3g} ms each, good: {last}; they take "
            f"{report.bytes / 1e6:,.3g} MB of host memory"
        )
    elif not (report.restored or report.refused):
        yield "none made"
    for to, at in report.restored:
        yield f"step {to:,} restored at step {at:,}"
    for why, times in report.refused.items():
        yield f"requested and not restored × {times:,}: {why}"


def summary_of(
    run: str,
    rank: int,
    totals: RunTotals,
    report: StreamReport,
    *,
    lost_values: int = 0,
    snapshots: SnapshotReport | None = None,
    others: Sequence[tuple[str, RunTotals]] = (),
    page: str = "",
) -> Summary:
    """The summary of a run that is over; ``others`` are trainings beside it, by name."""
    trainings: list[TrainingSummary] = []
    if others:
        each_of = [(run, totals), *others]
        rest = [each for _, each in each_of[SHOWN:]]
        trainings = [_training(name, each) for name, each in each_of[:SHOWN]]
        if rest:
            trainings.append(_training("", type(totals).sum_of(rest)))
        totals = type(totals).sum_of([each for _, each in each_of])
    phases = {
        name: took for name, key in PHASES.items() if (took := totals.per_step(key)) is not None
    }
    accounts = {"metrics": report.metrics, "traces": report.traces, "logs": report.logs}
    keep = ("produced", "delivered", "spooled", "dropped", "refused")
    return Summary(
        run=run,
        rank=rank,
        steps=totals.steps,
        seconds=(totals.last_unix_nano - totals.first_unix_nano) / 1e9,
        step_ms=totals.per_step("step_latency_ms"),
        phases=phases,
        slowest=max(phases, key=phases.__getitem__) if phases else None,
        first_loss=totals.first_loss,
        last_loss=totals.last_loss,
        nonfinite_steps=totals.nonfinite_steps,
        skipped_updates=totals.skipped_updates,
        unjudged_steps=totals.unjudged_steps,
        held_unjudged_steps=totals.held_unjudged_steps,
        decisions=[
            DecisionCount(action, reason, times, totals.applied[action, reason])
            for (action, reason), times in totals.decisions.most_common()
        ],
        unanswered=sorted(totals.unanswered),
        telemetry={
            signal: {name: getattr(account, name) for name in keep}
            for signal, account in accounts.items()
        },
        unsent=[str(path) for path in report.files],
        recordings=[str(path) for path in report.recordings],
        lost_values=lost_values,
        snapshots=snapshots,
        trainings=trainings,
        page=page,
        losses=totals.losses.means(_CURVE),
        scaled_updates=totals.scaled_updates,
        before_updates=dict(totals.before_updates.most_common()),
    )


def _training(run: str, totals: RunTotals) -> TrainingSummary:
    return TrainingSummary(
        run=run,
        trainings=totals.runs,
        steps=totals.steps,
        step_ms=totals.per_step("step_latency_ms"),
        first_loss=totals.first_loss,
        last_loss=totals.last_loss,
        decisions=totals.decisions.total(),
        losses=totals.losses.means(_CURVE),
    )


def _curve(losses: Sequence[float | None], first: float, last: float) -> str:
    """How a loss went: a curve where it has several parts, its first and last value."""
    curve = f"{sparkline(losses).strip()} " if len(losses) > 2 else ""
    return f"{curve}{first:.4g} → {last:.4g}"


def tell_summary(
    settings: EsperSettings,
    run: str,
    totals: RunTotals | None,
    report: StreamReport,
    *,
    lost_values: int,
    snapshots: SnapshotReport | None = None,
    others: Sequence[tuple[str, RunTotals]] = (),
    page: str = "",
) -> None:
    """Tell on standard error how a run was, as ``settings`` ask for; rank 0 alone does.

    ``others`` are trainings of the process beside it, by name. ``totals`` None: nothing was
    recorded. ``lost_values``, whose number is in the summary, go to the log where there is
    none. Beside the report ``page`` it is written as JSON, whatever ``settings`` ask for.
    """
    wanted = settings.summary is not Summaries.OFF and not settings.rank
    if totals is None or not totals.steps or not (wanted or page):
        if lost_values:
            log.warning("esper-otel: %d %s", lost_values, _LOST)
        return
    try:
        summary = summary_of(
            run,
            settings.rank,
            totals,
            report,
            lost_values=lost_values,
            snapshots=snapshots,
            others=others,
            page=page,
        )
        if page:
            write_beside(Path(page), printable_json(summary.as_json()))
        if wanted:
            as_json = settings.summary is Summaries.JSON
            tell(printable_json(summary.as_json()) if as_json else summary.as_text())
    except Exception as error:  # what was recorded is sent, whatever is wrong with this
        log.warning("the run cannot be summed up: %r", error)


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"
