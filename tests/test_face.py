"""The face: what ``import esper_otel`` gives, in one list, with docstrings, and no more."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import esper_otel

TYPES = sorted(
    name for name in esper_otel.__all__ if isinstance(getattr(esper_otel, name), type)
)


def names_for_type_checkers() -> set[str]:
    """What editors know of the face: imported under TYPE_CHECKING, or at once."""
    tree = ast.parse(Path(esper_otel.__file__).read_text())
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("esper_otel")
        for alias in node.names
    }


def test_what_is_listed_is_what_can_be_had_and_what_editors_know() -> None:
    listed = set(esper_otel.__all__)
    lazily = {name for names in esper_otel._HOMES.values() for name in names}
    assert listed == lazily | {"__version__"} == names_for_type_checkers()
    assert listed <= set(dir(esper_otel))


def test_what_is_not_listed_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"'esper_otel' has no attribute 'strat'"):
        esper_otel.strat  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(esper_otel.__all__) - {"__version__"}))
def test_every_name_has_a_docstring(name) -> None:
    assert inspect.getdoc(getattr(esper_otel, name))


@pytest.mark.parametrize("name", TYPES)
def test_every_public_method_has_a_docstring(name) -> None:
    owner = getattr(esper_otel, name)
    bare = [
        member
        for member, value in vars(owner).items()
        if not member.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property))
        and not inspect.getdoc(value)
    ]
    assert bare == []


@pytest.mark.parametrize("name", ["batches", "phase", "report", "plant", "on_pause"])
def test_what_a_loop_calls_has_an_example(name) -> None:
    assert "::\n" in inspect.getdoc(getattr(esper_otel.Run, name))


def test_looking_at_the_list_loads_nothing() -> None:
    code = "import sys, esper_otel; dir(esper_otel); print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
