"""What a person is told when a run is over, and a machine that reads along."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from esper_otel.stream import StreamReport

if TYPE_CHECKING:
    from esper_otel.stream.tally import Tally

PHASES = {
    "input wait": "input_wait_ms",
    "forward": "forward_ms",
    "backward": "backward_ms",
    "optimizer": "optimizer_ms",
    "instrumentation": "hook_latency_ms",
}
"""Parts of a step as people call them, and the metrics that measure them."""


class Decided(msgspec.Struct, frozen=True):
    """How often something was decided, and how often that changed the run."""

    action: str
    reason: str
    times: int
    applied: int


class Summary(msgspec.Struct, frozen=True):
    """One run in short. Times are means per step, in milliseconds.

    ``skipped_updates`` were left out by decisions. At ``unjudged_steps`` the newest decision
    request had not been answered, and at ``held_unjudged_steps`` of them decisions of before
    still scaled the learning rates; ``unanswered`` says why, as far as the steps that have
    spans show it.
    ``slowest`` names the phase that took most, None when no phase was seen. ``telemetry``
    has for each signal what was produced, delivered, spooled and dropped, and which part of
    that the receiver did not want; ``unsent`` are
    files for ``esper-otel resend``, ``recordings`` those that hold everything.
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
    decisions: list[Decided]
    unanswered: list[str]
    telemetry: dict[str, dict[str, int]]
    unsent: list[str]
    recordings: list[str]

    def as_json(self) -> str:
        """One line of JSON."""
        return msgspec.json.encode(self).decode()

    def as_text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"esper-otel: run {self.run}, {self.steps:,} steps in {_seconds(self.seconds)}"
        ]
        if self.first_loss is not None and self.last_loss is not None:
            lines[0] += f", loss {self.first_loss:.4g} → {self.last_loss:.4g}"
        if self.step_ms:
            split = ", ".join(
                f"{name} {took:.3g} ({took / self.step_ms:.0%})"
                for name, took in self.phases.items()
            )
            most = f", most of it {self.slowest}" if self.slowest else ""
            lines.append(f"  a step    {self.step_ms:.3g} ms{most}: {split}")
        if self.nonfinite_steps:
            lines.append(f"  values    NaN or infinite in {self.nonfinite_steps:,} steps")
        if self.decisions:
            told = ", ".join(
                f"{each.action} {each.reason} × {each.times:,}"
                + (f" ({each.applied:,} applied)" if each.applied else "")
                for each in self.decisions
            )
            lines.append(f"  decided   {told}")
        if self.skipped_updates:
            lines.append(f"  updates   {self.skipped_updates:,} skipped by decisions")
        if self.unanswered or self.unjudged_steps:
            lines.append(f"  Tamiyo    {self._unjudged()}")
        lines.append(f"  telemetry {self._telemetry()}")
        if self.unsent:
            lines.append(f"  unsent    esper-otel resend {' '.join(self.unsent)}")
        if self.recordings:
            lines.append(f"  recorded  {' '.join(self.recordings)}")
        return "\n".join(lines)

    def _unjudged(self) -> str:
        text = "did not answer"
        if self.unjudged_steps:
            text += f" for {self.unjudged_steps:,} steps"
        if self.unanswered:
            text += f" ({', '.join(self.unanswered)})"
        if self.held_unjudged_steps:
            text += (
                f"; for {self.held_unjudged_steps:,} of them the learning rate stayed scaled "
                "by an earlier decision"
            )
        return text

    def _telemetry(self) -> str:
        told = []
        names = {"metrics": "points", "traces": "spans", "logs": "events"}
        for signal, account in self.telemetry.items():
            if not account["produced"]:
                continue
            text = f"{account['delivered']:,} of {account['produced']:,} {names[signal]} sent"
            if account["refused"]:
                text += f", {account['refused']:,} not wanted there"
            if account["dropped"] > account["refused"]:
                text += f", {account['dropped'] - account['refused']:,} DROPPED"
            told.append(text)
        return "; ".join(told) or "none sent"


def summary_of(run: str, rank: int, tally: Tally, report: StreamReport) -> Summary:
    """The summary of a run that is over."""
    phases = {
        name: took for name, key in PHASES.items() if (took := tally.per_step(key)) is not None
    }
    accounts = {"metrics": report.metrics, "traces": report.traces, "logs": report.logs}
    keep = ("produced", "delivered", "spooled", "dropped", "refused")
    return Summary(
        run=run,
        rank=rank,
        steps=tally.steps,
        seconds=(tally.last_unix_nano - tally.first_unix_nano) / 1e9,
        step_ms=tally.per_step("step_latency_ms"),
        phases=phases,
        slowest=max(phases, key=phases.__getitem__) if phases else None,
        first_loss=tally.first_loss,
        last_loss=tally.last_loss,
        nonfinite_steps=tally.nonfinite_steps,
        skipped_updates=tally.skipped_updates,
        unjudged_steps=tally.unjudged_steps,
        held_unjudged_steps=tally.held_unjudged_steps,
        decisions=[
            Decided(action, reason, times, tally.applied[action, reason])
            for (action, reason), times in tally.decisions.most_common()
        ],
        unanswered=sorted(tally.unanswered),
        telemetry={
            signal: {name: getattr(account, name) for name in keep}
            for signal, account in accounts.items()
        },
        unsent=[str(path) for path in report.files],
        recordings=[str(path) for path in report.recordings],
    )


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"
