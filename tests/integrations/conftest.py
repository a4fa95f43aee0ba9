from __future__ import annotations

import warnings

import pytest

from esper_otel import process
from esper_otel import run as runs
from esper_otel.integrations.torch import TorchInstrumentor
from integrations.captured_streams import CapturedRuns, CapturedStream


@pytest.fixture
def captured(monkeypatch):
    """The frames of whatever run is started during the test."""
    stream = CapturedStream()
    monkeypatch.setattr(runs, "Stream", lambda *_, **__: stream)
    monkeypatch.setenv("ESPER_MODE", "off")
    return stream


@pytest.fixture
def instrumented(captured):
    """The same, of a process that is instrumented."""
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield captured
    TorchInstrumentor().uninstrument()


@pytest.fixture
def captured_runs(monkeypatch):
    """The streams of the runs that are started during the test, in order."""
    streams = []

    def stream(*_, **__):
        streams.append(CapturedStream())
        return streams[-1]

    monkeypatch.setattr(runs, "Stream", stream)
    monkeypatch.setenv("ESPER_MODE", "off")
    yield streams
    process.end_automatic()
    for run in list(runs._runs):
        run.close()


@pytest.fixture
def streams(monkeypatch):
    """The streams of the runs that are started during the test, by the names of these."""
    made = CapturedRuns()
    monkeypatch.setattr(runs, "Stream", made.open)
    monkeypatch.setenv("ESPER_MODE", "off")
    monkeypatch.setenv("ESPER_RUN_ID", "job")
    return made


@pytest.fixture
def watched(streams):
    """These streams, of a process that is instrumented."""
    TorchInstrumentor().instrument(skip_dep_check=True)
    yield streams
    TorchInstrumentor().uninstrument()


@pytest.fixture
def way(captured, tmp_path, monkeypatch):
    """Runs a framework's loop in one of the two ways in; gives what it computed."""
    # Imported here, as others of these tests do without torch.
    from integrations.ways_in import FRAMEWORKS, instrumenting

    monkeypatch.setenv("ESPER_SPAN_EVERY", "1")
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")

    def run(framework, automatic, **options):
        pytest.importorskip("torch" if framework == "plain" else framework)
        if not automatic:
            options["watch"] = True
        with instrumenting(automatic):
            return FRAMEWORKS[framework](**options)

    return run
