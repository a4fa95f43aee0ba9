"""Fuzzing: what a target is, and how long it is tried.

In ``make test`` each target gets a fixed number of examples, the same ones every time. With
``FUZZ_MINUTES`` in the environment (``make fuzz``) it gets new ones for so long, from a seed
that is printed. Seeds that failed are kept in ``.hypothesis/fuzz`` and come first the next
time, as hypothesis keeps no examples of tests whose seed is given.
"""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

Check = Callable[[Any], None]

AT_ONCE = 100
"""Examples between two looks at the clock."""

KEPT = Path(".hypothesis") / "fuzz"

_ALL = settings(
    deadline=None,
    derandomize=False,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    report_multiple_bugs=False,
)

_AS_MADE = (Phase.explicit, Phase.generate)
"""What fails is told as it is: a smaller example would take many attempts, each of which may
wait for a sidecar."""


class Target(NamedTuple):
    """What is tried: ``opened`` gives the check of one example, and may check at its end."""

    name: str
    opened: Callable[[Path], AbstractContextManager[Check]]
    examples: st.SearchStrategy[Any]
    runs: int
    """Examples in ``make test``."""

    def try_some(self, folder: Path) -> None:
        """The examples of ``make test``."""
        with self.opened(folder) as check:
            chosen = settings(
                _ALL, max_examples=self.runs, derandomize=True, database=None, phases=_AS_MADE
            )
            _tried(check, self.examples, chosen)

    def try_for(self, folder: Path, minutes: float) -> int:
        """New examples for so long; returns how many there were."""
        failed = KEPT / self.name
        kept = [int(each) for each in failed.read_text().split()] if failed.exists() else []
        start = secrets.randbits(64)
        print(f"\n{self.name}: seed {start}", flush=True)
        count = 0
        end = time.monotonic() + minutes * 60
        chosen = settings(_ALL, max_examples=AT_ONCE, database=None, phases=_AS_MADE)
        with self.opened(folder) as check:

            def counted(example: object) -> None:
                nonlocal count
                count += 1
                check(example)

            for one in chain(kept, range(start, 1 << 65)):
                try:
                    _tried(counted, self.examples, chosen, one)
                except Exception:
                    KEPT.mkdir(parents=True, exist_ok=True)
                    failed.write_text("\n".join(map(str, {*kept, one})) + "\n")
                    raise
                if time.monotonic() > end:
                    break
        print(f"{self.name}: {count:,} executions in {minutes:g} min, none failed", flush=True)
        return count


def _tried(
    check: Check, examples: st.SearchStrategy[Any], chosen: settings, start: int | None = None
) -> None:
    @chosen
    @given(examples)
    def fuzz(example: object) -> None:
        check(example)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # of examples that are long
        (fuzz if start is None else seed(start)(fuzz))()


def minutes() -> float:
    """How long each target is to be tried, 0 for the examples of ``make test``."""
    return float(os.environ.get("FUZZ_MINUTES") or 0)


def wanted(names: list[str]) -> list[str]:
    """The targets that ``FUZZ_TARGET`` names, all of them where it names none."""
    chosen = os.environ.get("FUZZ_TARGET", "").replace(",", " ").split()
    unknown = set(chosen) - set(names)
    if unknown:
        raise ValueError(f"FUZZ_TARGET: {sorted(unknown)} are none of {names}")
    return chosen or names
