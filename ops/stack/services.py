"""The parts of the stack as processes: what they are told, and when they are ready."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ops.stack.ports import LOOPBACK
from ops.stack.programs import ROOT
from ops.stack.recipes import PAGE_FOLDER

CONFIG = ROOT / "collector" / "local.yaml"
PROMETHEUS_FOLDER = ROOT / "docker" / "prometheus"
JAEGER_CONFIG = ROOT / "docker" / "jaeger" / "jaeger.yaml"


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Where each part listens, on loopback. The first two are where trainers send to."""

    otlp_grpc: int = 4317
    otlp_http: int = 4318
    handover: int = 4316
    collector_health: int = 13133
    collector_metrics: int = 8888
    tamiyo_grpc: int = 4327
    tamiyo_http: int = 4328
    jaeger_otlp: int = 4337
    jaeger_grpc: int = 16685
    jaeger: int = 16686
    traces: int = 16687
    prometheus: int = 9090


class Service(msgspec.Struct, frozen=True):
    """One process: ``ready`` is a URL that answers 200, or words that it says.

    ``ending_s`` is the longest that it may take to end when asked to; then it is killed.
    """

    name: str
    command: tuple[str, ...]
    ready: str
    environment: Mapping[str, str] = {}
    ending_s: float = 15.0


def collector_environment(ports: Ports, state: Path) -> dict[str, str]:
    """What ``collector/*.yaml`` reads, for this stack."""
    return {
        "COLLECTOR_OTLP_GRPC": _at(ports.otlp_grpc),
        "COLLECTOR_OTLP_HTTP": _at(ports.otlp_http),
        "COLLECTOR_HANDOVER": _at(ports.handover),
        "COLLECTOR_HEALTH": _at(ports.collector_health),
        "COLLECTOR_METRICS_HOST": LOOPBACK,
        "COLLECTOR_METRICS_PORT": str(ports.collector_metrics),
        "COLLECTOR_STATE": str(state / "collector"),
        # Four fifths of COLLECTOR_MEMORY_MIB, where the limiter begins to put requests off.
        "GOMEMLIMIT": "410MiB",
        "TAMIYO_OTLP": f"http://{_at(ports.tamiyo_http)}",
        "JAEGER_OTLP": _at(ports.jaeger_otlp),
        "PROMETHEUS_URL": f"http://{_at(ports.prometheus)}",
    }


def collector(
    program: Path, ports: Ports, state: Path, configs: tuple[Path, ...] = (CONFIG,)
) -> Service:
    """The Collector with ``configs``, the later over the earlier."""
    return Service(
        "collector",
        (str(program), *(word for path in configs for word in ("--config", str(path)))),
        f"http://{_at(ports.collector_health)}/",
        collector_environment(ports, state),
    )


def prometheus(program: Path, ports: Ports, state: Path) -> Service:
    """Prometheus with the repository's configuration and this stack's targets."""
    folder = state / "prometheus"
    # Debian's binary looks for its page below /usr unless it is told where else.
    page = program.parent / PAGE_FOLDER
    (folder / "targets").mkdir(parents=True, exist_ok=True)
    for name in ("prometheus.yml", "rules"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(PROMETHEUS_FOLDER / name)
    targets = {"collector": ports.collector_metrics, "prometheus": ports.prometheus}
    (folder / "targets" / "stack.yaml").write_text(
        "".join(
            f"- targets: ['{_at(port)}']\n  labels: {{part: {part}}}\n"
            for part, port in targets.items()
        )
    )
    return Service(
        "prometheus",
        (
            str(program),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={_at(ports.prometheus)}",
            "--web.enable-remote-write-receiver",
            f"--web.user-assets={PROMETHEUS_FOLDER / 'assets'}",
            f"--web.external-url=http://{_at(ports.prometheus)}",
            *([f"--web.local-assets={page}"] if page.is_dir() else []),
        ),
        f"http://{_at(ports.prometheus)}/-/ready",
    )


def jaeger(program: Path, ports: Ports) -> Service:
    """Jaeger with its store in memory."""
    return Service(
        "jaeger",
        (str(program), "--config", str(JAEGER_CONFIG)),
        f"http://{_at(ports.jaeger)}/api/services",
        {
            "JAEGER_OTLP": _at(ports.jaeger_otlp),
            "JAEGER_UI": _at(ports.jaeger),
            "JAEGER_GRPC": _at(ports.jaeger_grpc),
        },
        # It takes ten seconds over it, and its store is gone either way.
        ending_s=1.0,
    )


def traces_page(ports: Ports) -> Service:
    """The page on which people look at the traces that Jaeger has."""
    return Service(
        "traces",
        (
            *(sys.executable, "-m", "ops.stack.traces_page", "--port", str(ports.traces)),
            *("--jaeger", f"http://{_at(ports.jaeger)}"),
        ),
        f"http://{_at(ports.traces)}/perfetto/index.html",
        {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        ending_s=1.0,
    )


def tamiyo(ports: Ports, socket: Path) -> Service:
    """The sidecar; the Collector takes the usual OTLP ports, so it has others."""
    return Service(
        "tamiyo",
        (
            str(Path(sys.executable).with_name("tamiyo")),
            *("serve", "--socket", str(socket)),
            *("--otlp-grpc", _at(ports.tamiyo_grpc), "--otlp-http", _at(ports.tamiyo_http)),
        ),
        "tamiyo ready ",
        # A line that says ready is of use only when it comes.
        {
            "PYTHONUNBUFFERED": "1",
            # Its own telemetry goes the way of the trainers'.
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{_at(ports.otlp_http)}",
            "OTEL_METRIC_EXPORT_INTERVAL": "15000",
        },
    )


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would reach into a part of the stack."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    return kept | dict(more)


def _at(port: int) -> str:
    return f"{LOOPBACK}:{port}"
