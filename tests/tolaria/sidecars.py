"""Sidecars of the recorder's tests: what a client would be, without a socket."""

from __future__ import annotations

from msgspec.structs import replace

from esper_otel.leyline.decisions import Action, Decision, Severity, unanswered
from esper_otel.leyline.frames import present
from esper_otel.leyline.metrics import STEP_KEYS


def decided(step, action=Action.OPTIMIZER, reason="a_rule", **parameters):
    """A decision of the sidecar about ``step``."""
    return Decision(
        f"d/{step}", "r", step, step, action, Severity.HIGH, reason, parameters=parameters
    )


class Sidecar:
    """Answers every request with ``decision`` when it is collected, about whichever step.

    Without one it is what ``decisions`` has by step, or nominal. Sending takes ``sends_ms``,
    collecting ``takes_ms`` and checking ``checks_ms`` of ``clock``.
    """

    guards = None
    update = None
    """What checks are answered, or what makes an answer of a step and its values."""

    def __init__(self, clock, takes_ms=0.0, decision=None, sends_ms=0.0, checks_ms=0.0):
        self.clock, self.takes_ms, self.sends_ms = clock, takes_ms, sends_ms
        self.checks_ms = checks_ms
        self.decision, self.decisions = decision, {}
        self.asked, self.proposed, self.checked = [], [], []
        self.under_way = None
        self.lost = 0
        """Requests whose answer was not collected before the next was sent."""

    def send(self, step, time_unix_nano, row, seeds=(), proposal=None):
        self.clock.pass_ms(self.sends_ms)
        self.asked.append((step, time_unix_nano, present(STEP_KEYS, row)))
        self.proposed.append((step, [seed_id for seed_id, _ in seeds], proposal))
        self.lost += self.under_way is not None
        self.under_way = step

    def collect(self):
        step, self.under_way = self.under_way, None
        if step is None:
            return None
        self.clock.pass_ms(self.takes_ms)
        return self.answer_about(step)

    def answer_about(self, step):
        if self.decision is not None:
            return replace(self.decision, step=step)
        return self.decisions.get(step) or unanswered("r", step, "nominal")

    def check(self, step, time_unix_nano, row, waited_ns=0):
        assert self.under_way is None, "what was asked before has not been collected"
        self.clock.pass_ms(self.checks_ms)
        values = present(STEP_KEYS, row)
        self.checked.append((step, values))
        answer = self.update(step, values) if callable(self.update) else self.update
        return answer or unanswered("r", step, "nominal")
