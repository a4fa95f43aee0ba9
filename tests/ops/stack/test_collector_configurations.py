"""Every configuration is one that the Collector takes, by either set of names."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from bench.sizing import QUEUE_BYTES
from ops.stack import recipes
from ops.stack.configuration import complaint
from ops.stack.programs import ROOT

COLLECTOR = ROOT / "collector"
SETS = [
    ("local.yaml",),
    ("agent.yaml",),
    ("gateway.yaml",),
    ("local.yaml", "recording.yaml"),
    ("gateway.yaml", "recording.yaml"),
    ("local.yaml", "scraped.yaml"),
    ("gateway.yaml", "scraped.yaml"),
    ("local.yaml", "logs.yaml"),
    ("gateway.yaml", "logs.yaml", "recording.yaml"),
]

FORMER_NAMES = {
    "exporters": {
        "otlp_grpc": "otlp",
        "otlp_http": "otlphttp",
        "load_balancing": "loadbalancing",
        "prometheus_remote_write": "prometheusremotewrite",
    },
    "connectors": {"span_metrics": "spanmetrics"},
}
"""What contrib images before the new names call the components, and later ones still take."""


def environment(tmp_path):
    state = {"COLLECTOR_STATE": str(tmp_path), "COLLECTOR_RECORDINGS": str(tmp_path)}
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | state


def in_former_names(text):
    """The configuration ``text`` with every component called what it once was."""
    for names in FORMER_NAMES.values():
        for new, old in names.items():
            text = re.sub(rf"(?<![\w/]){new}(?=[/:,\]]|$)", old, text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_it_is_valid(collector_program, tmp_path, names):
    configs = [COLLECTOR / name for name in names]
    assert complaint(collector_program, configs, environment(tmp_path)) is None


def test_the_backend_on_the_page_is_valid(collector_program, tmp_path):
    page = (ROOT / "docs" / "how-to" / "backends.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    added = tmp_path / "backend.yaml"
    configs = [COLLECTOR / "local.yaml", added]
    given = environment(tmp_path) | {"BACKEND_TOKEN": "some"}
    added.write_text(text)
    assert complaint(collector_program, configs, given) is None
    added.write_text(text.replace("memory_limiter", "memory_limit"))
    assert "memory_limit" in complaint(collector_program, configs, given)


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_it_is_valid_by_the_former_names(collector_program, tmp_path, names):
    configs = []
    for name in names:
        configs.append(tmp_path / name)
        configs[-1].write_text(in_former_names((COLLECTOR / name).read_text()))
    now = {name for names in FORMER_NAMES.values() for name in names}
    for config in configs:
        assert not {component for _, component in components(config)} & now
    assert complaint(collector_program, configs, environment(tmp_path)) is None


def components(config):
    """(section, type) of everything a configuration names."""
    parsed = yaml.safe_load(config.read_text())
    for section in SECTIONS:
        for component in parsed.get(section, {}):
            yield section, component.split("/")[0]


SECTIONS = ("extensions", "receivers", "processors", "connectors", "exporters")


def distribution(binary):
    """{(section, type): module} of what a Collector's binary has."""
    command = [str(binary), "components"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    has = yaml.safe_load(listed.stdout)
    return {
        (section, one["name"]): one["module"] for section in SECTIONS for one in has[section]
    }


def used():
    """(section, type) of everything that any of the configurations names."""
    paths = (path for path in COLLECTOR.glob("*.yaml") if path.name != "builder.yaml")
    return {pair for path in paths for pair in components(path)}


def test_the_distribution_has_what_they_use_and_nothing_else(collector_program):
    has = distribution(collector_program).keys()
    if Path(collector_program).name == "esper-otelcol":
        assert has == used()
    else:
        assert has >= used()


def test_the_image_of_contrib_has_what_they_use(collector_program):
    # By contrib's own report; what else they use is the core's, and in every distribution.
    report = Path(collector_program).parent / "image.yaml"
    if not report.is_file():
        pytest.skip(f"{report} is not here: `make collector` gets it with our own Collector")
    image = yaml.safe_load(report.read_text())["components"]
    built = distribution(collector_program)
    of_contrib = {pair for pair in used() if built[pair].startswith(recipes.CONTRIB)}
    assert len(of_contrib) > 5
    for section, name in of_contrib:
        assert name in image[section.removesuffix("s")]


def test_versions_are_pinned_and_of_one_release():
    manifest = (COLLECTOR / "builder.yaml").read_text()
    versions = set(re.findall(r"gomod: \S+ v(0\.\d+\.\d+)$", manifest, re.MULTILINE))
    assert versions == {yaml.safe_load(manifest)["dist"]["version"]}
    assert set(re.findall(r"cmd/builder@v(\S+)", manifest)) == versions


def test_a_misspelt_component_is_told_in_the_collectors_own_words(collector_program, tmp_path):
    config = tmp_path / "local.yaml"
    text = (COLLECTOR / "local.yaml").read_text()
    config.write_text(text.replace("  memory_limiter:\n", "  memory_limitr:\n", 1))
    told = complaint(collector_program, [config], environment(tmp_path))
    assert told is not None
    assert told.startswith(f"{config}: ")
    assert "\n" not in told
    assert 'unknown type: "memory_limitr"' in told
    assert "memory_limiter" in told.partition("valid values")[2]


def test_every_setting_is_explained_at_the_head():
    for path in COLLECTOR.glob("*.yaml"):
        text = path.read_text()
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        for variable in set(re.findall(r"\$\{env:(\w+):-", text)):
            short = variable.removeprefix("COLLECTOR")
            assert variable in head or short in head, f"{path.name}: {variable}"


def test_queues_are_as_large_as_the_runbooks_sizes_say():
    for name in ("local", "agent", "gateway"):
        text = (COLLECTOR / f"{name}.yaml").read_text()
        assert {*re.findall(r"COLLECTOR_QUEUE_BYTES:-(\d+)", text)} == {str(QUEUE_BYTES)}


@pytest.mark.parametrize("name", ["local", "gateway"])
def test_the_handover_takes_what_is_taken_from_the_disk_together(name):
    config = yaml.safe_load((COLLECTOR / f"{name}.yaml").read_text())
    most = config["receivers"]["otlp/handover"]["protocols"]["grpc"]["max_recv_msg_size_mib"]
    batch = config["exporters"]["otlp_grpc/prometheus"]["sending_queue"]["batch"]
    assert batch["max_size"] * 1024 <= most << 20, "a kilobyte for each point"


def test_prometheus_takes_its_configuration(promtool):
    config = ROOT / "docker" / "prometheus" / "prometheus.yml"
    done = subprocess.run(
        [str(promtool), "check", "config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
