"""How each binary is made, without root and with nothing left behind but the binary.

A recipe fills the folder it is given. What goes wrong is one line
(:class:`RecipeError`); the rest of what the tools said lies in the folder until it goes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

JAEGER = "github.com/jaegertracing/jaeger@v1.76.0"
"""That is Jaeger 2.13.0: both lines were released from one module, and the proxy that Go
asks knows it by its first number. ``cmd/jaeger`` in it is the second line."""

PROMETHEUS = "prometheus and its page, as Debian packs them"

PAGE_FOLDER = "web"
"""Where a Prometheus has its page, beside its binary."""

CHROMIUM = "chromium-headless-shell, as Debian packs it"
ZSH = "zsh, as Debian packs it"
FISH = "fish, as Debian packs it"

ACTIONLINT = "github.com/rhysd/actionlint@v1.7.12"
"""The checker of workflows, which is one Go module without a page or a build of its own."""

PROMETHEUS_3 = "github.com/prometheus/prometheus@v0.305.0"
"""That is Prometheus 3.5.0, in the numbers of Go modules."""

COMPOSE = "github.com/docker/compose/v2@v2.40.3"
"""What ``docker compose`` is, for a Docker that came without it, as Debian 12's does."""

CONTRIB = "github.com/open-telemetry/opentelemetry-collector-contrib"
"""The root of contrib's modules, which holds the reports of what its images hold."""


class RecipeError(Exception):
    """A step that failed, in one line."""


def collector(manifest: Path, folder: Path) -> None:
    """Build the distribution that ``manifest`` describes, with the builder it names.

    Beside it is left contrib's own report of what its image of that release holds.
    """
    _need("go")
    print("building our Collector; the first time takes some minutes", flush=True)
    made_by = _builder(manifest)
    release = made_by.rpartition("@")[2]
    contrib = _module(f"{CONTRIB}@{release}", folder)
    shutil.copyfile(contrib / "reports/distributions/contrib.yaml", folder / "image.yaml")
    text = manifest.read_text()
    name = re.search(r"^  name: (\S+)$", text, re.MULTILINE)
    if name is None:
        raise RecipeError(f"{manifest}: expected dist.name")
    sources = folder / "sources"
    placed = folder / "builder.yaml"
    placed.write_text(
        text.replace(name.group(0), f"{name.group(0)}\n  output_path: {sources}", 1)
    )
    # GOFLAGS of its own: the builder calls Go in a folder that is no repository.
    _run(["go", "run", made_by, "--config", str(placed)], folder)
    (sources / name.group(1)).rename(folder / name.group(1))
    _discard(sources)


def _builder(manifest: Path) -> str:
    """The builder that ``manifest`` names, with its version."""
    named = re.search(
        r"go\.opentelemetry\.io/collector/cmd/builder@v[\d.]+", manifest.read_text()
    )
    if named is None:
        raise RecipeError(f"{manifest}: expected a cmd/builder@version")
    return named.group(0)


def _module(name: str, folder: Path) -> Path:
    """Where the sources of a Go module are, fetched when they are not here."""
    found = json.loads(_run(["go", "mod", "download", "-json", name], folder))
    return Path(found["Dir"])


def jaeger(folder: Path) -> None:
    """Build Jaeger v2. The page that people look at is no part of its module: in its place
    the binary has a placeholder, and all of the API."""
    _programs_of(JAEGER, {"jaeger": "./cmd/jaeger"}, folder)


def prometheus_3(folder: Path) -> None:
    """Build Prometheus 3, also without the page that people look at."""
    packages = {"prometheus": "./cmd/prometheus", "promtool": "./cmd/promtool"}
    _programs_of(PROMETHEUS_3, packages, folder)


def compose(folder: Path) -> None:
    """Build Docker's compose, which is a program of its own as well as a part of Docker."""
    _programs_of(COMPOSE, {"docker-compose": "./cmd"}, folder)


def _programs_of(module: str, packages: dict[str, str], folder: Path) -> None:
    """Build ``packages``, by the names of their binaries, in a copy of their module.

    A copy and not ``go install``, which refuses modules that replace others.
    """
    _need("go")
    print(f"building {', '.join(packages)}; the first time takes some minutes", flush=True)
    sources = folder / "sources"
    shutil.copytree(_module(module, folder), sources)
    for path in (sources, *sources.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    for name, package in packages.items():
        _run(["go", "build", "-trimpath", "-o", str(folder / name), package], sources)
    _discard(sources)


def prometheus(folder: Path) -> None:
    """Unpack Debian's packages of Prometheus and of what its page is made of, which apt has
    checked, without installing them."""
    _need("apt-get", "apt-cache", "dpkg-deb")
    print("fetching prometheus", flush=True)
    # As on a machine where nothing is installed: the page needs files of what may be here.
    nothing = ["-o", "Dir::State::status=/dev/null", "--no-install-recommends"]
    plan = _run(["apt-get", "install", "-s", *nothing, "prometheus"], folder)
    pages = re.findall(r"^Inst ((?:libjs|node|fonts)-\S+)", plan, re.MULTILINE)
    # Debian 13 has promtool in a package of its own.
    tools = ["promtool"] if _run(["apt-cache", "search", "-n", "^promtool$"], folder) else []
    unpacked = _unpacked(["prometheus", *tools, *pages], folder)
    for name in ("prometheus", "promtool"):
        (unpacked / "usr" / "bin" / name).rename(folder / name)
    # Links lead to what other packages have: as files the page is complete by itself. Behind
    # Debian 13 the package needs none of these, and its links lead nowhere. Not the sources of
    # time zones, which are 200 MB and nothing asks for.
    page = folder / PAGE_FOLDER
    shutil.copytree(
        unpacked / "usr" / "share" / "prometheus" / "web",
        page,
        ignore=shutil.ignore_patterns("data"),
        ignore_dangling_symlinks=True,
    )
    # The page wants a script, and where it looks for it Debian 12 has a module.
    popper = page / "static" / "popper.js"
    if (popper / "umd" / "popper.min.js").exists():
        shutil.copyfile(popper / "umd" / "popper.min.js", popper / "popper.min.js")
    _discard(unpacked)


def _unpacked(packages: list[str], folder: Path) -> Path:
    """What Debian's ``packages`` hold, in a folder below ``folder``."""
    _run(["apt-get", "download", *packages], folder)
    unpacked = folder / "unpacked"
    for archive in folder.glob("*.deb"):
        _run(["dpkg-deb", "--extract", str(archive), str(unpacked)], folder)
        archive.unlink()
    return unpacked


def chromium(folder: Path) -> None:
    """Unpack Debian's Chromium without a window."""
    _of_debian("chromium-headless-shell", "usr/lib/chromium", "chromium", folder)


def zsh(folder: Path) -> None:
    """Unpack Debian's zsh, whose completion scripts are ours to check."""
    _of_debian("zsh", "bin", "zsh", folder)


def fish(folder: Path) -> None:
    """Unpack Debian's fish, for the same."""
    _of_debian("fish", "bin", "fish", folder)


def actionlint(folder: Path) -> None:
    """Build the checker of workflows."""
    _programs_of(ACTIONLINT, {"actionlint": "./cmd/actionlint"}, folder)


def _of_debian(package: str, place: str, name: str, folder: Path) -> None:
    """Unpack a ``package``, whose program lies in ``place``, and the libraries not here yet.

    As :func:`prometheus` it is not installed; a script ``name`` says where they lie.
    """
    _need("apt-get", "dpkg-deb")
    print(f"fetching {name}", flush=True)
    plan = _run(["apt-get", "install", "-s", "--no-install-recommends", package], folder)
    wanted = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
    unpacked = _unpacked(wanted or [package], folder)
    # Debian 13 has in /usr/bin all that Debian 12 has in /bin.
    programs = [unpacked / each / package for each in (place, f"usr/{place}")]
    program = next((each for each in programs if each.is_file()), None)
    if program is None:
        raise RecipeError(f"{package}: expected {place}/{package} in it")
    libraries = {str(path.parent.relative_to(folder)) for path in unpacked.rglob("*.so*")}
    script = folder / name
    script.write_text(
        "#!/bin/sh\n"
        'here=$(dirname "$(readlink -f "$0")")\n'
        + "".join(f'LIBRARIES="$LIBRARIES:$here/{path}"\n' for path in sorted(libraries))
        + 'export LD_LIBRARY_PATH="$LIBRARIES"\n'
        f'exec "$here/{program.relative_to(folder)}" "$@"\n'
    )
    script.chmod(0o755)


def _need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            raise RecipeError(f"{tool} is not here")


def _run(command: list[str], folder: Path) -> str:
    """What ``command`` prints; raises :class:`RecipeError` with its last words."""
    environment = os.environ | {"GOFLAGS": "-buildvcs=false", "GOWORK": "off"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = words[-1].strip() if words else f"exit status {done.returncode}"
        print("\n".join(words[-20:]), file=sys.stderr)
        raise RecipeError(f"{' '.join(command[:3])}: {last}")
    return done.stdout


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
