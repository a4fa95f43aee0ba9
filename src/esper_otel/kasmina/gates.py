"""Gates G0 to G5: may this seed go on? Functions of (facts, limits), and nothing else.

A gate gives :data:`PASSED` or a :class:`GateFailed` with its reason in words. What is not
known does not pass: unknown is not healthy.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, nan
from typing import NamedTuple

from esper_otel.leyline.decisions import SeedOperation


class GatePassed(NamedTuple):
    """The gate is open."""


class GateFailed(NamedTuple):
    """The gate is shut, and why; ``detail`` has the numbers, which change at every step."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


Verdict = GatePassed | GateFailed
PASSED = GatePassed()


class Facts(NamedTuple):
    """What is known of a seed when it stands before a gate; NaN is unknown.

    ``attached``: its kernel is there. ``trouble``: why it could not be used, empty when it
    could. ``fits``: its output has the shape of its input. Norms are L2 of all gradients
    of the seed and of the host, losses the weighted mean now and when blending began,
    latencies ms of the seed's kernel, and of a step now and before the seed germinated.
    ``remnants``: what of a culled seed is still held.
    """

    attached: bool = False
    trouble: str = ""
    finite: bool = False
    fits: bool = False
    seed_norm: float = nan
    host_norm: float = nan
    kernel_ms: float = nan
    loss: float = nan
    loss_before: float = nan
    step_ms: float = nan
    step_ms_before: float = nan
    remnants: int = 0


class Limits(NamedTuple):
    """How much is too much.

    ``gradient_ratio`` bounds the seed's gradient norm over the host's from both sides.
    ``kernel_ms`` is the budget of one call. ``loss_rise`` and ``step_rise`` are the share
    by which loss and step latency may rise; ``loss_fall`` the share by which the loss must
    have fallen for a seed to stay for good.
    """

    gradient_ratio: float = 1e4
    kernel_ms: float = 10.0
    loss_rise: float = 0.25
    loss_fall: float = 0.0
    step_rise: float = 3.0


Gate = Callable[[Facts, Limits], Verdict]


def sanity(facts: Facts, limits: Limits) -> Verdict:
    """G0: the blueprint gave a module, and its parameters are finite."""
    if facts.trouble:
        return GateFailed(facts.trouble)
    if not facts.attached:
        return GateFailed("the kernel is not available yet")
    return PASSED if facts.finite else GateFailed("its parameters are not all finite")


def gradient_health(facts: Facts, limits: Limits) -> Verdict:
    """G1: gradients reach the seed, and are neither nothing nor overwhelming."""
    norm, host = facts.seed_norm, facts.host_norm
    if norm != norm:
        return GateFailed("its gradient norm is not known")
    if not isfinite(norm):
        return GateFailed("its gradient is not finite")
    if norm == 0.0:
        return GateFailed("no gradient reaches it")
    if not host > 0.0:
        return PASSED  # nothing to hold it against
    ratio = norm / host
    if ratio > limits.gradient_ratio:
        return GateFailed("its gradient explodes", f"{ratio:.3g} times the host's")
    if ratio * limits.gradient_ratio < 1.0:
        return GateFailed("its gradient vanishes", f"{ratio:.3g} times the host's")
    return PASSED


def stability(facts: Facts, limits: Limits) -> Verdict:
    """G2: a call of the kernel stays within its budget."""
    if facts.trouble:
        return GateFailed(facts.trouble)
    if facts.kernel_ms != facts.kernel_ms:
        return GateFailed("its kernel has not been called yet")
    if facts.kernel_ms > limits.kernel_ms:
        took = f"{facts.kernel_ms:.3g} ms of {limits.kernel_ms:g} ms"
        return GateFailed("its kernel exceeds its budget", took)
    return PASSED


def interface(facts: Facts, limits: Limits) -> Verdict:
    """G3: what comes out has the shape of what goes in."""
    return PASSED if facts.fits else GateFailed("its output does not fit the slot")


def loss_impact(facts: Facts, limits: Limits) -> Verdict:
    """The loss has not become worse than it may since the seed began to join."""
    if facts.loss_before != facts.loss_before:
        return PASSED  # it has not, or nobody knows what the loss was
    if facts.loss != facts.loss:
        return GateFailed("the loss is not known")
    if facts.loss > _raised(facts.loss_before, limits.loss_rise):
        return GateFailed("the loss rose", f"{facts.loss_before:.4g}, now {facts.loss:.4g}")
    return PASSED


def system_impact(facts: Facts, limits: Limits) -> Verdict:
    """G4: neither the loss nor the step has become worse than it may."""
    # A latency that is not known, as when enriched metrics are off, is no objection.
    if facts.step_ms > facts.step_ms_before * (1.0 + limits.step_rise):
        took = f"{facts.step_ms_before:.3g} ms, now {facts.step_ms:.3g} ms"
        return GateFailed("steps take too long", took)
    return loss_impact(facts, limits)


def usefulness(facts: Facts, limits: Limits) -> Verdict:
    """G4 again, before a seed stays for good: the loss has fallen since it joined."""
    verdict = system_impact(facts, limits)
    if isinstance(verdict, GateFailed):
        return verdict
    if facts.loss_before != facts.loss_before:
        return GateFailed("the loss before it joined is not known")
    if facts.loss > _raised(facts.loss_before, -limits.loss_fall):
        change = f"loss {facts.loss_before:.4g}, now {facts.loss:.4g}"
        return GateFailed("it does not help", change)
    return PASSED


def clean_reset(facts: Facts, limits: Limits) -> Verdict:
    """G5: nothing of the culled seed is left."""
    return PASSED if not facts.remnants else GateFailed("the culled seed is still referenced")


BEFORE: dict[SeedOperation, tuple[tuple[str, Gate], ...]] = {
    SeedOperation.TRAIN: (("G0", sanity), ("G3", interface)),
    SeedOperation.BLEND: (
        ("G1", gradient_health),
        ("G2", stability),
        ("G3", interface),
        ("G4", system_impact),
    ),
    SeedOperation.SHADOW: (("G2", stability), ("G4", system_impact)),
    SeedOperation.PROBATE: (("G2", stability), ("G4", system_impact)),
    SeedOperation.FOSSILIZE: (("G2", stability), ("G4", usefulness)),
}
"""Gates that stand before an operation, by the name that events give them."""


def _raised(loss: float, share: float) -> float:
    """``loss`` made worse by ``share`` of its size, whichever sign it has."""
    return loss + share * abs(loss)
