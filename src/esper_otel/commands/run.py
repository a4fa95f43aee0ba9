"""Runs a training script as ``python`` would, and records it."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from esper_otel.commands.common import Subcommands, refuse
from esper_otel.run_settings import format_tags
from esper_otel.settings import EsperSettings, Mode, SettingsError

_RUN = """\
Runs a training script as `python` would, and records it: every optimizer step streams
out as OpenTelemetry (OTEL_* variables say where to; default http://localhost:4318), and
a Tamiyo sidecar on this host is asked after each."""


def add(commands: Subcommands) -> None:
    """Describe this command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run a training script, instrumented",
        description=_RUN,
        usage="esper-otel run [option ...] (script | -m module | torchrun ...) [argument ...]",
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
    parser.add_argument("--run-id", metavar="ID", help="default: one made from the time")
    parser.add_argument("--name", metavar="NAME", help="what people call the run")
    parser.add_argument(
        "--tag",
        action="append",
        metavar="KEY=VALUE",
        help="what runs are told apart by; may be given again",
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="no summary at the end")
    told.add_argument(
        "--json", action="store_true", help="the summary as one line of JSON, on stderr"
    )
    parser.add_argument("-m", nargs=argparse.REMAINDER, dest="module", help="run a module")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="what `python` would be given")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    script: list[str] = options.script
    if options.module is not None:
        script = ["-m", *options.module] if options.module else []
    if not script:
        return refuse("run: expected a script, or -m and a module")
    if options.enforce and options.mode not in (None, "enforce"):
        return refuse(f"run: --enforce and --mode {options.mode} exclude each other")
    only_workers = _launches(script)
    if script[0] == "torchrun" and not Path("torchrun").exists():
        script = ["-m", "torch.distributed.run", *script[1:]]
    fault = _fault_of(script[0])
    if fault:
        return refuse(f"run: {fault}")
    environment = {**os.environ, **_variables(options)}
    try:
        EsperSettings.read(environment)
    except SettingsError as error:
        return refuse(f"run: {error}")
    from esper_otel.integrations.startup import execute

    return execute(script, environment, only_workers=only_workers)


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
    is_program = word == "torchrun" or (os.sep not in word and shutil.which(word) is not None)
    return Path(word).is_dir() or not is_program


def _launches(script: list[str]) -> bool:
    """Whether this starts the processes that train, and is none itself."""
    if script[0] == "-m":
        return script[1] in ("torch.distributed.run", "torch.distributed.launch")
    return Path(script[0]).name == "torchrun"


def _fault_of(script: str) -> str:
    """Why ``script`` cannot be run, empty when it can.

    It is a file called train.py and not a module path: -c and - are Python's own.
    """
    if script.startswith("-"):
        return ""
    path = Path(script)
    if not path.exists():
        return f"{path}: no such file"
    if path.is_dir() and not (path / "__main__.py").exists():
        return f"{path}: a folder without __main__.py"
    return ""


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
