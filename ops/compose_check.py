"""The compose stack in a Docker engine: ``make test-compose``.

Starts what ``docker/compose.yaml`` describes, has its example trainer train with decisions
enforced, looks for the steps in Prometheus and the spans in Jaeger, and removes all of it. Its
project, its images and its ports are its own: a stack that runs is left alone.

Images are pulled or built where that can be done. Elsewhere a stand-in takes the image's place:
a container that holds this machine's files, read-only, and runs the native stack's program
(``make stack-programs``), or this Python. Users, commands, mounts, volumes, networks and health
checks are those of the compose file either way. Grafana has no stand-in, and is left out.

    python -m ops.compose_check [--stand-ins]

Where no engine answers, root gets one for as long as the check lasts if ``dockerd`` is
installed. Exits 0 when all held, 1 when something did not, 2 when it could not be run, with a
line why.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import yaml

from esper_otel.leyline.metrics import BY_KEY
from ops.generate.prometheus_names import prometheus_name
from ops.stack.ports import LOOPBACK, free
from ops.stack.programs import (
    COLLECTOR,
    COMPOSE,
    JAEGER,
    PROMETHEUS,
    PROMETHEUS_3,
    ROOT,
    MissingError,
    Program,
    find,
    obtain,
)
from ops.stack.queries import Jaeger, Prometheus

DOCKER = ROOT / "docker"
STAND_IN = "esper-otel-check/stand-in"
RUN_ID = "compose-check"
TRAINER = ("run", "--enforce", "examples/digits.py")

PULL_S, UP_S, TRAIN_S, SEEN_S = 600.0, 240.0, 300.0, 60.0
"""Longest that an image, the stack, the training and what is sent may take."""

SEEN = 0.95
"""Share of the steps that Prometheus has at least: it keeps one of each millisecond."""

File = dict[str, Any]
"""A compose file, or a part of one."""


class CannotError(Exception):
    """Why the check cannot be run here, in one line."""


class StandIn(msgspec.Struct, frozen=True):
    """What a container without its image runs: ``folders`` are this machine's, read-only."""

    entrypoint: tuple[str, ...]
    folders: tuple[Path, ...]
    environment: Mapping[str, str] = {}
    user: str = ""
    healthcheck: tuple[str, ...] = ()
    """In the place of the image's own; empty: it stays."""


def stand_in_of_program(program: Program) -> StandIn:
    """A program of the native stack; raises :class:`MissingError`."""
    binary = find(program)
    return StandIn((str(binary),), (binary.parent, Path("/usr")))


def stand_in_of_prometheus() -> StandIn:
    """That of the image's version if it is here (``make test-deployed``), or Debian's.

    Debian's is too old to ask whether it is ready. Its folder belongs to root, as it would not
    in the image.
    """
    check: tuple[str, ...] = ()
    try:
        made = stand_in_of_program(PROMETHEUS_3)
    except MissingError:
        made = stand_in_of_program(PROMETHEUS)
        check = ("CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9090/-/ready")
    path = f"{made.folders[0]}:/usr/bin"
    return msgspec.structs.replace(
        made, user="0:0", environment={"PATH": path}, healthcheck=check
    )


def stand_in_of_python(command: str) -> StandIn:
    """A command of this Python's environment, with this checkout."""
    environment = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'sidecar'}",
        "HOME": "/var/lib/esper",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    folders = (Path(sys.base_prefix), Path(sys.prefix), ROOT, Path("/usr"))
    binary = Path(sys.prefix) / "bin" / command
    return StandIn((str(binary),), folders, environment, "10001:10001")


STAND_INS: dict[str, Callable[[], StandIn]] = {
    "collector": lambda: stand_in_of_program(COLLECTOR),
    "jaeger": lambda: stand_in_of_program(JAEGER),
    "prometheus": stand_in_of_prometheus,
    "tamiyo": lambda: stand_in_of_python("tamiyo"),
    "trainer": lambda: stand_in_of_python("esper-otel"),
}
"""Services that can do without their image."""


def derived(
    compose: File,
    stand_ins: Mapping[str, StandIn],
    left_out: Sequence[str],
    ports: Sequence[int],
) -> File:
    """The compose file as it is tried: with absolute paths, other ports and names of images.

    ``ports`` are published in the place of its own, in their order. Nothing else differs, but
    for services of ``stand_ins`` and those that are left out.
    """
    made = copy.deepcopy(compose)
    made.pop("name", None)
    given = iter(ports)
    for name in left_out:
        del made["services"][name]
    for name, service in made["services"].items():
        service["volumes"] = [_absolute(mount) for mount in service.get("volumes", ())]
        service["ports"] = [
            f"{LOOPBACK}:{next(given)}:{port.rpartition(':')[2]}"
            for port in service.get("ports", ())
        ]
        build = service.get("build")
        if build is not None:
            build["context"] = str(ROOT)
            service["image"] = f"esper-otel-check/{name}"
        if name in stand_ins:
            _stand_in(service, stand_ins[name])
    return made


def _absolute(mount: str) -> str:
    source, colon, rest = mount.partition(":")
    return f"{(DOCKER / source).resolve()}{colon}{rest}" if source.startswith(".") else mount


def _stand_in(service: File, by: StandIn) -> None:
    service.pop("build", None)
    service["image"] = STAND_IN
    service["entrypoint"] = list(by.entrypoint)
    service["environment"] = service.get("environment", {}) | dict(by.environment)
    service["working_dir"] = str(ROOT)
    seen: list[Path] = []
    for folder in by.folders:
        if not any(folder.is_relative_to(other) for other in seen):
            seen.append(folder)
    service["volumes"] += [f"{folder}:{folder}:ro" for folder in seen]
    if by.user:
        service["user"] = by.user
    if by.healthcheck:
        service["healthcheck"]["test"] = list(by.healthcheck)


FOLDERS = {
    "tmp": (0o1777, 0),
    "run/esper": (0o700, 10001),
    "var/lib/esper": (0o700, 10001),
    "prometheus": (0o700, 0),
}
"""What a stand-in has that is written to: mode and owner, which a volume takes over."""


def stand_in_image() -> bytes:
    """An image that holds nothing but links and folders."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("bin", "sbin", "lib", "lib64"):
            if (Path("/") / name).is_symlink():
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
                tar.addfile(link)
        for name, (mode, owner) in FOLDERS.items():
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            folder.uid = folder.gid = owner
            tar.addfile(folder)
    return file.getvalue()


class Engine:
    """A Docker engine, spoken to by its command line. ``environment`` says where it is."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)

    def answers(self) -> bool:
        """Whether it runs, and lets us in."""
        return self.tried("docker", "info", "--format", "{{.ServerVersion}}", seconds=30)

    def tried(self, *command: str, seconds: float, said: bytes | None = None) -> bool:
        """Whether a command does what it should; what it prints is not shown."""
        try:
            done = subprocess.run(
                command,
                input=said or b"",
                env=self._environment,
                capture_output=True,
                timeout=seconds,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def run(self, *command: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """Run a command, as text; its status is 124 where it took longer."""
        try:
            return subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            words = f"{' '.join(command)}: not done within {seconds:g} s"
            return subprocess.CompletedProcess(command, 124, "", words)


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """One that answers, or one of our own until the end; raises :class:`CannotError`."""
    if shutil.which("docker") is None:
        raise CannotError("docker is not here (Debian and Ubuntu: apt-get install docker.io)")
    answering = Engine(os.environ)
    if answering.answers():
        yield answering
        return
    if os.geteuid() != 0:
        raise CannotError("no Docker engine answers, and only root may start one")
    if shutil.which("dockerd") is None:
        raise CannotError(
            "no Docker engine answers, and dockerd, which starts one, is not here "
            "(Debian and Ubuntu: apt-get install docker.io)"
        )
    with _own_engine(folder) as own:
        yield own


@contextmanager
def _own_engine(folder: Path) -> Iterator[Engine]:
    address = f"unix://{folder / 'docker.sock'}"
    places = [
        f"--host={address}",
        f"--data-root={folder / 'data'}",
        f"--exec-root={folder / 'exec'}",
        f"--pidfile={folder / 'docker.pid'}",
    ]
    words = folder / "dockerd.log"
    print("compose: starting a Docker engine", flush=True)
    with words.open("wb") as log:
        process = subprocess.Popen(["dockerd", *places], stdout=log, stderr=log)
    own = Engine(os.environ | {"DOCKER_HOST": address})
    try:
        deadline = time.monotonic() + 60
        while not own.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                last = (words.read_text(errors="replace").splitlines() or ["nothing"])[-1]
                raise CannotError(f"dockerd did not start: {last}")
            time.sleep(0.2)
        yield own
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compose_command(docker: Engine) -> list[str]:
    """How compose, version 2 or newer, is called; raises :class:`CannotError`."""
    if docker.tried("docker", "compose", "version", seconds=30):
        return ["docker", "compose"]
    try:
        return [str(obtain(COMPOSE))]
    except MissingError as error:
        raise CannotError(str(error)) from None


def images(docker: Engine, compose: File) -> set[str]:
    """Services whose image can be had: it is here, is pulled, or what it is built from is."""
    base = "python:3.12-slim-bookworm"
    had = {}
    found = set()
    for name, service in compose["services"].items():
        image = base if "build" in service else service["image"]
        if image not in had:
            had[image] = docker.tried(
                "docker", "image", "inspect", image, seconds=30
            ) or docker.tried("docker", "pull", "--quiet", image, seconds=PULL_S)
            print(f"compose: {image}: {'here' if had[image] else 'cannot be pulled'}")
        if had[image]:
            found.add(name)
    return found


class Trial:
    """The stack of one project, up until :meth:`down`; says what held."""

    def __init__(self, docker: Engine, command: list[str], file: Path, made: File) -> None:
        self._docker = docker
        self._command = [*command, "-p", f"esper-check-{os.getpid()}", "-f", str(file)]
        self._services = made["services"]
        self.failed = 0

    def _compose(self, *words: str, seconds: float) -> subprocess.CompletedProcess[str]:
        return self._docker.run(*self._command, *words, seconds=seconds)

    def holds(self, what: str, held: bool, otherwise: str = "") -> bool:
        """Say whether ``what`` holds."""
        print(f"compose: {'ok' if held else 'FAILED'}: {what}", flush=True)
        if not held:
            self.failed += 1
            print(otherwise.rstrip(), file=sys.stderr, flush=True)
        return held

    def up(self) -> bool:
        """Start all but the trainer, and wait until they are healthy."""
        done = self._compose("up", "--build", "--detach", "--wait", seconds=UP_S)
        names = ", ".join(
            name for name, each in self._services.items() if "profiles" not in each
        )
        logs = ""
        if done.returncode:
            logs = self._compose("logs", "--tail=20", seconds=60).stdout
        return self.holds(f"{names} are up", done.returncode == 0, done.stderr + logs)

    def train(self) -> dict[str, Any] | None:
        """Have the example train with decisions enforced; its summary, None without one."""
        # One thread: beside others that compute, several wait for one another in a busy loop.
        told = ("-e", f"ESPER_RUN_ID={RUN_ID}", "-e", "ESPER_SUMMARY=json")
        told += ("-e", "OMP_NUM_THREADS=1")
        done = self._compose(
            "run", "--build", "--rm", "-T", *told, "trainer", *TRAINER, seconds=TRAIN_S
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
        trained = done.returncode == 0 and bool(lines)
        if not self.holds("the example trains", trained, done.stdout + done.stderr):
            return None
        summary: dict[str, Any] = json.loads(lines[-1])
        applied = sum(each["applied"] for each in summary["decisions"])
        self.holds(f"{applied} decisions were applied", applied > 0, str(summary))
        self.holds(
            "all telemetry was delivered",
            all(
                each["delivered"] == each["produced"] for each in summary["telemetry"].values()
            ),
            str(summary["telemetry"]),
        )
        return summary

    def look(self, steps: int) -> None:
        """Look for the run's steps and spans where people look at them."""
        prometheus = Prometheus(f"http://{self._published('prometheus', 9090)}")
        jaeger = Jaeger(f"http://{self._published('jaeger', 16686)}")
        selector = f'{prometheus_name(BY_KEY["loss"])}{{esper_run_id="{RUN_ID}"}}'
        count = 0

        def are_there() -> bool:
            nonlocal count
            count = sum(len(one.samples) for one in prometheus.series(selector))
            return count >= SEEN * steps

        there = _within(SEEN_S, are_there)
        self.holds(f"Prometheus has {count} of {steps} steps", there)
        for service in ("esper-trainer", "tamiyo"):
            found = _within(SEEN_S, partial(_is_any, jaeger, service))
            self.holds(f"Jaeger has spans of {service}", found)
        scraped = _within(
            SEEN_S, lambda: prometheus.value('min(up{part=~"collector|prometheus"})') == 1
        )
        self.holds("Prometheus scrapes the Collector and itself", scraped)

    def down(self) -> None:
        """Remove containers, networks, volumes and the images that were built."""
        self._compose("down", "--volumes", "--rmi=local", "--timeout=5", seconds=120)

    def _published(self, service: str, inside: int) -> str:
        (port,) = [
            port for port in self._services[service]["ports"] if port.endswith(f":{inside}")
        ]
        return str(port.rpartition(":")[0])


def _is_any(jaeger: Jaeger, service: str) -> bool:
    return bool(jaeger.traces(service))


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def check(docker: Engine, folder: Path, only_stand_ins: bool) -> int:
    """Try the stack in ``docker``; returns the exit status."""
    command = compose_command(docker)
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    real = set() if only_stand_ins else images(docker, compose)
    wanting = [name for name in compose["services"] if name not in real]
    try:
        stand_ins = {name: STAND_INS[name]() for name in wanting if name in STAND_INS}
    except MissingError as error:
        raise CannotError(str(error)) from None
    left_out = [name for name in wanting if name not in STAND_INS]
    if stand_ins and not docker.tried(
        "docker", "import", "-", STAND_IN, seconds=60, said=stand_in_image()
    ):
        raise CannotError("docker import does not take the image of the stand-ins")
    for said, names in (
        ("images", sorted(real)),
        ("stand-ins", [*stand_ins]),
        ("left out", left_out),
    ):
        print(f"compose: {said}: {', '.join(names) or 'none'}", flush=True)
    published = sum(len(each.get("ports", ())) for each in compose["services"].values())
    made = derived(compose, stand_ins, left_out, free(published))
    file = folder / "compose.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False))
    trial = Trial(docker, command, file, made)
    try:
        if trial.up() and (summary := trial.train()) is not None:
            trial.look(summary["steps"])
    finally:
        trial.down()
    return min(trial.failed, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.compose_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--stand-ins", action="store_true", help="do not ask for images")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="esper-compose-"))
    os.environ.setdefault("GRAFANA_ADMIN_PASSWORD", os.urandom(12).hex())
    try:
        with engine(folder) as docker:
            return check(docker, folder, options.stand_ins)
    except CannotError as error:
        print(
            f"compose: the stack cannot be tried in containers here: {error}", file=sys.stderr
        )
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
