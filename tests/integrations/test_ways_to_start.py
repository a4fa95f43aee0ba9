"""Every way to start of docs/starting.md, compared with what it stands for without us."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testkit.fork_server import fork_server
from testkit.patience import PATIENCE_S

BIN = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "starting.md"
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
CLEAN |= {"ESPER_SUMMARY": "off", "ESPER_MODE": "off", "OMP_NUM_THREADS": "1"}
CLEAN["PATH"] = f"{BIN}{os.pathsep}{CLEAN['PATH']}"

# What it is about, and beside it whether it is instrumented.
TRAIN = """
import json, os, sys
kept = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "ESPER_"))}
told = [sys.argv, sys.path, list(sys.flags), sys.warnoptions, sys._xoptions, __name__, kept]
if not sys.stdin.isatty() and sys.argv[1:2] == ["stdin"]:
    told.append(sys.stdin.read())
sys.stdout.write(json.dumps(told) + "\\n")
print("trouble", file=sys.stderr)
torch = sys.modules.get("esper_otel.integrations.torch")
with open("seen", "a") as seen:
    print(torch is not None and torch.TorchInstrumentor._settings is not None, file=seen)
if sys.argv[-1] == "fails":
    sys.exit(7)
"""
ANEW = """
import os, sys
if "ANEW" not in os.environ:
    os.environ["ANEW"] = "1"
    BEGIN
exec(open("train.py").read())
"""
LAUNCHER = """
import os, subprocess, sys
for rank in "01":
    env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-u", *sys.argv[1:]], env=env)
    assert done.returncode == 0
"""
FILES = {
    "train.py": TRAIN,
    "package/__init__.py": "",
    "package/train.py": TRAIN,
    "folder/__main__.py": TRAIN,
    "train.sh": '#!/bin/sh\npython -O train.py "$@"\n',
    "library.sh": '#!/bin/sh\nPYTHONPATH=lib:$PYTHONPATH python train.py "$@"\n',
    "anew.py": ANEW.replace("BEGIN", "os.execv(sys.executable, [sys.executable, *sys.argv])"),
    "anew_in_a_child.py": ANEW.replace(
        "BEGIN",
        "import subprocess; sys.exit(subprocess.call([sys.executable, *sys.argv]))",
    ),
    "ranks.py": LAUNCHER,
    "bound_ranks.py": LAUNCHER.replace("[sys.executable", "['nice', sys.executable"),
    "served.py": "import subprocess, sys; sys.exit(subprocess.call(['raylet', *sys.argv[1:]]))",
    "bin/raylet": '#!/bin/sh\npython -u "$@"\n',
    "bin/deepspeed": f"#!{sys.executable}{LAUNCHER}",
}

ONE = {
    "esper-otel run train.py a -- --lr 1": "python train.py a -- --lr 1",
    "esper-otel run -u -O -B -X dev -W error train.py": (
        "python -u -O -B -X dev -W error train.py"
    ),
    "esper-otel run --mode off -OO train.py fails": "python -OO train.py fails",
    "esper-otel run -- train.py": "python -- train.py",
    "esper-otel run -m package.train a -- b": "python -m package.train a -- b",
    "esper-otel run -um package.train": "python -um package.train",
    "esper-otel run -c CODE a": "python -c CODE a",
    "esper-otel run - a < train.py": "python - a < train.py",
    "esper-otel run folder": "python folder",
    "esper-otel run python -O train.py": "python -O train.py",
    "python -O -m esper_otel train.py": "python -O train.py",
    "python -m esper_otel -m package.train a": "python -m package.train a",
    "esper-otel run ./train.sh a": "./train.sh a",
    "esper-otel run sh train.sh a": "sh train.sh a",
    "esper-otel run sh library.sh a": "sh library.sh a",
    "esper-otel run anew.py a": "python anew.py a",
    "esper-otel run anew_in_a_child.py a": "python anew_in_a_child.py a",
    "esper-otel run ranks.py train.py": "python ranks.py train.py",
    "esper-otel run bound_ranks.py train.py": "python bound_ranks.py train.py",
    "esper-otel run deepspeed train.py": "deepspeed train.py",
    "esper-otel run served.py train.py": "python served.py train.py",
}
"""Way to start → what it is compared with: arguments, path, flags, environment, streams."""

TWO = "--standalone --nproc-per-node 2"
TORCHRUN = f"torchrun {TWO}"
TORCH_LAUNCH = f"torch.distributed.launch {TWO} --use-env"
ACCELERATE = "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no"
LAUNCHED = {
    f"esper-otel run {TORCHRUN} train.py a": ("python -u train.py a", 2),
    f"{TORCHRUN} -m esper_otel -m package.train a": ("python -u -m package.train a", 2),
    f"esper-otel run {ACCELERATE} train.py a": ("python train.py a", 1),
    f"esper-otel run -m {TORCH_LAUNCH} train.py": ("python -u train.py", 2),
    f"{TORCHRUN} -m esper_otel train.py": ("python -u train.py", 2),
    f"{ACCELERATE} -m esper_otel train.py": ("python train.py", 1),
}
"""Launchers: what they start, and how often. On standard error they tell times and warnings."""

ELSEWHERE = (
    "esper-otel run /path/to/torchrun … train.py",
    "opentelemetry-instrument python train.py",
)
"""Those that test_launchers.py has train, and looks at what was recorded."""

SHORTER = {
    TORCHRUN: "torchrun …",
    TORCH_LAUNCH: "torch.distributed.launch …",
    ACCELERATE: "accelerate launch …",
}
"""As the page has them."""


OF_TORCH = {"torchrun", "torch.distributed.launch"}
"""Launchers that import torch and are forks; what they start is a process of its own.
Accelerate is one where nothing of ours is in its process."""


def started(folder, way):
    """(status, standard output, standard error, which processes were instrumented)."""
    for name, text in FILES.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
    words, _, stdin = way.partition(" < ")
    command = [TRAIN if word == "CODE" else word for word in words.split()]
    env = CLEAN | {"PATH": f"{folder / 'bin'}{os.pathsep}{CLEAN['PATH']}"}
    if OF_TORCH & {*command} or command[0] == "accelerate":
        command[0] = str(BIN / command[0])
        done = fork_server().run(command, cwd=folder, env=env)
    else:
        done = subprocess.run(
            command,
            cwd=folder,
            env=env,
            input=(folder / stdin).read_text() if stdin else "",
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    seen = folder / "seen"
    told = seen.read_text().split() if seen.exists() else []
    seen.unlink(missing_ok=True)
    return done.returncode, done.stdout, done.stderr, told


@pytest.mark.parametrize("way", ONE)
def test_it_is_as_without_us(tmp_path, way):
    bare, ours = (started(tmp_path, each) for each in (ONE[way], way))
    assert ours[:3] == bare[:3]
    assert bare[1] or "anew" in way
    assert set(bare[3]) == {"False"}
    assert ours[3] == ["True"] * len(bare[3])


@pytest.mark.parametrize("way", LAUNCHED)
def test_each_process_of_a_launcher_is_as_without_us(tmp_path, way):
    pytest.importorskip("torch")
    if "accelerate" in way and not (BIN / "accelerate").exists():
        pytest.skip("needs accelerate")
    one, times = LAUNCHED[way]
    bare = started(tmp_path, one)
    status, output, errors, seen = started(tmp_path, way)
    assert (status, output.splitlines()) == (0, bare[1].splitlines() * times), errors
    assert seen == ["True"] * times


def test_the_page_has_the_very_ways_that_are_tested():
    told = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    tested = [*ONE, *LAUNCHED, *ELSEWHERE]
    for long, short in SHORTER.items():
        tested = [way.replace(long, short) for way in tested]
    assert sorted(told) == sorted(tested)
