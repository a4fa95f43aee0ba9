"""The arrows between packages, and what importing each of them may bring along."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    "esper_otel": ROOT / "src" / "esper_otel",
    "esper_tamiyo": ROOT / "sidecar" / "esper_tamiyo",
}

MAY_IMPORT = {
    "esper_otel.leyline": {"esper_otel.leyline"},
    "esper_otel._version": set(),
    "esper_otel.choices": set(),
    "esper_otel.run_settings": {"esper_otel.leyline"},
    "esper_otel.settings": {
        "esper_otel.choices",
        "esper_otel.leyline",
        "esper_otel.run_settings",
    },
    "esper_otel.run_config": {"esper_otel.leyline"},
    "esper_otel.home": {"esper_otel._version", "esper_otel.leyline"},
    "esper_otel.finalization": set(),
    "esper_otel.tolaria": {
        "esper_otel.finalization",
        "esper_otel.leyline",
        "esper_otel.tolaria",
    },
    "esper_otel.kasmina": {
        "esper_otel.finalization",
        "esper_otel.kasmina",
        "esper_otel.leyline",
        "esper_otel.settings",
    },
    "esper_otel.tamiyo": {"esper_otel.leyline", "esper_otel.tamiyo"},
    "esper_otel.ranks": {
        "esper_otel.finalization",
        "esper_otel.kasmina",
        "esper_otel.leyline",
        "esper_otel.ranks",
        "esper_otel.settings",
    },
    "esper_otel.report": {
        "esper_otel._version",
        "esper_otel.leyline",
        "esper_otel.report",
    },
    "esper_otel.export": {
        "esper_otel.export",
        "esper_otel.leyline",
        "esper_otel.report",
        "esper_otel.stream",
    },
    "esper_otel.top": {
        "esper_otel.leyline",
        "esper_otel.report",
        "esper_otel.top",
    },
    "esper_otel.stream": {
        "esper_otel._version",
        "esper_otel.home",
        "esper_otel.leyline",
        "esper_otel.run_config",
        "esper_otel.run_settings",
        "esper_otel.settings",
        "esper_otel.stream",
    },
    "esper_tamiyo": {"esper_otel.leyline", "esper_otel.report", "esper_tamiyo"},
}
"""Package → packages of ours it may import; whoever is not named here may import all."""


OF_THE_SIDECAR = {
    "language": set(),
    "judging": {"language"},
    "receiving": {"language", "child_process", "latency"},
    "replaying": {"language", "judging", "receiving"},
    "keeping": {"language", "judging", "child_process", "latency", "release"},
    "journaling": {"language", "judging", "child_process", "latency", "release"},
    "showing": {"receiving", "keeping", "journaling", "child_process", "latency"},
    "serving": {
        *("language", "judging", "receiving", "journaling", "keeping", "child_process"),
        *("latency", "showing"),
    },
}
"""Package of ``esper_tamiyo`` → others of it that it may import; commands import all."""


def modules(package):
    """Modules of a package, or the one module of that name."""
    top, *rest = package.split(".")
    path = SOURCES[top].joinpath(*rest)
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@cache
def imported(module):
    names = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize(("package", "allowed"), MAY_IMPORT.items(), ids=MAY_IMPORT)
def test_arrows_point_one_way(package, allowed):
    for module in modules(package):
        for name in imported(module):
            if name.split(".")[0] not in SOURCES:
                continue
            home = ".".join(name.split(".")[:2]) if name.startswith("esper_otel.") else "top"
            if name.startswith("esper_tamiyo"):
                home = "esper_tamiyo"
            elif name == "esper_otel" or name.startswith("esper_otel.__"):
                home = "esper_otel"
            assert home in allowed or name in allowed, f"{module}: imports {name}"


@pytest.mark.parametrize(("package", "others"), OF_THE_SIDECAR.items(), ids=OF_THE_SIDECAR)
def test_arrows_within_the_sidecar_point_one_way(package, others):
    for module in modules(f"esper_tamiyo.{package}"):
        for name in imported(module):
            if name.startswith("esper_tamiyo."):
                home = name.split(".")[1]
                assert home in others | {package}, f"{module}: imports {name}"


@pytest.mark.parametrize("package", SOURCES)
def test_the_product_does_without_what_serves_the_repository(package):
    beside = {"bench", "examples", "ops", "testkit", "tests"}
    for module in modules(package):
        assert beside.isdisjoint(name.split(".")[0] for name in imported(module)), module


def test_only_providers_imports_the_sdk():
    users = {
        module.name
        for module in modules("esper_otel")
        if any(name.startswith("opentelemetry.sdk") for name in imported(module))
    }
    assert users == {"providers.py"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("esper_otel", {"torch", "numpy", "grpc", "google", "requests", "aiohttp", "msgspec"}),
        ("esper_otel.run", {"torch", "grpc", "google.protobuf", "requests", "aiohttp"}),
        ("esper_otel.cli", {"torch", "numpy", "grpc", "google.protobuf", "requests"}),
        ("esper_tamiyo.cli", {"torch", "numpy", "grpc", "google.protobuf", "aiohttp"}),
        (
            "esper_tamiyo.serving.server",
            {"torch", "numpy", "grpc", "google.protobuf", "aiohttp"},
        ),
        ("esper_tamiyo.receiving.ingest", {"torch"}),
        ("esper_tamiyo.showing.ui", {"torch", "grpc"}),
    ],
)
def test_importing_brings_nothing_heavy_along(module, heavy):
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_whatever_is_told_goes_through_one_module():
    tellers = set()
    for package in SOURCES:
        for module in modules(package):
            for node in ast.walk(ast.parse(module.read_text())):
                if isinstance(node, ast.Call) and (
                    getattr(node.func, "id", "") == "print"
                    or ast.unparse(node.func) in ("sys.stdout.write", "sys.stderr.write")
                ):
                    tellers.add(module.name)
    # A Python that cannot load us has to be told without us.
    assert tellers == {"terminal.py", "sitecustomize.py"}
