"""Events: single occurrences of a seed or the weights, beside the per-step metrics."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.leyline.decisions import Severity

STAGE_CHANGED = "esper.seed.stage"
"""A slot went from one stage to the next."""

GATE = "esper.seed.gate"
"""A gate was passed, or failed for a reason it had not failed for just before."""

CULLED = "esper.seed.cull"
FALLBACK = "esper.seed.fallback"
"""The seed's kernel could not be used; identity took its place."""

RETRIED = "esper.seed.retry"
"""The seed's kernel missed its budget, as it may on a busy machine; it is fetched once
more. ``esper.attempts`` counts the fetches, here and in a fallback."""

VIOLATION = "esper.seed.violation"
"""An isolated seed reached the host's gradients."""

PAUSED = "esper.seed.paused"
RESUMED = "esper.seed.resumed"

PROPOSED = "esper.seed.proposed"
"""The garden proposes something else than before: ``esper.operation`` of ``esper.seed.id``
in ``esper.slot`` (to germinate: of ``esper.blueprint``), or ``none``, when what it proposed
is withdrawn or done.

The one with ``esper.step`` S says what went with the ask about step S, and with all asks
about later steps until the next such event of this process (``service.instance.id``);
before the first, nothing went with any. Where nobody is asked it is the step's own."""

NO_OPERATION = "none"
"""Operation of a :data:`PROPOSED` that proposes nothing."""

COMPILED = "esper.seed.compiled"
"""A seed is called compiled from now on, or could not be compiled and why."""

REFUSED = "esper.seed.refused"
"""An operation that a decision or the user asked for, and that cannot be done."""

FAULT = "esper.seed.fault"
"""Something of a seed raised; the run went on without it."""

UNUSED_SLOT = "esper.slot.unused"
"""The module of a slot takes no part in the step, so nothing can grow there."""

RESTORED = "esper.weights.restored"
"""Weights and optimizer state of ``esper.snapshot.step`` were put back at the end of
``esper.step``."""

RESTORE_REFUSED = "esper.weights.restore_refused"
"""A decision about ``esper.step`` asked for that, and it is not done."""

CONFIGURED = "esper.run.config"
"""The hyper-parameters of the run, all that are known: attributes whose names begin with
:data:`CONFIG_ATTRIBUTE`."""

CONFIG_ATTRIBUTE = "esper.config."
SEED_ID_ATTRIBUTE = "esper.seed.id"

Attribute = str | float | int | bool


class Event(NamedTuple):
    """One thing that happened.

    ``mark`` is when, in nanoseconds of ``perf_counter_ns`` until the recorder turns it
    into Unix time. ``text`` is for people.
    """

    name: str
    mark: int
    severity: Severity
    text: str
    attributes: dict[str, Attribute]
