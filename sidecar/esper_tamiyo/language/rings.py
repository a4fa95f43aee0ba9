"""Rings: rules that silence each other all the way round, so that none is ever heard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


def rings(silenced: Mapping[str, Iterable[str]]) -> Iterator[list[str]]:
    """Rings among rules that each silence some others of the mapping, as lists of ids.

    Each rule of a ring silences the next of the list, the last one the first. Where rings
    share a rule at least one of them is found, and the rest once that is gone.
    """
    done: set[str] = set()
    for first in silenced:
        path = {} if first in done else {first: iter(silenced[first])}
        while path:
            rule, rest = next(reversed(path.items()))
            name = next(rest, None)
            if name is None:
                done.add(rule)
                del path[rule]
            elif name in path:
                ids = list(path)
                yield ids[ids.index(name) :]
            elif name not in done:
                path[name] = iter(silenced[name])
