"""How all ranks are doing: counted over every one, and told of those that matter most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from esper_tamiyo.judging.run_state import RunState
from esper_tamiyo.judging.silence import UNKNOWN_AFTER_STEPS
from esper_tamiyo.judging.witness import RuleState

TOLD_RANKS = 16
"""Ranks told in detail."""

Key = tuple[str, int]
"""A run and a rank."""


def survey(ranks: Iterable[tuple[Key, RunState]], now_ns: int | None) -> dict[str, Any]:
    """As plain data: ``states``, ``rules`` and ``conservative`` are counts over all ranks.

    ``runs`` are some of them in detail: first those that nobody hears of, then those for
    which a rule acts, each in the order of ``ranks``. Without ``now_ns`` nobody is silent.
    """
    states: Counter[str] = Counter()
    rules: Counter[tuple[str, str]] = Counter()
    conservative = 0
    silent: list[tuple[Key, RunState]] = []
    acting: list[tuple[Key, RunState]] = []
    others: list[tuple[Key, RunState]] = []
    for key, state in ranks:
        is_silent = _is_silent(state, now_ns)
        states["unknown" if is_silent else "current"] += 1
        conservative += state.conservative
        for rule in _rules(state, is_silent):
            rules[str(rule["rule"]), str(rule["state"])] += 1
        (silent if is_silent else acting if state.acting else others).append((key, state))
    return {
        "states": {} if now_ns is None else dict(states),
        "rules": [
            {"rule": rule, "state": state, "count": count}
            for (rule, state), count in sorted(rules.items())
        ],
        "conservative": conservative,
        "runs": [
            _detail(key, state, now_ns)
            for key, state in [*silent, *acting, *others][:TOLD_RANKS]
        ],
    }


def _is_silent(state: RunState, now_ns: int | None) -> bool:
    if now_ns is None:
        return False
    silent_ns = now_ns - state.pace.heard_ns
    return state.pace.silent_since(silent_ns, UNKNOWN_AFTER_STEPS) is not None


def _rules(state: RunState, is_silent: bool) -> list[dict[str, str | int]]:
    """The rules that are not at rest.

    Of a silent rank nobody can say how they stand, but for the rule on silence itself.
    """
    rules = state.rules()
    if not is_silent:
        return rules
    about_silence = {entry.rule.id for _, entry in state.book.silence}
    return [
        rule
        if rule["rule"] in about_silence
        else {**rule, "state": RuleState.UNKNOWN.value, "last_state": rule["state"]}
        for rule in rules
    ]


def _detail(key: Key, state: RunState, now_ns: int | None) -> dict[str, Any]:
    is_silent = _is_silent(state, now_ns)
    told: dict[str, Any] = {
        "run": key[0],
        "rank": key[1],
        "instance": state.instance,
        "newest_step": state.newest,
        "time_unix_nano": state.time_unix_nano,
        "action": state.decision.action.value if state.decision else None,
        "reason": state.decision.reason if state.decision else None,
        "conservative": state.conservative,
        "rules": _rules(state, is_silent),
    }
    if now_ns is not None:
        told["state"] = "unknown" if is_silent else "current"
        told["silent_s"] = max(0.0, (now_ns - state.pace.heard_ns) / 1e9)
    return told
