"""Figures: what a bench measured, against what, and whether that is good enough.

A bench is a module with a function that returns its figures and ends with
``run(that_function)``: it prints a table, and with ``--json PATH`` writes the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

_T = TypeVar("_T")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number.

    ``ratio`` is value over baseline, both in ``unit``. ``bar`` bounds the ratio, or the
    value where there is no baseline; ``holds`` is None for what is only reported.
    """

    bench: str
    figure: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    bar: float | None = None
    holds: bool | None = None

    @classmethod
    def at_most(
        cls,
        bench: str,
        figure: str,
        value: float,
        unit: str,
        baseline: float | None = None,
        *,
        bar: float,
    ) -> Figure:
        """A figure that must not exceed ``bar``: less is better."""
        ratio = _ratio(value, baseline)
        holds = (value if ratio is None else ratio) <= bar
        return cls(
            bench=bench,
            figure=figure,
            value=value,
            unit=unit,
            baseline=baseline,
            ratio=ratio,
            bar=bar,
            holds=holds,
        )

    @classmethod
    def report(
        cls, bench: str, figure: str, value: float, unit: str, baseline: float | None = None
    ) -> Figure:
        """A figure without a bar."""
        return cls(
            bench=bench,
            figure=figure,
            value=value,
            unit=unit,
            baseline=baseline,
            ratio=_ratio(value, baseline),
        )


def alternate(
    a: Callable[[], _T], b: Callable[[], _T], blocks: int
) -> tuple[list[_T], list[_T]]:
    """What ``a`` and ``b`` return, ``blocks`` times each, in turn.

    The machine's speed drifts by tens of percent within seconds: short blocks in turn put
    the drift into both. The order changes with every pair, so that neither always comes
    first.
    """
    of_a: list[_T] = []
    of_b: list[_T] = []
    for block in range(blocks):
        for call, results in ((a, of_a), (b, of_b))[:: -1 if block % 2 else 1]:
            results.append(call())
    return of_a, of_b


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of ``values`` do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -int(-len(ordered) * percent // 100)
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def median(values: Sequence[float]) -> float:
    """The middle of ``values``."""
    return percentile(values, 50)


def table(figures: Sequence[Figure]) -> str:
    """The figures for people, one a line."""
    heads = ("figure", "value", "baseline", "ratio", "bar", "")
    rows = [heads] + [
        (
            figure.figure,
            f"{figure.value:,.4g} {figure.unit}",
            "" if figure.baseline is None else f"{figure.baseline:,.4g} {figure.unit}",
            "" if figure.ratio is None else f"{figure.ratio:.3g}",
            "" if figure.bar is None else f"≤ {figure.bar:.3g}",
            {True: "holds", False: "DOES NOT HOLD", None: ""}[figure.holds],
        )
        for figure in figures
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if nth in (0, 5) else cell.rjust(width)
            for nth, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def run(figures: Callable[[], list[Figure]], argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the rows where ``--json`` says; 0."""
    parser = argparse.ArgumentParser(description=sys.modules[figures.__module__].__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows here")
    arguments = parser.parse_args(argv)
    measured = figures()
    print(table(measured))
    if arguments.json is not None:
        encoded = msgspec.json.format(msgspec.json.encode(measured), indent=1)
        arguments.json.write_bytes(encoded + b"\n")
    return 0


def _ratio(value: float, baseline: float | None) -> float | None:
    return value / baseline if baseline else None
