"""Command line: the parser of both programs' commands, their examples, and shell completion.

How an age is written in an option is here as well.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from esper_otel.leyline.terminal import say

SHELLS = ("bash", "zsh", "fish")
"""Shells that completion scripts are made for, by ``python -m ops.generate``."""

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

Example = tuple[str, str]
"""A command as one types it, and its effect."""


class Subcommands(Protocol):
    """Where a command is added: the result of :meth:`CommandParser.add_subparsers`."""

    @property
    def add_parser(self) -> Callable[..., argparse.ArgumentParser]:
        """Makes the parser of a command, by its name and the options of a parser."""


class _Help(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves indented lines, such as examples, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            part if re.search(r"^ ", part, re.MULTILINE) else self._wrapped(part, width, indent)
            for part in paragraphs
        )

    def _wrapped(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """A parser with examples in its help, which reports a mistake by the command it is in.

    For a word that a command does not know :mod:`argparse` prints the usage of the whole
    program; this one prints that of the command. The exit status is 2 in any case.
    """

    def __init__(
        self, *arguments: Any, examples: Sequence[Example] = (), **options: Any
    ) -> None:
        self.examples = tuple(examples)
        """Commands to start from; each is one that this parser takes."""
        if examples:
            options["epilog"] = "\n\n".join(
                [_told(self.examples), *filter(None, [options.get("epilog")])]
            )
        options.setdefault("formatter_class", _Help)
        super().__init__(*arguments, **options)
        # Python 3.14 colours help and usage, and our output escapes control characters.
        self.color = False
        self.set_defaults(parser=self)

    @property
    def commands(self) -> dict[str, CommandParser]:
        """The commands that this parser divides into, by name."""
        return {
            name: parser
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for name, parser in action.choices.items()
        }

    def add_version(self, release: Callable[[], str]) -> None:
        """Add ``--version``, which prints the program's name and its ``release()``."""
        self.add_argument("--version", action=_Version, nargs=0, release=release)

    def parse_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> argparse.Namespace:
        """The options; ends the process with status 2 where a word is of no use."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message``, and end the process with status 2."""
        program, *commands = self.prog.split()
        where = ": ".join([program, " ".join(commands)] if commands else [program])
        usage = self.format_usage().rstrip("\n").split("\n")
        say(*usage, f"{where}: {message}", file=sys.stderr)
        raise SystemExit(2)


class _Version(argparse.Action):
    """Prints the version, which is found out only then."""

    def __init__(self, *, release: Callable[[], str], **options: Any) -> None:
        super().__init__(**{**options, "help": "print the version and end"})
        self._release = release

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        say(f"{parser.prog} {self._release()}")
        parser.exit()


def _told(examples: Sequence[Example]) -> str:
    """Examples as help shows them, in two columns where they fit."""
    width = max((len(command) for command, _ in examples if len(command) < 46), default=0)
    lines = [f"  {command:{width}}  # {what}" for command, what in examples]
    return "\n".join(["examples:", *lines])


def age_in_s(text: str) -> float | None:
    """The seconds of an age such as 30m, 12h or 7d; None for what is none."""
    match = _AGE.fullmatch(text.strip())
    return None if match is None else float(match[1]) * _SECONDS[match[2]]


def add_completion(commands: Subcommands, program: str, scripts: Path) -> None:
    """Add the command that prints one of the ``scripts``, by which a shell completes."""
    parser = commands.add_parser(
        "completion",
        help="print the script by which a shell completes commands",
        description=f"Prints a script; a shell that reads it completes {program} commands "
        "and options with the Tab key.",
        examples=[
            (f"{program} completion bash > ~/.{program}.bash", "and `source` it in ~/.bashrc"),
            (f"{program} completion zsh > ~/.zfunc/_{program}", "a folder of your fpath"),
            (f"{program} completion fish > ~/.config/fish/completions/{program}.fish", "fish"),
        ],
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(command=lambda options: _print(scripts / f"{program}.{options.shell}"))


def _print(script: Path) -> int:
    say(*script.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    return 0
