"""Where the binaries of the stack are, and how one gets them.

A program is looked for where an environment variable says, then in this user's cache,
then in PATH. What the cache holds is named by what it was made from, so that a changed
manifest or version makes a new one and clean clones share the old.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ops.stack import recipes

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "collector" / "builder.yaml"


class MissingError(Exception):
    """A program that is not here, or cannot be made: what to do, in one line."""


class Program(msgspec.Struct, frozen=True):
    """A binary: the variable that may name it, its names, and how it is made.

    ``made_from`` is all that decides what ``make`` leaves in the folder it is given;
    ``makes`` are the files that must be there afterwards.
    """

    name: str
    variable: str
    in_path: tuple[str, ...]
    made_from: Callable[[], str]
    make: Callable[[Path], None]
    makes: tuple[str, ...]
    needs: str

    @property
    def binary(self) -> str:
        """The file's name."""
        return self.makes[0]

    def cached(self) -> Path:
        """Where the binary lies once it has been made."""
        made_from = f"{self.made_from()}\n{platform.system()} {platform.machine()}"
        key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
        return cache() / f"{self.name}-{key}" / self.binary


COLLECTOR = Program(
    "collector",
    "OTELCOL",
    ("otelcol-contrib",),
    lambda: f"{MANIFEST.read_text()}{recipes.CONTRIB}",
    lambda folder: recipes.collector(MANIFEST, folder),
    ("esper-otelcol", "image.yaml"),
    "Go, some minutes and 3 GB of its cache",
)
JAEGER = Program(
    "jaeger",
    "JAEGER",
    ("jaeger",),
    lambda: recipes.JAEGER,
    recipes.jaeger,
    ("jaeger",),
    "Go, some minutes and 3 GB of its cache",
)
PROMETHEUS = Program(
    "prometheus",
    "PROMETHEUS",
    ("prometheus",),
    lambda: recipes.PROMETHEUS,
    recipes.prometheus,
    ("prometheus", "promtool"),
    "a Debian or Ubuntu with apt-get",
)
PROMTOOL = msgspec.structs.replace(
    PROMETHEUS,
    variable="PROMTOOL",
    in_path=("promtool",),
    makes=("promtool", "prometheus"),
)

CHROMIUM = Program(
    "chromium",
    "CHROMIUM",
    ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"),
    lambda: recipes.CHROMIUM,
    recipes.chromium,
    ("chromium",),
    "a Debian with apt-get, and 300 MB",
)
"""A browser, in which the tests open reports."""

ZSH = Program(
    "zsh",
    "ZSH_SHELL",
    ("zsh",),
    lambda: recipes.ZSH,
    recipes.zsh,
    ("zsh",),
    "a Debian with apt-get",
)
FISH = Program(
    "fish",
    "FISH_SHELL",
    ("fish",),
    lambda: recipes.FISH,
    recipes.fish,
    ("fish",),
    "a Debian with apt-get",
)
"""Shells, which read our completion scripts in the tests."""

ACTIONLINT = Program(
    "actionlint",
    "ACTIONLINT",
    ("actionlint",),
    lambda: recipes.ACTIONLINT,
    recipes.actionlint,
    ("actionlint",),
    "Go, and half a minute",
)
"""Checks the workflows of ``.github`` in the tests."""

PROMETHEUS_3 = Program(
    "prometheus-3",
    "PROMETHEUS_3",
    (),
    lambda: recipes.PROMETHEUS_3,
    recipes.prometheus_3,
    ("prometheus", "promtool"),
    "Go, some minutes and 3 GB of its cache",
)

COMPOSE = Program(
    "compose",
    "DOCKER_COMPOSE",
    (),
    lambda: recipes.COMPOSE,
    recipes.compose,
    ("docker-compose",),
    "Go, some minutes and 3 GB of its cache",
)
"""Version 2, for a Docker that has no ``compose``; of that name Debian 12 has version 1."""

PARTS = (COLLECTOR, PROMETHEUS, JAEGER)
"""The stack itself, without Tamiyo."""

PROGRAMS = {program.name: program for program in (*PARTS, CHROMIUM, ZSH, FISH, ACTIONLINT)}
"""Those that are made, each once; behind the stack's those that only tests need."""

DEPLOYED = {
    PROMETHEUS.variable: PROMETHEUS_3,
    PROMTOOL.variable: msgspec.structs.replace(
        PROMETHEUS_3, variable="PROMTOOL_3", makes=("promtool", "prometheus")
    ),
}
"""What the compose stack's images hold where that is newer than what the native one is made
of, by the variable that puts it in the place of that."""


def cache() -> Path:
    """This user's cache of binaries."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "esper-otel"


def find(program: Program) -> Path:
    """The binary; raises :class:`MissingError`."""
    named = os.environ.get(program.variable, "")
    if named:
        if found := shutil.which(named):
            return Path(found)
        raise MissingError(f"{program.variable}={named}: expected a program that can be run")
    if program.cached().is_file():
        return program.cached()
    for name in program.in_path:
        if found := shutil.which(name):
            return Path(found)
    raise MissingError(
        f"{program.binary} is not here: `make stack-programs` gets it "
        f"({program.needs}), or {program.variable}=/path/to/{program.binary} names one"
    )


def obtain(program: Program) -> Path:
    """The binary, made now when there is none; raises :class:`MissingError`.

    What is being made lies beside the cache until it is whole: two that make the same at
    once do double work and no harm.
    """
    try:
        return find(program)
    except MissingError:
        if os.environ.get(program.variable):
            raise
    with _workplace(program.cached().parent) as folder:
        try:
            program.make(folder)
        except (recipes.RecipeError, OSError) as error:
            # A distribution may pack things otherwise than those that were tried.
            raise MissingError(
                f"{program.binary} cannot be had: {str(error)[:300]}; "
                f"{program.variable}=/path/to/{program.binary} names one"
            ) from None
        for name in program.makes:
            if not (folder / name).is_file():
                raise MissingError(f"{program.binary}: making it left no {name}")
    return program.cached()


@contextmanager
def _workplace(destination: Path) -> Iterator[Path]:
    """A folder that becomes ``destination`` when all went well, and nothing otherwise."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".making-", dir=destination.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if not destination.exists():
            folder.replace(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
