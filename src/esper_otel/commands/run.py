"""Runs a training script as ``python`` would, and records it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from esper_otel.commands import refuse
from esper_otel.integrations.launching import (
    PythonCall,
    is_interpreter,
    own_call,
    past_option,
    python_call,
)
from esper_otel.leyline.command_line import Subcommands
from esper_otel.run_settings import format_tags
from esper_otel.settings import EsperSettings, Mode, SettingsError

_RUN = """\
Runs a training script as `python` would, and records it: every optimizer step streams
out as OpenTelemetry (OTEL_* variables set the endpoint; default http://localhost:4318), and
a Tamiyo sidecar on this host evaluates each. After the options of this command come the
arguments of `python`, including its own options (-u, -O, -W error, -m module), or a launcher:
torchrun, accelerate launch, a shell script, any program that starts Python processes."""

_DEAF = {
    "E": "-E makes Python ignore the environment",
    "I": "-I makes Python ignore the environment",
    "S": "-S makes Python start without its site module",
}
"""Options of ``python`` with which it cannot be instrumented, and why."""


def add_run(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run a training script, instrumented",
        description=_RUN,
        usage="esper-otel run [option ...] [option of python ...] "
        "(script | -m module | -c code | - | program) [argument ...]",
        examples=[
            ("esper-otel run train.py --epochs 10", "as python train.py --epochs 10"),
            ("esper-otel run --enforce --record train.py", "apply decisions, keep a recording"),
            ("esper-otel run torchrun --nproc-per-node 2 train.py", "each rank"),
        ],
    )
    parser.add_argument("--enforce", action="store_true", help="apply Tamiyo's decisions")
    parser.add_argument("--mode", choices=[m.value for m in Mode], help="default: advise")
    parser.add_argument("--socket", metavar="PATH", help="where the sidecar listens")
    parser.add_argument(
        "--record",
        metavar="[DIR]",
        help="also write all telemetry to files, in DIR or at home (see `esper-otel runs`)",
    )
    parser.add_argument("--report", metavar="FILE", help="write a page of the run at its end")
    parser.add_argument("--run-id", metavar="ID", help="default: generated from the time")
    parser.add_argument("--name", metavar="NAME", help="name of the run")
    parser.add_argument(
        "--tag",
        action="append",
        metavar="KEY=VALUE",
        help="tag of the run; repeatable",
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="no summary at the end")
    told.add_argument(
        "--json", action="store_true", help="the summary as one line of JSON, on stderr"
    )
    parser.set_defaults(command=_run)


def divided(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The words that are options of this command, and those that ``python`` would be given.

    Ours come first, or among those of ``python``; from what is to be run on, all is its own.
    """
    ours: list[str] = []
    at = 0
    pythons: list[str] = []
    while at < len(words) and words[at] != "--":
        takes = _values_of(parser, words[at])
        if takes is not None:
            ours += words[at : at + 1 + takes]
            at += 1 + takes
            continue
        following = past_option(words, at)
        if following is None:
            ours.append(words[at])  # of nobody: the parser says so
            at += 1
        elif following == at:
            break
        else:
            pythons += words[at:following]
            at = following
    return ours, [*pythons, *words[at:]]


def _values_of(parser: argparse.ArgumentParser, word: str) -> int | None:
    """How many words belong to the option ``word`` of ``parser``; None for none of its own."""
    if word != "-h" and not (word.startswith("--") and len(word) > 2):
        return None
    name, equals, _ = word.partition("=")
    options = parser._option_string_actions
    found = {id(options[each]): options[each] for each in options if each.startswith(name)}
    action = options.get(name) or (found.popitem()[1] if len(found) == 1 else None)
    if action is None:
        return None
    return 0 if equals or action.nargs == 0 else 1


class _Start(NamedTuple):
    """What is started."""

    command: list[str]
    only_workers: bool


class _StartError(Exception):
    """What cannot be started, and why."""


def _run(options: argparse.Namespace) -> int:
    if options.enforce and options.mode not in (None, "enforce"):
        return refuse(f"run: --enforce and --mode {options.mode} exclude each other")
    given = _variables(options)
    try:
        start = _start_of([*_own_options(), *options.python])
        EsperSettings.read(given)
    except (_StartError, SettingsError) as error:
        return refuse(f"run: {error}")
    from esper_otel.integrations.startup import execute

    try:
        execute(start.command, {**os.environ, **given}, only_workers=start.only_workers)
    except OSError as error:
        return refuse(f"run: {start.command[0]}: {error.strerror}")


_HOME = "--record="
"""How ``--record`` without a folder is spelled out: argparse cannot know where options end."""


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with ``--record`` and its folder as one word.

    What stands behind it is the script and no folder when it is a file, when it ends in .py,
    when it is a program that is found (a launcher), and when nothing follows it.
    """
    words = list(arguments)
    place = 1
    while place < len(words) and words[place].startswith("-") and words[place] != "-m":
        word = words[place]
        if word == "--record":
            following = words[place + 1 : place + 2]
            if following and _is_folder(following[0], is_last=place + 2 == len(words)):
                words[place : place + 2] = [_HOME + following[0]]
            else:
                words[place] = _HOME
        elif word in _WITH_VALUE:
            place += 1
        place += 1
    return words


_WITH_VALUE = frozenset({"--mode", "--socket", "--report", "--run-id", "--name", "--tag"})
"""Options that have a word behind them."""


def _is_folder(word: str, *, is_last: bool) -> bool:
    if is_last or word.startswith("-") or word.endswith(".py") or Path(word).is_file():
        return False
    is_program = word == "torchrun" or (os.sep not in word and _program(word) is not None)
    return Path(word).is_dir() or not is_program


def _start_of(words: Sequence[str]) -> _Start:
    """What ``esper-otel run WORDS`` starts; raises :class:`_StartError`."""
    python = sys.executable
    call = _call_of(words)
    if call.kind == "script" and is_interpreter(call.name) and not _is_script(call.name):
        python = _program(call.name) or ""
        if not python:
            raise _StartError(f"{call.name}: no such program")
        call = _call_of([*call.words[: call.place], *call.arguments])
    for letter in call.flags:
        if letter in _DEAF:
            raise _StartError(
                f"{_DEAF[letter]}, which instruments the script: omit it, or call "
                "esper_otel.start(optimizer) in the script"
            )
    if not call.kind and "V" not in call.flags:
        raise _StartError("expected a script, or -m and a module, or a program")
    if call.kind != "script" or _is_script(call.name):
        return _Start([python, *call.words], call.is_launcher)
    options = call.words[: call.place]
    if call.name == "torchrun" and not Path("torchrun").exists():
        module = ["-m", "torch.distributed.run", *call.arguments]
        return _Start([python, *options, *module], True)
    program = _program(call.name)
    if program is None:
        raise _StartError(f"{call.name}: {_fault_of(Path(call.name))}")
    if not options:
        return _Start([program, *call.arguments], True)
    if not _is_pythons(Path(program)):
        raise _StartError(f"{call.name}: not a Python, so {options[0]} is no option for it")
    return _Start([python, *options, program, *call.arguments], True)


def _own_options() -> list[str]:
    """Options that Python was given before ``-m esper_otel``: they are the script's as well."""
    own = own_call()
    is_module = own is not None and (own.kind, own.name) == ("module", "esper_otel")
    return own.words[: own.place] if own is not None and is_module else []


def _call_of(words: Sequence[str]) -> PythonCall:
    try:
        return python_call(words)
    except ValueError as error:
        raise _StartError(f"{error}: no option of python") from None


def _is_script(name: str) -> bool:
    """Whether ``name`` is a file, or a folder, that Python is to read."""
    path = Path(name)
    if path.is_dir():
        return (path / "__main__.py").exists()
    return path.exists() and _is_pythons(path)


def _is_pythons(path: Path) -> bool:
    """Whether a file is Python's to read: no program for the machine, no script of a shell."""
    try:
        with path.open("rb") as file:
            head = file.readline(512)
    except OSError:
        return True  # Python says what is wrong with it
    return not head.startswith((b"\x7fELF", b"#!")) or b"python" in head


def _fault_of(path: Path) -> str:
    """Why ``path`` is nothing to start."""
    if path.is_dir():
        return "a folder without __main__.py"
    return "not a Python file, and not executable" if path.exists() else "no such file"


def _program(name: str) -> str | None:
    """The program that ``name`` means: beside this Python, or on the ``PATH``."""
    if os.sep in name:
        return name if os.access(name, os.X_OK) and Path(name).is_file() else None
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _encoded(tag: str) -> str:
    """``KEY=VALUE`` as it stands among others; what is none stays, to be refused."""
    key, separator, value = tag.partition("=")
    return format_tags({key: value}) if separator else tag


def _variables(options: argparse.Namespace) -> dict[str, str]:
    """The settings that options of the command give, as environment variables."""
    given = {
        "ESPER_MODE": "enforce" if options.enforce else options.mode,
        "ESPER_TAMIYO_SOCKET": options.socket,
        "ESPER_RECORDING_DIR": options.record or None,
        "ESPER_RECORD": "true" if options.record == "" else None,
        "ESPER_NAME": options.name,
        "ESPER_TAGS": ",".join(map(_encoded, options.tag)) if options.tag else None,
        "ESPER_RUN_ID": options.run_id,
        "ESPER_REPORT": options.report and str(Path(options.report).absolute()),
        "ESPER_SUMMARY": "off" if options.quiet else "json" if options.json else None,
    }
    return {name: value for name, value in given.items() if value is not None}
