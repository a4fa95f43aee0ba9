"""The page of the Python API: every name of ``esper_otel.__all__``, from its docstring.

Made from source text, so that nothing is imported and no PyTorch is needed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ops.generate.docstrings import markdown, one_line
from ops.generate.files import COMMAND, ROOT

PAGE = Path("docs/api.md")
SOURCES = ROOT / "src"
FACE = SOURCES / "esper_otel" / "__init__.py"

FIRST = ("start", "Run", "EsperSettings", "Mode", "Decision")
"""What most readers look for; other names follow in the order of the alphabet."""

OF_THE_RUN = {
    "Garden": {
        *("set_host_optimizer", "learn", "finalize", "proposal_sent", "apply", "take_events"),
        *("close", "is_seed_optimizer"),
    },
    "Run": {"phase_begins"},
}
"""Methods that only a run, or an adapter of a framework, calls."""

ELSEWHERE = {
    "EsperSettings": "Its fields are listed under [settings](settings.md).",
    "Garden": "A garden is made by `run.plant(...)`. How seeds grow: "
    "[growing seeds](kasmina.md).",
    "Run": "A run is made by `esper_otel.start(...)`. It is a context manager: leaving the "
    "`with` block closes it.",
}
"""What is said of a name beside its docstring."""

_TEMPLATE = """\
<!-- Made by {command} from the docstrings; edits here are lost. -->

# Python API

```python
import esper_otel
```

These names are all that a script needs, and all that stays compatible from one version to
the next. `import esper_otel` takes milliseconds and does not import PyTorch. Callbacks for
Lightning, Transformers and Accelerate are described under [frameworks](frameworks.md).

{listed}

{entries}
"""


def files() -> dict[Path, str]:
    """The page, by its place in the repository."""
    return {PAGE: page()}


def page() -> str:
    """The whole page, as Markdown."""
    names = [*FIRST, *(name for name in public_names() if name not in FIRST)]
    return _TEMPLATE.format(
        command=COMMAND,
        listed="\n".join(f"- [`{name}`](#{_anchor(name)}): {_summary(name)}" for name in names),
        entries="\n\n".join(_entry(name) for name in names),
    )


def public_names() -> list[str]:
    """What ``esper_otel.__all__`` lists, but for the version."""
    values = _assigned("__all__")
    assert isinstance(values, list)
    return [name for name in values if not name.startswith("__")]


def _assigned(name: str) -> object:
    """The value of a constant of the face."""
    for node in _tree(FACE).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{FACE}: expected {name}")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _path(module: str) -> Path:
    path = SOURCES.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _definition(name: str, module: str) -> tuple[ast.ClassDef | ast.FunctionDef, str]:
    """Where ``name`` of ``module`` is defined, which may be a module it is imported from."""
    for node in ast.walk(_tree(_path(module))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and any(each.name == name for each in node.names):
            return _definition(name, node.module or "")
    raise LookupError(f"{module}: expected {name}")


def _home(name: str) -> str:
    homes = _assigned("_HOMES")
    assert isinstance(homes, dict)
    return next(str(module) for module, names in homes.items() if name in names)


def _anchor(name: str) -> str:
    """Of two names that differ in case the second has a number, as GitHub and MyST give it."""
    alike = [each for each in public_names() if each.lower() == name.lower()]
    number = alike.index(name)
    return f"{name.lower()}-{number}" if number else name.lower()


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""


def _summary(name: str) -> str:
    node, _ = _definition(name, _home(name))
    return one_line(_docstring(node).partition("\n\n")[0].removesuffix("::"))


def _entry(name: str) -> str:
    node, module = _definition(name, _home(name))
    parts = [f"## {name}"]
    if isinstance(node, ast.FunctionDef):
        parts.append(_signature(node, "esper_otel."))
    parts.append(markdown(_docstring(node)))
    if name in ELSEWHERE:
        parts.append(ELSEWHERE[name])
    if isinstance(node, ast.ClassDef):
        if name != "EsperSettings" and (rows := list(_fields(node))):
            parts.append(
                "\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows])
            )
        parts += [
            f"### {name}.{each.name}\n\n{_signature(each, '')}\n\n{markdown(_docstring(each))}"
            for each in _methods(name, node, module)
        ]
    return "\n\n".join(part for part in parts if part)


def _signature(node: ast.FunctionDef, prefix: str) -> str:
    """How it is called: a property without brackets, a method without ``self``."""
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if _is_property(node):
        return f"```text\n{node.name}{result}\n```"
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix("cls").lstrip(", ")
    return f"```text\n{prefix}{node.name}({arguments}){result}\n```"


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(each) == "property" for each in node.decorator_list)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Rows of the fields of a struct, or of the members of an enumeration."""
    for each, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(each, ast.AnnAssign):
            name, kind = ast.unparse(each.target), f"`{ast.unparse(each.annotation)}`"
        elif isinstance(each, ast.Assign):
            name, kind = ast.unparse(each.targets[0]), f"`{ast.unparse(each.value)}`"
        else:
            continue
        if name.startswith("_"):
            continue
        is_told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        meaning = one_line(str(following.value.value)) if is_told else ""  # type: ignore[union-attr]
        kind = kind.replace("|", "\\|")
        yield f"| `{name}` | {kind} | {meaning} |"


def _methods(
    name: str, node: ast.ClassDef, module: str, seen: frozenset[str] = frozenset()
) -> list[ast.FunctionDef]:
    """Public methods, those of base classes of ours behind its own."""
    own = [
        each
        for each in node.body
        if isinstance(each, ast.FunctionDef)
        and not each.name.startswith("_")
        and _docstring(each)
        and each.name not in seen | OF_THE_RUN.get(name, set())
        and not any(ast.unparse(made).endswith(".setter") for made in each.decorator_list)
    ]
    names = seen | {each.name for each in own}
    for base in node.bases:
        try:
            parent, home = _definition(ast.unparse(base), module)
        except (LookupError, FileNotFoundError):
            continue
        if isinstance(parent, ast.ClassDef):
            more = _methods(name, parent, home, names)
            own += more
            names |= {each.name for each in more}
    return own
