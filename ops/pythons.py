"""The tests on another Python of this machine: ``make test-pythons``.

Each Python has an environment of its own, ``.venv-3.13``, without torch, which is gigabytes: it
takes half a minute to make, and runs the tests of the product that need no torch. With
``--torch``, or where its environment has torch already, all tests run.

    python -m ops.pythons [--torch] [3.12 | /path/to/python3.12 …]

Without a name it is the newest here, if that is newer than the one that runs this. Exits 0 when
all passed or there is no other Python, 1 when something failed, 2 when a Python that was named
is not here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
OLDEST = (3, 11)
LATER = 10
"""How many versions behind the oldest are looked for."""

CONSTRAINTS = ROOT / "constraints.txt"
MADE_FROM = (ROOT / "pyproject.toml", CONSTRAINTS)

WITHOUT_TORCH = "test"
WITH_TORCH = "demo,dev"
"""Extras of the distribution."""

OF_THE_SIDECAR = (
    *("accepting", "any_message", "child_process", "connections", "credentials", "engine"),
    *("grpc_receiver", "http_receiver", "journal", "keeping", "language", "listening"),
    *("own_telemetry", "receiving", "reloading", "restarting", "journal_writer", "serving"),
)
"""Its processes, sockets and files; what rules mean is the same on every Python."""

SELECTED = (
    *("tests/leyline", "tests/stream", "tests/tamiyo", "tests/tolaria"),
    *(f"tests/sidecar/test_{name}.py" for name in OF_THE_SIDECAR),
    *("tests/test_faults.py", "tests/test_goodbye.py", "tests/test_settings.py"),
    *("tests/test_summary.py", "tests/test_architecture.py", "tests/test_fork_warning.py"),
)
"""What another Python may change, and needs no torch; what of it does is skipped."""

_ASKS = (
    "import ensurepip, sys, venv; "
    "print(*sys.version_info[:3], getattr(sys, '_base_executable', sys.executable))"
)
_HAS_TORCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"


class MistakeError(Exception):
    """Something the user can put right, in one line."""


class Python(msgspec.Struct, frozen=True, order=True):
    """An interpreter that can make environments; the newest is the greatest."""

    version: tuple[int, int, int]
    path: str

    @property
    def minor(self) -> str:
        """Its version as its command names it: ``3.13``."""
        return f"{self.version[0]}.{self.version[1]}"

    @property
    def environment(self) -> Path:
        """Where its environment is."""
        return ROOT / f".venv-{self.minor}"


def asked(command: str | os.PathLike[str]) -> Python | None:
    """What Python ``command`` starts; None where it starts none that can be used.

    A shim of pyenv is there for versions that it will not start, and Debian's Python may lack
    what makes environments.
    """
    try:
        done = subprocess.run(
            [command, "-I", "-c", _ASKS], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    major, minor, micro, path = done.stdout.strip().split(" ", 3)
    return Python((int(major), int(minor), int(micro)), path)


def here() -> list[Python]:
    """The newest of each version that is promised: in ``PATH``, or kept by pyenv."""
    newest: dict[str, Python] = {}
    for command in _commands():
        python = asked(command)
        if python is not None and python.version >= OLDEST:
            newest[python.minor] = max(python, newest.get(python.minor, python))
    return sorted(newest.values())


def _commands() -> Iterator[str | Path]:
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for minor in range(OLDEST[1], OLDEST[1] + LATER):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield found
        yield from pyenv.glob(f"versions/3.{minor}.*/bin/python3")


def chosen(names: Sequence[str], running: tuple[int, int]) -> list[Python]:
    """The Pythons that are named; without names the newest, if ``running`` is older.

    Raises :class:`MistakeError` for a name of none.
    """
    if not names:
        newest = [python for python in here() if python.version[:2] > running]
        return newest[-1:]
    found = {python.minor: python for python in here()}
    return [_named(name, found) for name in names]


def _named(name: str, found: dict[str, Python]) -> Python:
    if re.fullmatch(r"\d+\.\d+", name):
        python, expected = found.get(name), f"one of {', '.join(found) or 'none'}"
    else:
        python, expected = asked(name), "a Python with venv and ensurepip"
    if python is None:
        raise MistakeError(f"PYTHONS={name}: expected {expected}")
    if python.version < OLDEST:
        raise MistakeError(f"PYTHONS={name}: expected Python 3.11 or newer")
    return python


def prepare(python: Python, extras: str) -> Path:
    """Make its environment, if that is not there as it is wanted; returns its Python."""
    interpreter = python.environment / "bin" / "python"
    ready = python.environment / ".ready"
    wanted = hashlib.sha256(extras.encode() + b"".join(p.read_bytes() for p in MADE_FROM))
    stamp = f"{'.'.join(map(str, python.version))} {extras} {wanted.hexdigest()}\n"
    if ready.is_file() and ready.read_text() == stamp:
        return interpreter
    print(f"pythons: installing into {python.environment.name} ...", flush=True)
    ready.unlink(missing_ok=True)
    subprocess.run([python.path, "-m", "venv", str(python.environment)], check=True)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Python compiles what it imports, which is a small part of what is installed.
    wanted_here = ["--no-compile", "-c", str(CONSTRAINTS), "-e", f".[{extras}]"]
    subprocess.run([*pip, *wanted_here], cwd=ROOT, check=True)
    ready.write_text(stamp)
    return interpreter


def has_torch(interpreter: Path) -> bool:
    """Whether its environment has torch."""
    return subprocess.run([str(interpreter), "-c", _HAS_TORCH]).returncode == 0


def run(python: Python, with_torch: bool, processes: str) -> bool:
    """Run the tests on ``python``; whether they passed."""
    interpreter = python.environment / "bin" / "python"
    full = with_torch or (interpreter.exists() and has_torch(interpreter))
    prepare(python, WITH_TORCH if full else WITHOUT_TORCH)
    number = ".".join(map(str, python.version))
    what = "all tests" if full else "the tests that need no torch"
    print(f"pythons: {what}, on Python {number}", flush=True)
    command = [str(interpreter), "-m", "pytest", "-n", processes, "--dist", "loadfile"]
    passed = not subprocess.call(
        [*command, "--no-loadscope-reorder", *(() if full else SELECTED)], cwd=ROOT
    )
    if not full:
        print(
            f"pythons: on Python {number} the tests of torch, rules, reports, stack and "
            "benches did not run; make test-pythons WITH_TORCH=1 runs all",
            flush=True,
        )
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.pythons", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("python", nargs="*", help="3.12, or a path; default: the newest here")
    parser.add_argument("--torch", action="store_true", help="install torch, and run all tests")
    parser.add_argument("--processes", default="2", help="default: %(default)s")
    options = parser.parse_args(arguments)
    running = sys.version_info[:2]
    try:
        pythons = chosen(options.python, running)
        if not pythons:
            print(
                "pythons: no Python newer than {}.{} is here: no other one was tried".format(
                    *running
                )
            )
        results = [run(each, options.torch, options.processes) for each in pythons]
    except MistakeError as error:
        print(f"pythons: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        words = " ".join(map(str, error.cmd[:4]))
        print(f"pythons: {words} …: exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
