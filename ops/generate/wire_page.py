"""The page of the decision socket's protocol, from the messages themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import msgspec

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import Decision, Finding, Proposal
from ops.generate.docstrings import markdown, one_line
from ops.generate.files import COMMAND

PAGE = Path("docs/wire-protocol.md")

PARTS = (wire.SeedRow, Proposal, Decision, Finding, wire.Guard, wire.RankNow, wire.DecisionNote)
"""Structs that only occur within messages."""

_TEMPLATE = """\
<!-- Made by {command} from the messages; edits here are lost. -->

# The wire protocol

How a trainer, or a tool, talks to Tamiyo over its Unix socket (protocol version {version}).
Telemetry does not use it: that is [plain OTLP](metrics.md). Everything here is defined in
`src/esper_otel/leyline/wire.py`. Who may connect, and which input is refused:
[security](security.md#the-decision-socket).

{about}

In the tables a field with a default may be missing at the end of an array, which is how
older peers send it. Fields that a peer does not know are ignored.

## An exchange

```python
from pathlib import Path

from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import StatusRequest

status = reply_to(StatusRequest(), Path("/run/user/1000/esper/tamiyo.sock"))
print(status.report["uptime_s"])
```

## To the sidecar

{to_server}

## From the sidecar

{to_client}

## Parts of messages

{parts}
"""


def files() -> dict[Path, str]:
    """The page, by its place in the repository."""
    return {PAGE: page()}


def page() -> str:
    """The whole page, as Markdown."""
    about = markdown(inspect.getdoc(wire) or "").partition("\n\n")[2]
    return _TEMPLATE.format(
        command=COMMAND,
        version=wire.PROTOCOL,
        about=about,
        to_server=_messages(get_args(wire.ToServer)),
        to_client=_messages(get_args(wire.ToClient)),
        parts=_messages(PARTS),
    )


def _messages(kinds: Iterable[type[msgspec.Struct]]) -> str:
    return "\n\n".join(_message(kind) for kind in kinds)


def _message(kind: type[msgspec.Struct]) -> str:
    tag = kind.__struct_config__.tag
    rows = [f'| 0 | tag | `"{tag}"` | |'] if tag else []
    annotations = {name: text for each in kind.__mro__ for name, text in _own(each).items()}
    for place, field in enumerate(msgspec.structs.fields(kind), start=len(rows)):
        kind_of = one_line(annotations[field.name])
        rows.append(f"| {place} | `{field.name}` | `{kind_of}` | {_default(field)} |")
    parts = [f"### {kind.__name__}", markdown(inspect.getdoc(kind) or "")]
    if rows:
        head = ["| place | field | type | default |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def _own(kind: type) -> dict[str, str]:
    return {name: str(text) for name, text in inspect.get_annotations(kind).items()}


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()!r}`"
    if field.default is not msgspec.NODEFAULT:
        return f"`{field.default!r}`"
    return "required"
