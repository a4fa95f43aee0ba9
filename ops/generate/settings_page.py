"""Makes ``docs/settings.md`` from :mod:`esper_otel.settings`.

What a field is for is said once, beside the field.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from enum import StrEnum
from math import isinf
from pathlib import Path

import msgspec

from esper_otel import choices, run_settings, settings
from esper_otel.run_settings import RunSettings
from esper_otel.settings import EsperSettings
from ops.generate.files import COMMAND

PAGE = Path("docs/settings.md")

_FUTURE = "from __future__ import annotations"

OF_SEEDS = "growth"
"""The first of the fields that only a garden needs."""


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    return {PAGE: page()}


def page() -> str:
    """The whole page, as Markdown."""
    rows = list(_rows())
    first = next(place for place, row in enumerate(rows) if row[0] == OF_SEEDS)
    return _TEMPLATE.format(
        command=COMMAND,
        run=_table(row[1:] for row in rows[:first]),
        seeds=_table(row[1:] for row in rows[first:]),
    )


def _rows() -> Iterator[tuple[str, ...]]:
    """Field, variables, default, what it may be, what it is for."""
    said = _said()
    ranges = {field: (low, high) for field, low, high in settings.RANGES}
    for field in msgspec.structs.fields(EsperSettings):
        kind = field.type
        owner = RunSettings if field.name in RunSettings.__struct_fields__ else EsperSettings
        meaning = said[owner.__name__, field.name]
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            expected = ", ".join(f"`{each.value}`" for each in kind)
            each = [
                f"`{one.value}`: {about}"
                for one in kind
                if (about := said[kind.__name__, one.name])
            ]
            meaning = " ".join([meaning or inspect.getdoc(kind) or "", *each])
        else:
            expected = _within(settings.EXPECTED[kind], *ranges.get(field.name, (None, None)))
        variables = ", ".join(f"`{name}`" for name in settings.variables_of(field.name))
        yield field.name, variables, _default(field.default), expected, _plain(meaning)


def _said() -> dict[tuple[str, str], str]:
    """What stands under each field of each class, by their names; empty where nothing does."""
    said = {}
    text = "".join(inspect.getsource(module) for module in (choices, settings, run_settings))
    for found in ast.parse(text.replace(_FUTURE, "")).body:
        if not isinstance(found, ast.ClassDef):
            continue
        for node, after in zip(found.body, [*found.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                name = ast.unparse(node.target)
            elif isinstance(node, ast.Assign):
                name = ast.unparse(node.targets[0])
            else:
                continue
            words = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words = inspect.cleandoc(str(after.value.value))
            said[found.name, name] = " ".join(words.split())
    return said


def _within(expected: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return expected
    if isinf(high):
        return f"{expected} from {low:.15g} on"
    return f"{expected} from {low:.15g} to {high:.15g}"


def _default(value: object) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, StrEnum):
        return f"`{value.value}`"
    return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`" if value else ""


def _plain(text: str) -> str:
    """Without the roles of docstrings, which Markdown does not know."""
    return re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`")


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    head = [("variable", "default", "expected", "meaning"), ("---",) * 4]
    return "\n".join("| " + " | ".join(row) + " |" for row in (*head, *rows))


_TEMPLATE = """\
<!-- Made by {command} from the settings; edits here are lost. -->

# Settings

These settings configure the training process. Each is an environment variable, and also a
keyword argument of the lower-case name (without `ESPER_`) to `esper_otel.start`,
`TorchInstrumentor().instrument` and, for settings about seeds, `run.plant`. For an unusable
variable esper-otel logs one warning with its value and the expected one, and uses the default.
An unknown variable that begins with `ESPER_` gets a warning too. An unusable argument, or
option of `esper-otel run`, is an error ([ways to start](starting.md)).

OpenTelemetry's own variables configure the exporter: `OTEL_EXPORTER_OTLP_ENDPOINT`,
`_METRICS_ENDPOINT`, `_TRACES_ENDPOINT`, `_PROTOCOL`, `_HEADERS`, `_TIMEOUT`, `_COMPRESSION`,
`_CERTIFICATE`, `_CLIENT_KEY`, `_CLIENT_CERTIFICATE`, `_INSECURE`, and `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SDK_DISABLED`. `OTEL_METRICS_EXPORTER=console` prints
[a line for each step](export.md#lines-on-the-console).
`tamiyo serve --help` lists the options of the sidecar.

## Of a run

{run}

## Of seeds

These settings need a garden ([growing seeds](kasmina.md)).

{seeds}
"""
