"""``docs/order-of-calls.md`` names what there is: every module, class and method of it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "src" / "esper_otel", ROOT / "sidecar" / "esper_tamiyo")
PAGE = ROOT / "docs" / "order-of-calls.md"
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+)+)`", PAGE.read_text())))


def defined_in(body, name):
    """The body of what ``name`` defines in ``body``, None when it defines no such thing."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return next(
        (node.body for node in body if isinstance(node, kinds) and node.name == name), None
    )


def exists(dotted):
    parts = dotted.split(".")
    for package in PACKAGES:
        for length in range(len(parts), 0, -1):
            path = package.joinpath(*parts[:length]).with_suffix(".py")
            if not path.is_file():
                continue
            body = ast.parse(path.read_text()).body
            for name in parts[length:]:
                body = None if body is None else defined_in(body, name)
            return body is not None
    return False


def test_the_page_names_many():
    assert len(NAMES) > 40


@pytest.mark.parametrize("name", [name for name in NAMES if name != "optimizer.step"])
def test_what_it_names_is_there(name):
    assert exists(name)
