"""Cycles: rules that inhibit each other in a circle, so that none is ever reported.

By strongly connected components, in time and memory of the order of rules and of what they
inhibit: R. Tarjan, "Depth-first search and linear graph algorithms", SIAM Journal on Computing
1 (1972), 146-160. Without recursion, as chains may be long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping


def cycles(inhibited: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """One cycle for each group of rules that inhibit one another, directly or by others.

    ``inhibited`` are the ids that each rule inhibits, all of them keys. Each rule of a cycle
    inhibits the next of the list, the last one the first. It is the shortest one by way of the
    group's first rule: where a group has others, they are found once that is gone.
    """
    place = {rule: number for number, rule in enumerate(inhibited)}
    for group in components(inhibited):
        first = min(group, key=place.__getitem__)
        if len(group) > 1 or first in inhibited[first]:
            yield _way_round(first, set(group), inhibited)


def components(edges: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """The strongly connected components: each node with all that reach it and are reached."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    stacked: set[str] = set()
    for root in edges:
        path = [] if root in order else [root]
        rest: dict[str, Iterator[str]] = {}
        while path:
            node = path[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                stack.append(node)
                stacked.add(node)
                rest[node] = iter(edges[node])
            for other in rest[node]:
                if other not in order:
                    path.append(other)
                    break
                if other in stacked:
                    lowest[node] = min(lowest[node], order[other])
            else:
                path.pop()
                del rest[node]
                if path:
                    lowest[path[-1]] = min(lowest[path[-1]], lowest[node])
                if lowest[node] == order[node]:
                    component: list[str] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                    stacked.difference_update(component)
                    yield component


def _way_round(
    first: str, group: set[str], inhibited: Mapping[str, Collection[str]]
) -> list[str]:
    """The shortest way from ``first`` back to it, by breadth-first search within ``group``."""
    before: dict[str, str] = {}
    waiting = deque([first])
    while waiting:
        rule = waiting.popleft()
        for name in inhibited[rule]:
            if name == first:
                way = [rule]
                while way[-1] != first:
                    way.append(before[way[-1]])
                return way[::-1]
            if name in group and name not in before:
                before[name] = rule
                waiting.append(name)
    raise AssertionError(f"no way from {first} back to it within its component")
