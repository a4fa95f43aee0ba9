"""The shape of the two packages: few modules, no circles, words that mean one thing."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "src" / "esper_otel", ROOT / "sidecar" / "esper_tamiyo")

MOST_MODULES = 281
LONGEST_MODULE = 400
MOST_CLASSES_OF_A_VERB = 3

PROTOCOL_VERBS = {
    # Of Python's files, threads, sockets and containers, and of torch's modules.
    "add",
    "clear",
    "close",
    "flush",
    "forward",
    "load_state_dict",
    "read",
    "send",
    "start",
    "state_dict",
    "stop",
    "update",
    "wait",
    "write",
}
"""Methods whose name everybody knows; any class may have them."""


@cache
def trees():
    """Module → its syntax tree."""
    found = {}
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            parts = [package.name, *path.relative_to(package).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def classes():
    """(module, class) of every class."""
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield module, node


def imported(body):
    """Modules that are imported when a module is: not within functions, nor for types only."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for inner in ("body", "orelse", "finalbody", "handlers"):
            yield from imported(getattr(node, inner, []))


def circles():
    """Sets of modules each of which imports, by way of others, all of the set (Tarjan 1972)."""
    modules = trees()
    edges = {
        name: {other for other in imported(tree.body) if other in modules and other != name}
        for name, tree in modules.items()
    }
    order, lowest, stack, found = {}, {}, [], []

    def visit(name):
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in edges[name]:
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            place = stack.index(name)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for name in modules:
        if name not in order:
            visit(name)
    return found


def methods(node):
    """Public methods of a class that do something: neither properties nor constructors."""
    silent = {"property", "setter", "classmethod", "staticmethod", "cached_property"}
    return {
        each.name
        for each in node.body
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        and not each.name.startswith("_")
        and not silent & {getattr(d, "id", getattr(d, "attr", "")) for d in each.decorator_list}
    }


def is_protocol(node):
    return any(getattr(base, "id", "") == "Protocol" for base in node.bases)


def meanings():
    """Verb → who gives it a meaning: a protocol counts once with all that implement it."""
    every = [(module, node, methods(node)) for module, node in classes()]
    protocols = [
        (f"{module}.{node.name}", verbs)
        for module, node, verbs in every
        if is_protocol(node) and verbs
    ]
    bases = {node.name: node for _, node, _ in every}
    found = defaultdict(set)
    for module, node, verbs in every:
        for verb in verbs:
            whose = next(
                (name for name, wanted in protocols if verb in wanted and wanted <= verbs),
                None,
            )
            if whose is None:  # of the class that it extends, if that has the verb
                whose = f"{module}.{node.name}"
                for base in node.bases:
                    parent = bases.get(getattr(base, "id", ""))
                    if parent is not None and verb in methods(parent):
                        whose = f"base {parent.name}"
                        found[verb].discard(f"{module}.{parent.name}")
            found[verb].add(whose)
    return found


def test_there_are_few_enough_modules():
    assert len(trees()) <= MOST_MODULES


def test_no_modules_import_each_other_in_a_circle():
    assert circles() == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_module_is_too_long(package):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in package.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST_MODULE
    }
    assert long == {}, "ask of each what two things it is"


def test_no_two_classes_have_one_name():
    where = defaultdict(list)
    for module, node in classes():
        where[node.name].append(module)
    # Each framework's users know its callback by this name.
    where.pop("EsperCallback")
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


def test_a_verb_means_one_thing():
    crowded = {
        verb: sorted(whose)
        for verb, whose in meanings().items()
        if len(whose) > MOST_CLASSES_OF_A_VERB and verb not in PROTOCOL_VERBS
    }
    assert crowded == {}
