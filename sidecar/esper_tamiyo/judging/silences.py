"""Silences: rules that a user suppressed for one run while it trains.

A silenced rule is judged and its states are told. It neither acts nor is among the findings,
inhibits no other rule and makes no step unclean, for all ranks of the run. It is known by its
id: another table that has the rule does not end the silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from esper_otel.leyline.frames import MAX_STEP
from esper_otel.leyline.wire import SilenceRequest
from esper_tamiyo.judging.rules import CompiledRule

SILENCED = "tamiyo silence"
"""Stands for who inhibits a silenced rule, where that is told; no id of a rule has a blank."""

MAX_TOLD = 64
"""Silences that an overview tells of, and names that a refusal does."""

_NOBODY: frozenset[str] = frozenset()


class SilenceError(ValueError):
    """No such run or rule, or nothing to undo; the text names what there is."""


class SilenceOrder(NamedTuple):
    """What was asked for and done: ``rule`` is silenced, or heard again (``undone``).

    ``after_step`` is the newest step of the run then. ``until_step`` is the last step for
    which it is silenced, None when that is the run's last.
    """

    run: str
    rule: str
    after_step: int
    until_step: int | None
    undone: bool

    @property
    def told(self) -> str:
        """What was done, in words."""
        if self.undone:
            return "is heard again"
        until = "the run ends" if self.until_step is None else f"step {self.until_step}"
        return f"is silenced until {until}"


class SilencedRules:
    """The rules that are silenced for one run, shared by its ranks."""

    __slots__ = ("_until", "used")

    def __init__(self) -> None:
        self._until: dict[str, int | None] = {}
        self.used = False
        """Whether there has ever been one."""

    def at(self, step: int) -> frozenset[str]:
        """Those that are silenced at ``step``."""
        if not self._until:
            return _NOBODY
        return frozenset(
            rule for rule, until in self._until.items() if until is None or step <= until
        )

    def carry_out(self, order: SilenceOrder) -> None:
        """Do what was asked for."""
        self.used = True
        if order.undone:
            del self._until[order.rule]
        else:
            self._until[order.rule] = order.until_step

    def clear(self) -> None:
        """All of them end."""
        self._until.clear()

    def lasting(self, newest: int) -> dict[str, int | None]:
        """Those that last beyond step ``newest``, and until when."""
        return {
            rule: until
            for rule, until in self._until.items()
            if until is None or newest < until
        }


class Silences:
    """The silences of all runs."""

    def __init__(self) -> None:
        self._runs: dict[str, SilencedRules] = {}
        self.used = False
        """Whether there has ever been one."""
        self.orders = 0
        """How many were carried out."""

    def of_run(self, run: str) -> SilencedRules:
        """Those of one run."""
        return self._runs.setdefault(run, SilencedRules())

    def forget_run(self, run: str) -> None:
        """Nothing is known of that run any more."""
        self._runs.pop(run, None)

    def end_run(self, run: str) -> None:
        """The run is over, and with it its silences."""
        if run in self._runs:
            self._runs[run].clear()

    def order(
        self, request: SilenceRequest, newest: Mapping[str, int], rules: Collection[str]
    ) -> SilenceOrder:
        """Do what is asked for; raises :class:`SilenceError`.

        ``newest`` has the newest step of every run, ``rules`` are the ids of the table.
        """
        run, rule = request.run, request.rule
        if run not in newest:
            raise SilenceError(f"run {run} is not known; {_known('run', run, newest)}")
        silenced = self.of_run(run)
        lasting = silenced.lasting(newest[run])
        if request.undo and rule not in lasting:
            there = ", ".join(lasting) or "none"
            raise SilenceError(f"{rule} is not silenced for run {run}; silenced: {there}")
        if not request.undo and rule not in rules:
            raise SilenceError(f"no rule is called {rule}; {_known('rule', rule, rules)}")
        if request.steps is not None and not 1 <= request.steps <= MAX_STEP:
            raise SilenceError(f"expected at least one step, got {request.steps}")
        until = None if request.steps is None else newest[run] + request.steps
        self.used = True
        self.orders += 1
        order = SilenceOrder(run, rule, newest[run], until, request.undo)
        silenced.carry_out(order)
        return order

    def overview(self, newest: Mapping[str, int]) -> list[dict[str, Any]]:
        """Those that last, as plain data; ``newest`` as for :meth:`order`."""
        lasting = [
            {"run": run, "rule": rule, "until_step": until}
            for run, silenced in self._runs.items()
            if silenced.used
            for rule, until in silenced.lasting(newest.get(run, -1)).items()
        ]
        return lasting[:MAX_TOLD]


def unheard(
    active: Iterable[tuple[CompiledRule, object, object]], silenced: Collection[str]
) -> dict[str, str]:
    """Rules that do not count beside those that are ``active``, and who inhibits each.

    Of several it is the first of ``active``; a silenced rule inhibits nobody.
    """
    by: dict[str, str] = {}
    for entry, _, _ in active:
        if entry.acts and entry.rule.id not in silenced:
            for name in entry.rule.inhibits:
                by.setdefault(name, entry.rule.id)
    return {**by, **dict.fromkeys(silenced, SILENCED)}


def _known(what: str, wanted: str, names: Collection[str]) -> str:
    """What there is in place of what is not there."""
    close = get_close_matches(wanted[:80], names, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    if not names:
        return f"there is no {what} yet"
    told = ", ".join([*names][:MAX_TOLD])
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return f"{meant}{what}s: {told}{more}"
