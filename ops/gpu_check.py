"""What is promised of a GPU, checked on one: ``make test-gpu``, in at most eight minutes.

Runs the tests marked ``cuda`` and ``bench/gpu.py``, and writes what came of them to
``bench/GPU_RESULTS.md``. It installs nothing: it needs a checkout, a Python with a CUDA build
of torch, and the wheels that it names when one is missing. ``ESPER_GPU_DEVICE=cpu`` tries the
check itself where there is no GPU.

    python -m ops.gpu_check [--out FILE]

Exits 0 when all passed, 1 when something failed, 2 when it could not be run, with a line why.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "GPU_RESULTS.md"

NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "msgspec": "msgspec",
    "wrapt": "wrapt",
    "psutil": "psutil",
    "packaging": "packaging",
    "yaml": "pyyaml",
    "grpc": "grpcio",
    "aiohttp": "aiohttp",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.proto": "opentelemetry-proto",
    "opentelemetry.instrumentation": "opentelemetry-instrumentation",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.exporter.otlp.proto.grpc": "opentelemetry-exporter-otlp-proto-grpc",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
}
"""Modules, and the wheels that bring them."""

TESTS_S, BENCH_S = 240.0, 240.0
"""Longest that each part may take."""


def missing() -> list[str]:
    """Wheels that this Python lacks."""
    return [wheel for module, wheel in NEEDED.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def devices() -> list[str]:
    """The GPUs that torch can use, by name."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def environment() -> dict[str, str]:
    """That of the checks: the checkout goes first, and matrix products repeat to the bit."""
    paths = [str(ROOT / "src"), str(ROOT / "sidecar"), str(ROOT)]
    paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "ESPER_SUMMARY": "off",
    }


def tests() -> tuple[bool, str]:
    """Whether the tests passed, and the last lines that they printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "cuda", "tests/gpu"]
    return _run(command, TESTS_S)


def bench(rows: Path) -> tuple[bool, str]:
    """Whether the bench ran; its rows are in ``rows``."""
    command = [sys.executable, "-m", "bench.gpu", "--json", str(rows)]
    return _run(command, BENCH_S)


def _run(command: list[str], seconds: float) -> tuple[bool, str]:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done within {seconds:g} s"
    print(done.stdout, flush=True)
    return done.returncode == 0, "\n".join(done.stdout.strip().splitlines()[-12:])


def page(device: str, parts: Mapping[str, tuple[bool, str]]) -> str:
    """The results, for people."""
    lines = [
        "<!-- Made by make test-gpu; edits here are lost. -->",
        "",
        "# Results on a GPU",
        "",
        f"Run {time.strftime('%Y-%m-%d')} on: {device}, torch {metadata.version('torch')}, "
        f"Python {platform.python_version()}.",
    ]
    for name, (passed, said) in parts.items():
        lines += ["", f"## {name}: {'passed' if passed else '**failed**'}", ""]
        lines += ["```", said, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    out: Path = parser.parse_args().out
    lacking = missing()
    if lacking:
        return _cannot(f"these wheels are missing: {' '.join(lacking)}")
    found = devices()
    if not found and os.environ.get("ESPER_GPU_DEVICE") != "cpu":
        return _cannot("torch finds no GPU here; nothing was run")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        parts = {"tests": tests(), "bench": bench(rows)}
        held = rows.exists() and _bars_hold(rows)
    out.write_text(page(found[0] if found else "no GPU: the CPU in its place", parts))
    print(f"written: {out}")
    return 0 if held and all(passed for passed, _ in parts.values()) else 1


def _bars_hold(rows: Path) -> bool:
    from bench.figures import Figure

    figures = msgspec.json.decode(rows.read_bytes(), type=list[Figure])
    return all(figure.holds is not False for figure in figures)


def _cannot(why: str) -> int:
    print(f"esper-otel: the GPU check cannot be run: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
