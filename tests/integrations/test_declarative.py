"""The SDK's declarative configuration file activates the instrumentor, with its options."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from esper_otel.stream import read_frames
from testkit import without_compiler
from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

pytest.importorskip("torch")
pytest.importorskip("opentelemetry.configuration", exc_type=ImportError)

SCRIPT = f"""{without_compiler.SOURCE}
import os
from opentelemetry.configuration import configure_sdk, load_config_file
configure_sdk(load_config_file("otel.yaml"))
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    model(torch.ones(4, 2)).square().mean().backward()
    optimizer.step()
"""
FILE = """
file_format: "1.0"
instrumentation/development:
  python:
    esper_torch:
      mode: off
      summary: off
      recording_dir: recordings
      MORE
"""


in_a_new_process = partial(subprocess.run, capture_output=True, text=True)


def configured(tmp_path, run, more=""):
    (tmp_path / "otel.yaml").write_text(FILE.replace("MORE", more).replace(": off", ': "off"'))
    (tmp_path / "train.py").write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    quiet = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")}
    command = [sys.executable, "train.py"]
    return run(command, cwd=tmp_path, env=clean | quiet, timeout=PATIENCE_S)


def steps(tmp_path):
    found = Path(tmp_path).glob("recordings/*.metrics.otlp")
    return [[frame.step for frame in read_frames(path)] for path in found]


def test_the_file_instruments_with_the_options_it_gives(tmp_path):
    done = configured(tmp_path, in_a_new_process)  # torch is imported behind it
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [[1, 2, 3]], done.stderr


def test_an_option_that_is_none_is_named_and_the_script_runs(tmp_path):
    done = configured(tmp_path, fork_server().run, more="spam: 1")
    assert done.returncode == 0
    assert "spam" in done.stderr
    assert steps(tmp_path) == []
