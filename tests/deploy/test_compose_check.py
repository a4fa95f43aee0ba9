"""The check in a Docker engine tries the compose file itself, and says why where it cannot."""

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from ops import compose_check
from ops.compose_check import CannotError, StandIn, derived, engine, stand_in_image

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
PORTS = list(range(20001, 20006))
KEPT = {
    *("read_only", "cap_drop", "security_opt", "command", "tmpfs", "depends_on", "restart"),
    "profiles",
}
"""What is the compose file's own, whatever takes an image's place."""


def of(folder):
    return StandIn((f"{folder}/program",), (folder, folder / "within"), {"PATH": str(folder)})


def is_valid(made, tmp_path):
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False))
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = subprocess.run(
        [Path(sys.executable).parent / "check-jsonschema", *schema, file], capture_output=True
    )
    return done.returncode == 0


@pytest.mark.parametrize("stand_ins", [(), ("collector", "tamiyo", "trainer")], ids=str)
def test_what_is_tried_is_the_compose_file(tmp_path, stand_ins):
    made = derived(COMPOSE, {name: of(tmp_path) for name in stand_ins}, ["grafana"], PORTS)
    assert is_valid(made, tmp_path)
    assert made["volumes"] == COMPOSE["volumes"]
    assert {*made["services"]} == {*COMPOSE["services"]} - {"grafana"}
    for name, service in made["services"].items():
        own = COMPOSE["services"][name]
        assert {k: v for k, v in service.items() if k in KEPT} == {
            k: v for k, v in own.items() if k in KEPT
        }
        assert service.get("healthcheck") == own.get("healthcheck")
        assert own.get("environment", {}).items() <= service.get("environment", {}).items()
        targets = [mount.split(":")[1] for mount in own.get("volumes", ())]
        assert [mount.split(":")[1] for mount in service["volumes"]][: len(targets)] == targets
        assert not [mount for mount in service["volumes"] if mount.startswith(".")]
        assert len(service["ports"]) == len(own.get("ports", ()))
        if name in stand_ins:
            assert service["image"] == compose_check.STAND_IN
            assert f"{tmp_path}:{tmp_path}:ro" in service["volumes"]
            assert f"{tmp_path}/within:{tmp_path}/within:ro" not in service["volumes"]
        elif "build" not in own:
            assert service["image"] == own["image"]
    published = [port for each in made["services"].values() for port in each["ports"]]
    assert all(re.match(r"127\.0\.0\.1:2000\d:\d+$", port) for port in published)
    assert len({*published}) == len(published)


def test_a_stack_that_runs_keeps_its_images():
    made = derived(COMPOSE, {}, [], PORTS)
    for name in ("tamiyo", "trainer"):
        assert made["services"][name]["image"] != COMPOSE["services"][name]["image"]
    assert "name" not in made


def test_every_service_but_grafana_has_a_stand_in():
    assert {*compose_check.STAND_INS} == {*COMPOSE["services"]} - {"grafana"}


def test_the_image_of_stand_ins_has_the_folders_that_the_images_have():
    with tarfile.open(fileobj=io.BytesIO(stand_in_image())) as tar:
        owned = {each.name: (each.uid, each.mode) for each in tar if each.isdir()}
        assert not [each for each in tar if each.isfile()]
    for path in (ROOT / "docker").glob("*.Dockerfile"):
        (user, folders) = re.findall(
            r"install -d -o (\d+) -g \d+ -m 0700 (.*)$", path.read_text(), re.MULTILINE
        )[0]
        for folder in folders.split():
            assert owned[folder.strip("/")] == (int(user), 0o700)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes programs, which are then all that there are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name, text):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return make


def why(tmp_path):
    with pytest.raises(CannotError) as raised, engine(tmp_path):
        pass
    return str(raised.value)


def test_without_docker_nothing_is_tried(programs, tmp_path, capsys):
    assert "docker is not here" in why(tmp_path)
    assert compose_check.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compose: the stack cannot be tried in containers here: docker is ")


def test_without_an_engine_root_needs_dockerd_and_others_need_root(
    programs, tmp_path, monkeypatch
):
    programs("docker", "exit 1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root may start one" in why(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "dockerd, which starts one, is not here" in why(tmp_path)
    programs("dockerd", "echo no bridge >&2; exit 1")
    assert why(tmp_path) == "dockerd did not start: no bridge"


def test_an_engine_that_answers_is_taken(programs, tmp_path):
    programs("docker", "exit 0")
    with engine(tmp_path) as answering:
        assert answering.answers()


def test_a_command_that_takes_too_long_has_failed(programs, tmp_path):
    programs("docker", "exec /bin/sleep 60")
    docker = compose_check.Engine(os.environ)
    assert not docker.tried("docker", "pull", seconds=0.05)
    done = docker.run("docker", "pull", seconds=0.05)
    assert (done.returncode, done.stderr) == (124, "docker pull: not done within 0.05 s")
