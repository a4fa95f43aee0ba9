"""What the start page, the tutorials and the guides tell people to type is typed, and works.

Blocks marked ``sh`` run in one shell for each page, in their order. A block whose first line is
``# name.ext`` is saved under that name before. Stood in for are what fetches packages (another
test installs what is built) and fixed ports, in whose place are ports of the system.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from esper_otel.home import runs_in
from testkit.fork_server import fork_server

pytestmark = pytest.mark.timeout(600)  # of the longest page on a machine that is busy

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w.]+\.(?:py|yaml))\n")
PORTS = {"8080", "8321"}
"""Fixed ports on the pages, of ours."""

PREAMBLE = """
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
tamiyo() {
  if [ "$1" = serve ]; then
    shift
    set -- --otlp-grpc 127.0.0.1:$GRPC_PORT --otlp-http 127.0.0.1:$HTTP_PORT "$@"
    exec "$BIN/tamiyo" serve "$@"  # in the background, where this ends no shell of ours
  fi
  command tamiyo "$@"
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


class Typed:
    """A page's commands, typed in a folder; what they printed."""

    def __init__(self, page, folder):
        self.folder = folder
        for name, text in saved(page).items():
            (folder / name).write_text(text)
        grpc, http, *others = free_ports(2 + len(PORTS))
        typed = [f"{text}settle\n" for kind, text in blocks(page) if kind == "sh"]
        assert typed, f"{page}: no block marked sh"
        script = PREAMBLE + "".join(typed)
        for port, instead in zip(sorted(PORTS), others, strict=True):
            script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{instead}")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
        environment = clean | {
            "PATH": f"{BIN}{os.pathsep}{clean['PATH']}",
            "BIN": str(BIN),
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
            self.out, self.err = shell.communicate(timeout=500)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        assert shell.returncode == 0, self.out + self.err


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
