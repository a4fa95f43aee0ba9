"""What the start page, the tutorials and the guides tell people to type is typed, and works.

Blocks marked ``sh`` run in one shell for each page, in their order. A block whose first line is
``# name.ext`` is saved under that name before. Stood in for are what fetches packages (another
test installs what is built) and fixed ports, in whose place are ports of the system. What
imports torch is a fork of a process that has it, and so are sidecars.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from esper_otel.home import runs_in
from sidecar.running import IS_MEASURED
from testkit.fork_server import fork_server, tamiyo_server

pytestmark = pytest.mark.timeout(600)  # of the longest page on a machine that is busy

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w.]+\.(?:py|yaml))\n")
PORTS = {"8080", "8321"}
"""Fixed ports on the pages, of ours."""
NOT_EVERYWHERE = "curl", "git"
"""Programs on the pages that a fresh Debian does not have."""

PREAMBLE = """
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
tamiyo() {
  if [ "$1" = serve ]; then
    shift
    set -- --otlp-grpc 127.0.0.1:$GRPC_PORT --otlp-http 127.0.0.1:$HTTP_PORT "$@"
    # In the background, where this ends no shell of ours.
    exec $SIDECARS "$BIN/tamiyo" serve "$@"
  fi
  $SIDECARS "$BIN/tamiyo" "$@"
}
esper-otel() {
  if [ "$1" = run ]; then
    $TRAININGS "$BIN/esper-otel" "$@"
  else
    command esper-otel "$@"
  fi
}
python() {
  if grep -q "^import torch" "$1"; then
    $TRAININGS "$BIN/python" "$@"
  else
    command python "$@"
  fi
}
python3() {
  if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    echo "PATH=$BIN:\\$PATH" > "$3/bin/activate"
  else
    command python3 "$@"
  fi
}
pip() { echo "pip $*" >> "$HOME/installed"; }
settle() {  # a reader's next command comes later than ours would
  while [ -n "$(jobs -r)" ] && [ ! -S "$XDG_RUNTIME_DIR/esper/tamiyo.sock" ]; do
    sleep 0.05
  done
}
"""


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text())


def saved(page):
    """The files that a page asks to save, by name."""
    return {found[1]: text for _, text in blocks(page) if (found := FILE.match(text))}


def free_ports(count):
    """Ports that the system gave away a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in held]
    for each in held:
        each.close()
    return ports


def run_in_bash(script, folder, environment):
    """Exit status and output; whatever it has started ends with it."""
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = shell.communicate(timeout=500)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    return shell.returncode, out, err


class Typed:
    """A page's commands, typed in a folder; what they printed."""

    def __init__(self, page, folder):
        self.folder = folder
        for name, text in saved(page).items():
            (folder / name).write_text(text)
        grpc, http, *others = free_ports(2 + len(PORTS))
        typed = [f"{text}settle\n" for kind, text in blocks(page) if kind == "sh"]
        assert typed, f"{page}: no block marked sh"
        for program in NOT_EVERYWHERE:
            if re.search(rf"\b{program} ", "".join(typed)) and not shutil.which(program):
                pytest.skip(f"{page} needs {program}, which is not here")
        script = PREAMBLE + "".join(typed)
        trains = "esper-otel run" in "".join(typed) or "import torch" in "".join(
            saved(page).values()
        )
        for port, instead in zip(sorted(PORTS), others, strict=True):
            script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{instead}")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
        environment = clean | {
            "PATH": f"{BIN}{os.pathsep}{clean['PATH']}",
            "BIN": str(BIN),
            "TRAININGS": shlex.join(fork_server().prefix) if trains and not IS_MEASURED else "",
            "SIDECARS": "" if IS_MEASURED else shlex.join(tamiyo_server().prefix),
            "HOME": str(folder),
            "REPOSITORY": str(ROOT),
            "GRPC_PORT": grpc,
            "HTTP_PORT": http,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{http}",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "XDG_RUNTIME_DIR": str(folder),
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        status, self.out, self.err = run_in_bash(script, folder, environment)
        assert status == 0, self.out + self.err


@pytest.fixture
def typed(tmp_path):
    return lambda page: Typed(page, tmp_path)


def test_the_start_page_from_the_clone_on(typed):
    pytest.importorskip("torch")
    if not (ROOT / ".git").exists():
        pytest.skip("no repository to clone")
    done = typed("index.md")
    installed = (done.folder / "installed").read_text().split()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in installed[2:]:
        wanted = re.fullmatch(r"\.\[([\w,]+)\]", word)
        assert wanted is not None, f"{word}: expected this folder with extras"
        assert {*wanted[1].split(",")} <= {*extras["optional-dependencies"]}
    (run,) = runs_in(done.folder / "data" / "esper" / "runs")
    assert (run.card.name, run.card.steps) == ("first", 60)
    assert "<html" in (done.folder / "esper-otel" / "report.html").read_text()[:500]
    assert "step 60" in done.out


def test_the_tutorial_for_those_who_train(typed):
    pytest.importorskip("torch")
    done = typed("tutorials/train.md")
    runs = {run.card.name: run.card for run in runs_in(done.folder / "data" / "esper" / "runs")}
    assert {name: card.steps for name, card in runs.items()} == {"slip": 200, "rescued": 200}
    slip, rescued = (runs[name].last_loss for name in ("slip", "rescued"))
    assert rescued < 0.5
    assert slip is None or not slip < 0.5, "the page says that this run goes wrong"
    assert "OPTIMIZER" in done.err, "the summary tells the decisions"
    assert "would have" in done.out or "expected" in done.out
    assert (done.folder / "both.html").exists()


def test_the_tutorial_for_those_who_operate(typed):
    done = typed("tutorials/operate.md")
    assert done.out.count('"status"') == 2
    assert "tamiyo_uptime" in done.out
    assert (done.folder / "audit.jsonl").read_text().count('"kind":"opened"') == 1


def test_the_tutorial_for_those_who_want_the_sidecar_alone(typed):
    done = typed("tutorials/sidecar.md")
    assert "1 of 1 tests passed" in done.out
    assert "step 80" in done.out
    assert "loss_doubled" in done.out
    assert "The loss is twice its baseline." in done.out


def test_the_guide_to_a_table_of_your_own(typed):
    done = typed("how-to/own-table.md")
    assert "extends default" in done.out
    assert "1 of 1 tests passed" in done.out


SENDS = """
import os, time
from urllib.error import URLError
from urllib.request import Request, urlopen

to = os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] + "/v1/metrics"
token = os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "authorization=none").partition("=")[2]
headers = {"Content-Type": "application/x-protobuf", "Authorization": token.replace("%20", " ")}
for _ in range(1000):  # the sidecar starts beside it
    try:
        status = urlopen(Request(to, b"", headers)).status
    except URLError as error:
        if not isinstance(error.reason, ConnectionError):
            raise
        time.sleep(0.05)
    else:
        break
with open("sent", "a") as file:
    print(status, os.environ["ESPER_RUN_ID"], os.environ["SLURM_NODEID"], file=file)
"""
SLURM = {
    "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    "esper-otel": 'echo "$*" >> trained; exec "$BIN/python" sends.py',
    "hostname": "echo 127.0.0.1",
}
"""Stand-ins: a job of two nodes, a training that sends an empty request."""


@pytest.mark.parametrize(("script", "word"), [(0, "--standalone"), (1, "--node-rank")])
def test_the_job_scripts_for_slurm(script, word, tmp_path):
    text = [text for kind, text in blocks("how-to/slurm.md") if kind == "bash"][script]
    assert word in text
    (port,) = free_ports(1)
    usual = "$((20000 + SLURM_JOB_ID % 10000))"
    assert text.count(usual) == 1
    (tmp_path / "sends.py").write_text(SENDS)
    (tmp_path / "bin").mkdir()
    for name, does in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    environment = clean | {
        "PATH": os.pathsep.join([str(tmp_path / "bin"), str(BIN), clean["PATH"]]),
        "BIN": str(BIN),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    job = text.replace("0.0.0.0", "127.0.0.1").replace(usual, port)
    status, _, err = run_in_bash(job, tmp_path, environment)
    assert status == 0, err
    assert (tmp_path / "sent").read_text() == "200 job-7 0\n200 job-7 1\n"
    assert (tmp_path / "tamiyo-7.journal").exists()
    for node, line in zip("01", (tmp_path / "trained").read_text().splitlines(), strict=True):
        assert "--nproc-per-node 4" in line
        if "--node-rank" in line:
            assert f"--node-rank {node} --master-addr 127.0.0.1" in line


USES_IT = """
import torch
from my_blueprints import bottleneck

inputs = torch.randn(4, 8)
seed = bottleneck(inputs.shape)
assert torch.equal(seed(inputs), inputs), "the page says that it begins as identity"
print("as it says")
"""


def test_the_guide_to_a_blueprint(tmp_path):
    pytest.importorskip("torch")
    for name, text in saved("how-to/own-blueprint.md").items():
        (tmp_path / name).write_text(text)
    code = [text for kind, text in blocks("how-to/own-blueprint.md") if kind == "python"]
    (tmp_path / "uses_it.py").write_text("".join([*code[1:], USES_IT]))
    done = fork_server().run([sys.executable, "uses_it.py"], cwd=tmp_path, env={**os.environ})
    assert (done.returncode, done.stdout) == (0, "as it says\n"), done.stderr
