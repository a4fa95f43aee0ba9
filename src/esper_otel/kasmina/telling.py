"""Telling: what one slot has to say of its seed, as events, and nothing twice in a row."""

from __future__ import annotations

from esper_otel.kasmina.gates import Failed, Verdict
from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.seed import Seed
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Attribute
from esper_otel.leyline.stages import Stage


class Voice:
    """Speaks for the slot called ``slot``; ``seed`` is the one in it, or None."""

    __slots__ = ("_ground", "_slot", "fallback", "faults", "unused")

    def __init__(self, slot: str, ground: Ground) -> None:
        self._slot = slot
        self._ground = ground
        self.unused = False
        """Whether it was told that nothing can grow here."""
        self.fallback = ""
        """The fallback told last, of the seed that is here."""
        self.faults: set[str] = set()
        """What of the seed that is here was told to have raised."""

    def forget_seed(self) -> None:
        """Another seed comes: what was told of the last one is new again."""
        self.fallback = ""
        self.faults = set()

    def tell(
        self,
        seed: Seed | None,
        name: str,
        severity: Severity,
        text: str,
        **attributes: Attribute,
    ) -> None:
        """Note the event ``name``, with slot, seed and blueprint besides ``attributes``."""
        if seed is not None:
            attributes["seed_id"] = seed.id
            attributes["blueprint"] = seed.blueprint
        self._ground.tell(name, severity, text, slot=self._slot, **attributes)

    def moved(self, seed: Seed | None, left: Stage, target: Stage, why: str) -> None:
        """The slot went from one stage to the next."""
        self.tell(
            seed,
            events.STAGE_CHANGED,
            Severity.NORMAL,
            f"{self._who(seed)}: {left.name} to {target.name} ({why})",
            stage=target.name,
            stage_before=left.name,
        )

    def gate(self, seed: Seed, gate: str, verdict: Verdict) -> None:
        """A gate opened, or shut for another reason than before."""
        reason = verdict.reason if isinstance(verdict, Failed) else ""
        if seed.gates.get(gate) == reason:
            return
        seed.gates[gate] = reason
        text, severity = f"{seed.id}: {gate} is open", Severity.NORMAL
        if isinstance(verdict, Failed):
            text, severity = f"{seed.id}: {gate} is shut: {verdict}", Severity.WARNING
        self.tell(
            seed, events.GATE, severity, text, gate=gate, passed=not reason, reason=reason
        )

    def fell_back(self, seed: Seed, reason: str) -> None:
        """Identity took the place of the seed's kernel."""
        if reason == self.fallback:
            return
        self.fallback = reason
        text = f"identity takes the place of {seed.id}: {reason}"
        self.tell(
            seed,
            events.FALLBACK,
            Severity.WARNING,
            text,
            reason=reason,
            attempts=seed.attempts,
        )

    def fault(self, seed: Seed | None, what: str, error: Exception) -> None:
        """Say, once per seed, that something of it raised."""
        if what in self.faults:
            return
        self.faults.add(what)
        text = f"{self._who(seed)}: {what}: {type(error).__name__}: {error}"
        self.tell(seed, events.FAULT, Severity.HIGH, text, reason=repr(error))

    def useless(self, seed: Seed | None, why: str) -> None:
        """Say, once per slot, that nothing can grow here."""
        if not self.unused:
            self.unused = True
            self.tell(seed, events.UNUSED_SLOT, Severity.WARNING, why)

    def _who(self, seed: Seed | None) -> str:
        return self._slot if seed is None else seed.id
