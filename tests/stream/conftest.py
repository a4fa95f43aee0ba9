"""What the tests of the stream share."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import nan
from pathlib import Path

import pytest

from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream
from testkit.patience import PATIENCE_S


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object]], None]:
    """Poll a condition until it is true, 60 s at most."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError("not within 60 s")
            time.sleep(0.005)

    return wait


@pytest.fixture
def row() -> Callable[..., list[float]]:
    """A step's row: its number, a loss, everything else absent unless named."""

    def make(step: int, loss: float = 0.5, **values: float) -> list[float]:
        given = {"step": float(step), "loss": loss, **values}
        return [given.get(key, nan) for key in STEP_KEYS]

    return make


@pytest.fixture
def seed() -> Callable[..., tuple[str, list[float]]]:
    """A seed's id and row: stage and alpha, everything else absent."""

    def make(seed_id: str, alpha: float = 0.25) -> tuple[str, list[float]]:
        given = {"kasmina.seed.stage": 3.0, "kasmina.seed.alpha": alpha}
        return seed_id, [given.get(key, nan) for key in SEED_KEYS]

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., EsperSettings]:
    """Settings that drain every 10 ms and leave files below ``tmp_path``."""

    def make(**changes: object) -> EsperSettings:
        given = {
            "stream_interval_ms": 10.0,
            "spool_dir": str(tmp_path / "spool"),
            **changes,
        }
        return EsperSettings(**given)

    return make


@pytest.fixture
def open_stream(settings: Callable[..., EsperSettings]):
    """A started stream that sends to a URL; closed at the end without waiting."""
    opened: list[Stream] = []

    def make(url: str, environ: dict[str, str] | None = None, **changes: object) -> Stream:
        stream = Stream(
            settings(**changes),
            run_id="run",
            instance_id="instance",
            environ={"OTEL_EXPORTER_OTLP_ENDPOINT": url, **(environ or {})},
        )
        stream.start()
        opened.append(stream)
        return stream

    yield make
    for stream in opened:
        stream.close(0.0)
