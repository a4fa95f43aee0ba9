"""The page of commands, from the parsers of both programs, and their completion scripts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

from esper_otel import cli as esper_otel
from esper_otel.leyline.command_line import SHELLS, CommandParser
from esper_otel.leyline.folders import default_socket_path
from esper_tamiyo import cli as tamiyo
from ops.generate.files import COMMAND, ROOT

PAGE = Path("docs/commands.md")

PROGRAMS = (
    (esper_otel.command_parser, esper_otel.SCRIPTS),
    (tamiyo.command_parser, tamiyo.SCRIPTS),
)

SOCKET = "$XDG_RUNTIME_DIR/esper/tamiyo.sock"
"""In place of the socket of whoever makes the page."""

_TEMPLATE = """\
<!-- Made by {command} from the parsers; edits here are lost. -->

# Commands

Two programs: `esper-otel` runs training scripts and shows recorded runs, `tamiyo` is the
sidecar and its tools. Each prints its version with `--version`, and help with examples with
`--help`, also behind a command (`tamiyo journal --help`).

A command line that cannot be understood prints the usage of its command and one line that
says why, with exit status 2. Output is plain text; `NO_COLOR` turns off the colors of
`esper-otel top`, the only command that has any.

## Completion

Both programs print a script by which a shell completes commands and options:

```
source <(esper-otel completion bash)                          # in ~/.bashrc
esper-otel completion zsh > ~/.zfunc/_esper-otel              # a folder of your fpath
esper-otel completion fish > ~/.config/fish/completions/esper-otel.fish
```

and likewise `tamiyo completion`. The scripts come with the package and are made by
[shtab](https://docs.iterative.ai/shtab/), which is not needed to use them.

{programs}"""


FILES = ("FILE", "DIR", "PATH", "RUN")
TABLES = ("table", "a", "b")
"""Arguments whose values may be files: by what they are called in help, or in code."""


def files() -> dict[Path, str]:
    """The page and the scripts, by their places in the repository."""
    made = {PAGE: page()}
    for parser_of, folder in PROGRAMS:
        for shell in SHELLS:
            parser = parser_of()
            place = (folder / f"{parser.prog}.{shell}").relative_to(ROOT)
            made[place] = _script(parser, shell)
    return made


def page() -> str:
    """The whole page, as Markdown."""
    programs = "\n".join(_program(parser_of()) for parser_of, _ in PROGRAMS)
    return _TEMPLATE.format(command=COMMAND, programs=programs)


def all_commands(parser: CommandParser) -> Iterator[CommandParser]:
    """The parser of each command below ``parser``, commands of commands behind their own."""
    for each in parser.commands.values():
        yield each
        yield from all_commands(each)


def _script(parser: CommandParser, shell: str) -> str:
    if "run" in parser.commands:  # what it is to run is no argument that argparse sees
        parser.commands["run"].add_argument("script", nargs="*", type=Path)
    here = str(default_socket_path())
    for each in all_commands(parser):
        for action in each._actions:
            # Now and not in the script, where it may be escaped: whose is generated, root's or
            # anybody's, is the same.
            action.help = action.help and action.help.replace(here, SOCKET)
            if action.type is Path or action.metavar in FILES or action.dest in TABLES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=shell).replace(here, SOCKET)
    lines = [line.rstrip() for line in script.split("\n")]
    return "\n".join(lines).rstrip("\n") + "\n"


def _program(parser: CommandParser) -> str:
    parts = [f"## {parser.prog}\n", f"{parser.description}\n", _examples(parser)]
    listed = "\n".join(
        f"| [`{each.prog}`](#{each.prog.replace(' ', '-')}) | {_summary(parser, each)} |"
        for each in parser.commands.values()
    )
    parts.append(f"| command | purpose |\n| --- | --- |\n{listed}\n")
    parts += [_command(each, _summary(parser, each)) for each in all_commands(parser)]
    return "\n".join(parts)


def _summary(program: CommandParser, command: CommandParser) -> str:
    """What the help of the command above says of it."""
    *above, name = command.prog.removeprefix(program.prog).split()
    parent = program
    for each in above:
        parent = parent.commands[each]
    return next(
        choice.help or ""
        for action in parent._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._get_subactions()
        if choice.dest == name
    )


def _command(parser: CommandParser, summary: str) -> str:
    about = parser.description or f"{summary[0].upper()}{summary[1:]}."
    parts = [f"### {parser.prog}\n", f"{_text(about)}\n", _usage(parser)]
    rows = [
        f"| {_name(action)} | {_meaning(action)} |"
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]
    if rows:
        parts.append("\n".join(["| argument | meaning |", "| --- | --- |", *rows]) + "\n")
    for group in parser._action_groups:
        if group.description:
            names = ", ".join(
                f"`{action.option_strings[0]}`" for action in group._group_actions
            )
            parts.append(f"{names}: {_text(group.description)}\n")
    parts.append(_examples(parser))
    if rest := (parser.epilog or "").partition("\n\n")[2]:
        parts.append(f"{_text(rest)}\n")
    return "\n".join(filter(None, parts))


def _usage(parser: CommandParser) -> str:
    words = " ".join(parser.format_usage().removeprefix("usage: ").split())
    return f"```text\n{words}\n```\n"


def _examples(parser: CommandParser) -> str:
    if not parser.examples:
        return ""
    width = max(len(command) for command, _ in parser.examples)
    lines = [f"{command:{width}}  # {what}" for command, what in parser.examples]
    return "\n".join(["```", *lines, "```\n"])


def _name(action: argparse.Action) -> str:
    """An argument as one types it."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = ""
    if action.nargs != 0:
        if action.metavar:
            value = f" {action.metavar}"
        elif action.choices:
            value = f" {{{','.join(map(str, action.choices))}}}"
        else:
            value = f" {action.dest.upper()}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _meaning(action: argparse.Action) -> str:
    values = vars(action)
    text = (action.help or "") % values if action.help else ""
    text = text.replace(str(default_socket_path()), SOCKET)
    told = [_text(text)] if text else []
    if action.choices and (action.metavar or not action.option_strings):
        told.append(f"one of {', '.join(f'`{choice}`' for choice in action.choices)}")
    if action.default not in (None, "", False, [], argparse.SUPPRESS) and "default" not in text:
        told.append(f"default: `{action.default}`")
    return "; ".join(told)


def _text(text: str) -> str:
    """A text of help as Markdown: one line, with nothing in it that would be marks."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
