"""Packing: runs as the data of a page, small enough to be sent by mail.

The data are one compressed piece: a JSON text, and behind it arrays of numbers. Values are
single floats where these tell them apart (steps and clocks doubles), the bytes of each number
apart from each other, as numbers that are alike then compress well. Exact totals are in the
JSON, of all values, also of those that are thinned out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any

import msgspec
import numpy as np

from esper_otel._version import __version__
from esper_otel.leyline.custom import PREFIX, is_custom, is_evaluation
from esper_otel.leyline.metrics import BY_KEY, CUSTOM
from esper_otel.leyline.stages import Stage
from esper_otel.report.curves import Points, Total, thinned, without_repeats
from esper_otel.report.layouts import Numbers, Times
from esper_otel.report.rulings import Ruling
from esper_otel.report.runs import ShownRun
from esper_otel.report.trainers import CLOCK, TrainerCurves

BYTES = 1_350_000
"""Compressed data of a report at most: as base64 and with the page around it under 2 MB."""

_A_POINT = 4.3
"""Compressed bytes that a point of noise takes: three of its value's four, and its step's."""

_FEWEST_PARTS = 16
_TRIES = 6
_LEVEL = 5

_SEED_SHARE = 4
"""Curves of seeds, other than stage and alpha, get so many times fewer points."""

_TOGETHER = {
    "step_latency_ms": (
        "input_wait_ms",
        "forward_ms",
        "backward_ms",
        "optimizer_ms",
        "kasmina.apply_ms",
        "kasmina.finalize_ms",
        "hook_latency_ms",
    ),
    "loss_ewma": ("loss_volatility",),
}
"""Metrics that are drawn on one another: the others keep the steps of the first as well."""

_FULL = frozenset({"kasmina.seed.stage", "kasmina.seed.alpha"})
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class _Arrays:
    """Arrays of numbers behind each other; one that is there already is not put twice."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.places: list[tuple[str, int, float]] = []
        self._known: dict[tuple[str, bytes, float], int] = {}

    def number_of(self, kind: str, numbers: Any, base: float = 0.0) -> int:
        """The number by which the page finds the array."""
        planes = np.ascontiguousarray(
            np.ascontiguousarray(numbers).view(np.uint8).reshape(len(numbers), -1).T
        ).tobytes()
        key = (kind, planes, base)
        if key not in self._known:
            self._known[key] = len(self.pieces)
            self.pieces.append(planes)
            self.places.append((kind, len(numbers), base))
        return self._known[key]

    def put_steps(self, steps: Any) -> int:
        """Steps, as differences where these are small enough."""
        differences = np.diff(steps, prepend=steps[:1])
        if len(steps) and int(differences.max()) < 1 << 32:
            return self.number_of("delta", differences.astype("<u4"), float(steps[0]))
        return self.put_doubles(steps)

    def put_values(self, values: Numbers) -> int:
        """Values, as single floats where those say the same to seven digits."""
        if _fit(values):
            return self.number_of("single", values.astype("<f4"))
        return self.put_doubles(values)

    def put_doubles(self, values: Numbers) -> int:
        """Values, as doubles."""
        return self.number_of("double", values.astype("<f8"))


def _fit(values: Numbers) -> bool:
    """Whether single floats tell values apart well enough."""
    found = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(found):
        return True
    if found.max() > _LARGEST or found.min() < _SMALLEST:
        return False
    return bool(found.max() < 1 << 24 or (found != np.floor(found)).any())


Rules = Mapping[str, tuple[str, str]]
"""Rule → its condition in words, and its text."""


def packed(
    runs: Sequence[ShownRun],
    rules: Rules,
    problems: Sequence[str],
    most: int = BYTES,
    also: Mapping[str, Any] | None = None,
) -> bytes:
    """The data of a page, compressed, in at most ``most`` bytes as far as thinning helps.

    ``also`` is plain data of whoever serves the page, beside the rest.
    """
    curves = [
        (key, curve.points(), seed is not None and key not in _FULL)
        for run in runs
        for rank in run.ranks
        for (seed, key), curve in rank.curves.items()
    ]
    sizes = [
        (len(without_repeats(points).steps), _SEED_SHARE if shared else 1)
        for _, points, shared in curves
    ]
    parts = _parts(sizes, int(most / _A_POINT))
    for _ in range(_TRIES):
        data = zlib.compress(_content(runs, rules, problems, parts, also or {}), _LEVEL)
        if len(data) <= most or parts <= _FEWEST_PARTS:
            break
        parts = max(int(parts * 0.92 * most / len(data)), _FEWEST_PARTS)
    return data


def _parts(sizes: Sequence[tuple[int, int]], points: int) -> int:
    """Into how many parts curves can be divided with that many ``points`` of all of them."""
    low, high = _FEWEST_PARTS, max((size for size, _ in sizes), default=_FEWEST_PARTS)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, 2 * middle // share) for size, share in sizes) <= points:
            low = middle
        else:
            high = middle - 1
    return max(low, _FEWEST_PARTS)


def _content(
    runs: Sequence[ShownRun],
    rules: Rules,
    problems: Sequence[str],
    parts: int,
    also: Mapping[str, Any],
) -> bytes:
    arrays = _Arrays()
    told = {
        **also,
        "release": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "problems": list(problems),
        "rules": dict(rules),
        "stages": [stage.name for stage in Stage],
        "metrics": {
            **{
                key: {"unit": metric.unit, "meaning": metric.meaning}
                for key, metric in BY_KEY.items()
            },
            **_custom_metrics(runs),
        },
        "runs": [_run(run, arrays, parts) for run in runs],
        "arrays": arrays.places,
    }
    text = msgspec.json.encode(told)
    return b"".join((len(text).to_bytes(4, "little"), text, *arrays.pieces))


def _custom_metrics(runs: Sequence[ShownRun]) -> dict[str, dict[str, Any]]:
    """What is known of the custom values of ``runs``, by key."""
    found: dict[str, dict[str, Any]] = {}
    for rank in (rank for run in runs for rank in run.ranks):
        for seed, key in rank.curves:
            if seed is None and is_custom(key):
                name = key.removeprefix(PREFIX)
                evaluation = key in rank.evaluations or is_evaluation(name)
                found[key] = {"unit": "", "meaning": CUSTOM.meaning, "evaluation": evaluation}
    return found


def _run(run: ShownRun, arrays: _Arrays, parts: int) -> dict[str, Any]:
    templates: list[dict[str, Any]] = []
    decisions = list(_decisions(run.rulings, templates))
    return {
        "name": run.name,
        "title": run.title,
        "settings": run.settings,
        "ranks": [_rank(rank, arrays, parts) for rank in run.ranks],
        "templates": templates,
        "decisions": decisions,
        "aftermaths": {
            str(place): ruling.aftermath
            for place, ruling in enumerate(run.rulings)
            if ruling.aftermath is not None
        },
        "happenings": [
            [each.step, each.rank, each.name, each.severity, each.text, each.seed_id]
            for each in run.happenings
        ],
        "rules": [
            [each.rank, each.rule, each.seed_id, each.state, each.start, each.end]
            for each in run.rules
        ],
    }


def _rank(rank: TrainerCurves, arrays: _Arrays, parts: int) -> dict[str, Any]:
    count, first, last = rank.steps()
    start, end = rank.span()
    curves: dict[str, Any] = {}
    seeds: dict[str, dict[str, Any]] = {}
    also = dict(_steps_to_keep(rank, parts))
    for (seed, key), curve in rank.curves.items():
        shared = seed is not None and key not in _FULL
        some = max(parts // _SEED_SHARE, 2) if shared else parts
        whole = without_repeats(curve.points())
        points = thinned(whole, some)
        if seed is None and key in also:
            points = _with(points, curve.points(), also[key])
        if key == CLOCK:
            points = Points(points.steps, (points.values - start) / 1e9)
            whole = points
        put_values = arrays.put_doubles if key == CLOCK else arrays.put_values
        told = {
            "steps": arrays.put_steps(points.steps),
            "values": put_values(points.values),
            "thinned": curve.thinned or len(points.steps) < len(whole.steps),
            "total": _total(curve.total),
        }
        if seed is None:
            curves[key] = told
        else:
            seeds.setdefault(seed, {})[key] = told
    return {
        "rank": rank.source.rank,
        "instance": rank.source.instance,
        "count": count,
        "first": first,
        "last": last,
        "start_ms": start / 1e6,
        "seconds": (end - start) / 1e9,
        "ended": rank.ended,
        "curves": curves,
        "seeds": seeds,
    }


def _steps_to_keep(rank: TrainerCurves, parts: int) -> Iterator[tuple[str, Times]]:
    """Steps that a metric keeps because another one is drawn there."""
    for first, others in _TOGETHER.items():
        if (None, first) in rank.curves:
            steps = thinned(without_repeats(rank.curves[None, first].points()), parts).steps
            yield from ((key, steps) for key in others)


def _with(some: Points, every: Points, steps: Times) -> Points:
    """``some`` of the points, and those of ``every`` that are at ``steps``."""
    keep = np.isin(every.steps, steps) | np.isin(every.steps, some.steps)
    return Points(every.steps[keep], every.values[keep])


def _total(total: Total) -> list[float] | None:
    """Count, sum, least, its step, greatest, its step, first, last; None without a value."""
    if not total.count:
        return None
    found = [
        total.count,
        total.sum,
        total.least,
        total.least_step,
        total.greatest,
        total.greatest_step,
        total.first,
        total.last,
    ]
    return found if all(map(isfinite, found)) else None


def _decisions(
    rulings: Sequence[Ruling], templates: list[dict[str, Any]]
) -> Iterator[list[float | None]]:
    """Each ruling as numbers behind the number of its template, which has all that is said
    in words and is the same for many."""
    known: dict[bytes, int] = {}
    for ruling in rulings:
        template = {
            "action": ruling.action,
            "severity": ruling.severity,
            "reason": ruling.reason,
            "update": ruling.of_update,
            "mode": ruling.mode,
            "conservative": ruling.conservative,
            "seed": ruling.target_seed,
            "operation": ruling.seed_operation,
            "table": ruling.table_version,
            "parameters": list(ruling.parameters),
            "findings": [
                {
                    "rule": ground.rule,
                    "action": ground.action,
                    "severity": ground.severity,
                    "text": ground.text,
                    "seed": ground.seed_id,
                    "keys": list(ground.values),
                }
                for ground in ruling.findings
            ],
        }
        encoded = msgspec.json.encode(template)
        if encoded not in known:
            known[encoded] = len(templates)
            templates.append(template)
        yield [
            known[encoded],
            ruling.step,
            ruling.rank,
            None if ruling.applied is None else float(ruling.applied),
            *ruling.parameters.values(),
            *(value for ground in ruling.findings for value in ground.values.values()),
        ]
