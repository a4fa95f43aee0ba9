"""The stack in containers: what can be known of its files without an engine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from esper_otel.settings import EsperSettings
from ops.generate.dashboards.json_files import FOLDER
from ops.stack import recipes, services

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
BIN = Path(sys.executable).parent


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_it_is_a_compose_file():
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = run(BIN / "check-jsonschema", *schema, DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_would_find_a_mistake(tmp_path):
    wrong = tmp_path / "compose.yaml"
    wrong.write_text("services: {a: {image: b, helthcheck: {}}}\n")
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong)
    assert done.returncode == 1
    assert "helthcheck" in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_linter_finds_nothing_in_a_dockerfile(path):
    done = run(BIN / "hadolint", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_parts_are_those_of_the_native_stack_and_two_more(tmp_path):
    here, ports = Path(sys.executable), services.Ports()
    native = (
        services.prometheus(here, ports, tmp_path),
        services.jaeger(here, ports),
        services.tamiyo(ports, tmp_path / "socket"),
        services.collector(here, ports, tmp_path),
    )
    assert {*SERVICES} == {one.name for one in native} | {"grafana", "trainer"}


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned_and_its_container_can_write_only_its_volumes(name):
    service = SERVICES[name]
    _, _, tag = service["image"].partition(":")
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag)
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_collectors_image_is_of_the_release_that_is_built():
    built = yaml.safe_load((ROOT / "collector" / "builder.yaml").read_text())["dist"]["version"]
    assert SERVICES["collector"]["image"].endswith(f"contrib:{built}")


def test_the_image_of_prometheus_is_what_the_tests_can_be_run_on():
    _, _, module = recipes.PROMETHEUS_3.partition("@v0.")
    major, minor, patch = int(module[0]), int(module[1:3]), int(module[4:])
    assert SERVICES["prometheus"]["image"] == f"prom/prometheus:v{major}.{minor}.{patch}"


@pytest.mark.parametrize("name", SERVICES)
def test_what_up_waits_for_stays(name):
    # A container that has ended, however well, is a failure to `up --wait`.
    by_itself = "profiles" not in SERVICES[name]
    assert by_itself is (SERVICES[name]["restart"] == "unless-stopped")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_on_loopback(name):
    for port in SERVICES[name].get("ports", ()):
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", sorted({*SERVICES} - {"collector", "trainer"}))
def test_it_says_whether_it_is_well(name):
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


def test_nobody_is_admin_without_a_password():
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")


def mounts(name):
    """Place in the container → file or folder here, or name of a volume."""
    for mount in SERVICES[name].get("volumes", ()):
        source, target, *_ = mount.split(":")
        yield target, (DOCKER / source).resolve() if source.startswith(".") else source


NATIVE = {
    "collector": {"/etc/esper/local.yaml": services.CONFIG},
    "jaeger": {"/etc/jaeger/jaeger.yaml": services.JAEGER_CONFIG},
    "prometheus": {
        "/etc/prometheus/prometheus.yml": services.PROMETHEUS_FOLDER / "prometheus.yml",
        "/etc/prometheus/rules": services.PROMETHEUS_FOLDER / "rules",
        "/etc/prometheus/targets": services.PROMETHEUS_FOLDER / "targets",
        "/etc/prometheus/assets": services.PROMETHEUS_FOLDER / "assets",
    },
    "grafana": {
        "/etc/grafana/provisioning": DOCKER / "grafana" / "provisioning",
        "/etc/esper/dashboards": ROOT / FOLDER,
    },
    "tamiyo": {},
    "trainer": {},
}
"""What the tests run natively, by where a container has it."""


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_what_runs_natively(name):
    found = dict(mounts(name))
    files = {target: path for target, path in found.items() if isinstance(path, Path)}
    assert files == NATIVE[name]
    assert all(path.exists() for path in files.values())
    assert {volume for volume in found.values() if isinstance(volume, str)} <= {
        *COMPOSE["volumes"]
    }
    for mount in SERVICES[name].get("volumes", ()):
        assert mount.startswith("./") is mount.endswith(":ro") or "collector/" in mount


@pytest.mark.parametrize(
    ("name", "config"), [("collector", services.CONFIG), ("jaeger", services.JAEGER_CONFIG)]
)
def test_what_a_container_is_told_is_what_its_configuration_reads(name, config):
    read = set(re.findall(r"\$\{env:(\w+)", config.read_text())) | {"GOMEMLIMIT"}
    assert {*SERVICES[name]["environment"]} <= read


def test_a_trainer_is_told_what_it_knows():
    told = SERVICES["trainer"]["environment"]
    ours = {key: value for key, value in told.items() if key.startswith("ESPER_")}
    settings = EsperSettings.from_environment(ours)
    assert str(settings.tamiyo_socket) == ours["ESPER_TAMIYO_SOCKET"]
    assert str(settings.spool_dir) == ours["ESPER_SPOOL_DIR"]


def test_prometheus_scrapes_the_parts_by_the_names_they_have():
    (path,) = (services.PROMETHEUS_FOLDER / "targets").glob("*.yaml")
    hosts = {
        target.rpartition(":")[0]
        for group in yaml.safe_load(path.read_text())
        for target in group["targets"]
    }
    assert hosts <= {*SERVICES} | {"localhost"}


def test_grafana_is_told_where_the_others_are():
    source = (DOCKER / "grafana/provisioning/datasources/esper.yaml").read_text()
    wanted = set(re.findall(r"\$(GRAFANA_\w+_URL)", source))
    told = SERVICES["grafana"]["environment"]
    assert wanted <= {*told}
    for name in wanted:
        assert re.fullmatch(r"http://(\w+):\d+", told[name]).group(1) in SERVICES


def test_trainer_and_sidecar_have_one_user_and_one_folder_for_the_socket():
    users = set()
    for path in DOCKERFILES:
        (user,) = re.findall(r"^USER (.*)$", path.read_text(), re.MULTILINE)
        users.add(user)
    assert users == {"10001:10001"}
    socket = SERVICES["trainer"]["environment"]["ESPER_TAMIYO_SOCKET"]
    assert f"--socket={socket}" in SERVICES["tamiyo"]["command"]
    for name in ("trainer", "tamiyo"):
        assert dict(mounts(name))["/run/esper"] == "socket"


def test_images_are_made_from_what_they_copy_and_nothing_more():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for path in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.*)$", path.read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)
    assert "torch" not in (DOCKER / "sidecar.Dockerfile").read_text().partition("\n")[2]


@pytest.fixture
def serving(tmp_path):
    """Tamiyo as the container runs it, with folders and ports of this test."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    places = {"/run/esper": str(folder), "/var/lib/esper": str(tmp_path)}
    command = [re.sub(r":\d+$", ":0", word) for word in SERVICES["tamiyo"]["command"]]
    for inside, outside in places.items():
        command = [word.replace(inside, outside) for word in command]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    process = subprocess.Popen(
        [BIN / "tamiyo", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**clean, "PYTHONUNBUFFERED": "1"},
    )
    yield process
    process.terminate()
    process.communicate(timeout=20)


def test_tamiyo_takes_the_options_it_is_given(serving):
    said = []
    for line in serving.stdout:
        said.append(line)
        if line.startswith("tamiyo ready "):
            return
    raise AssertionError("".join(said))
