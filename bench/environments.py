"""Environments that are hostile, alone and together: does a script train on, is it recorded?

Each kind is something that the environment of a process may hold, or lack, as public bug
reports tell it: variables that are none, folders that are not there, proxies, streams that are
closed, a `sitecustomize` of the user's own. A small training runs with `python` and with
`esper-otel run`, and exit status, standard output and weights (their hash is printed) are
compared. Its steps are counted where they arrived, at a receiver or in files; where one is
missing, a line that begins with `esper-otel:` has to say why. After the kinds come combinations
of them, made from a seed.

A few kinds are tried with torch, the others with a loop that ends its steps itself: it starts
in a tenth of the time.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import msgspec

from bench.figures import Figure, run
from esper_otel.settings import EsperSettings, variables_of
from testkit.killed_trainer import steps_in
from testkit.receiver import GrpcReceiver, HttpReceiver

STEPS = 12
COMBINATIONS = 12
OF_EACH = 5
"""Kinds in a combination."""

TRAINING = f"""
import hashlib, sys, torch
torch.manual_seed(7); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range({STEPS}):
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print("weights", hashlib.sha256(weights).hexdigest(), sys.argv[1:])
sys.exit(3 if "fails" in sys.argv else 0)
"""

BY_HAND = f"""
import hashlib, sys
run = None
if "esper_otel" in sys.modules:
    import esper_otel
    run = esper_otel.start()
weight = 1.0
for step in range({STEPS}):
    weight -= 0.1 * weight
    if run is not None:
        run.report(loss=weight)
        run.step()
if run is not None:
    run.close()
print("weights", hashlib.sha256(repr(weight).encode()).hexdigest(), sys.argv[1:])
"""

TEE = """
import sys
class Tee:
    def write(self, text):
        sys.__stderr__.write(text)
sys.stderr = Tee()
"""
RAISING = """
import sys
class Raising:
    def write(self, text):
        raise RuntimeError("no more")
sys.stderr = Raising()
"""
NO_THREADS = """
import threading
start = threading.Thread.start
def refuse(thread):
    if thread.name.startswith("esper"):
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refuse
"""


class Kind(msgspec.Struct, frozen=True):
    """What is wrong with an environment.

    ``env`` are variables, None for one that is missing; FOLDER in them stands for that of the
    trial, PORT for the receiver's port. ``shell`` comes before the command, ``streams`` behind
    it. ``site`` is a ``sitecustomize`` of the user's own. ``to_python``: what ``python`` does
    may differ as well. ``torch``: tried with torch.
    """

    env: dict[str, str | None] = {}
    shell: str = ""
    streams: str = ""
    site: str = ""
    to_python: bool = False
    grpc: bool = False
    torch: bool = False


def _v(**env: str | None) -> Kind:
    return Kind(env)


LONG = "FOLDER/" + "slurm_jobdir_1355700_tmp.t0016_pbs.6020182/" * 3
PROXY = "http://127.0.0.1:9"

KINDS: dict[str, Kind] = {
    "span limit no number": _v(OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="abc"),
    "span limit below 0": _v(OTEL_ATTRIBUTE_COUNT_LIMIT="-1", OTEL_SPAN_LINK_COUNT_LIMIT=""),
    "propagator not installed": Kind({"OTEL_PROPAGATORS": "tracecontext,b3multi"}, torch=True),
    "context not installed": _v(OTEL_PYTHON_CONTEXT="nowhere"),
    "tracer provider not installed": _v(OTEL_PYTHON_TRACER_PROVIDER="nowhere"),
    "meter provider not installed": _v(OTEL_PYTHON_METER_PROVIDER="nowhere"),
    "logger provider not installed": _v(OTEL_PYTHON_LOGGER_PROVIDER="nowhere"),
    "detector not installed": _v(OTEL_EXPERIMENTAL_RESOURCE_DETECTORS="host9,otel"),
    "resource that is none": _v(OTEL_RESOURCE_ATTRIBUTES="=,,a,b=%ZZ,c=\udcff"),
    "sampler that is none": _v(OTEL_TRACES_SAMPLER="sometimes", OTEL_TRACES_SAMPLER_ARG="x"),
    "headers that are none": _v(OTEL_EXPORTER_OTLP_HEADERS="a;b,\udcff=1"),
    "timeout and compression": _v(
        OTEL_EXPORTER_OTLP_TIMEOUT="soon", OTEL_EXPORTER_OTLP_COMPRESSION="brotli"
    ),
    "protocol of others": _v(OTEL_EXPORTER_OTLP_PROTOCOL="http/json"),
    "certificates not there": _v(
        OTEL_EXPORTER_OTLP_CERTIFICATE="/nowhere.pem", SSL_CERT_FILE="/nowhere.pem"
    ),
    "exporters of others": _v(OTEL_LOGS_EXPORTER="console", OTEL_METRICS_EXPORTER="prometheus"),
    "intervals that are none": _v(OTEL_METRIC_EXPORT_INTERVAL="x", OTEL_BSP_SCHEDULE_DELAY="x"),
    "internal metrics": _v(OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED="perhaps"),
    "proxy": _v(HTTP_PROXY=PROXY, http_proxy=PROXY, NO_PROXY="example.org", no_proxy=None),
    "proxy, networks excepted": _v(HTTP_PROXY=PROXY, NO_PROXY="10.0.0.0/8,127.0.0.0/8"),
    "proxy that is none": _v(HTTP_PROXY="::::", ALL_PROXY="[", https_proxy="http://:x"),
    "grpc behind a proxy": Kind({"http_proxy": PROXY, "NO_PROXY": "example.org"}, grpc=True),
    "stale bundle, TLS with nobody": _v(
        OTEL_EXPORTER_OTLP_ENDPOINT="https://localhost:PORT", REQUESTS_CA_BUNDLE="/nowhere.pem"
    ),
    "every setting": Kind(
        {
            name: "\x01?"
            for field in EsperSettings.__struct_fields__
            if type(getattr(EsperSettings(), field)) is not str
            for name in variables_of(field)
        }
    ),
    "name in bytes": _v(ESPER_RUN_ID="run\udcff\x1b[31m" + "x" * 9000),
    "socket too long": _v(ESPER_TAMIYO_SOCKET="/" + "x" * 200),
    "socket that is a file": _v(ESPER_TAMIYO_SOCKET="/etc/passwd"),
    "recording nowhere": _v(ESPER_RECORDING_DIR="/dev/null/x"),
    "spool nowhere": _v(ESPER_SPOOL_DIR="/dev/null/x"),
    "report nowhere": _v(ESPER_REPORT="/dev/null/x.html"),
    "rank of a scheduler": _v(RANK="3", LOCAL_RANK="x", WORLD_SIZE="0"),
    "variables that are none": _v(ESPER_SPAM="1", ESPER_TAMIYO_DEADLINE="2"),
    "long temporary folder": _v(TMPDIR=LONG, XDG_RUNTIME_DIR=None),
    "long runtime folder": _v(XDG_RUNTIME_DIR=LONG),
    "no temporary folder": _v(TMPDIR="/nowhere", XDG_RUNTIME_DIR="not/absolute"),
    "state in a file": _v(XDG_STATE_HOME="/dev/null"),
    "no home": _v(HOME=None, XDG_STATE_HOME=None, USER=None, LOGNAME=None),
    "home that is none": _v(HOME="/dev/null", XDG_STATE_HOME=None),
    "user without a name": Kind(
        {"HOME": None, "XDG_STATE_HOME": None},
        "unshare --user --map-user=54321 --map-group=54321",
    ),
    "time zone": _v(TZ="Nowhere/Else", LANG="xx_YY", LC_ALL="xx_YY"),
    "devices": Kind({"CUDA_VISIBLE_DEVICES": "no"}, torch=True),
    "path empty": Kind({"PYTHONPATH": ""}, to_python=True),
    "path of separators": Kind({"PYTHONPATH": ":lib:"}, to_python=True),
    "warnings are errors": Kind({"PYTHONWARNINGS": "error"}, to_python=True, torch=True),
    "optimised": Kind({"PYTHONOPTIMIZE": "2"}, to_python=True),
    "development mode": Kind({"PYTHONDEVMODE": "1"}, to_python=True),
    "ASCII": Kind(
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}, to_python=True
    ),
    "safe path": Kind({"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}, to_python=True),
    "site that raises": Kind(site="raise KeyError('mine')", to_python=True, torch=True),
    "stderr without flush": Kind(site=TEE, to_python=True),
    "stderr that raises": Kind(site=RAISING, to_python=True),
    "no threads": Kind(site=NO_THREADS),
    "stdin closed": Kind(streams="0<&-", to_python=True),
    "stderr closed": Kind(streams="2>&-", to_python=True),
    "stderr full": Kind(streams="2>/dev/full", to_python=True),
    "few files": Kind(shell="prlimit --nofile=48"),
    "no files to write": Kind(shell="prlimit --fsize=0", to_python=True),
    "folder that is gone": Kind(
        shell="sh -c 'mkdir gone && cd gone && rmdir ../gone && exec \"$@\"' sh", to_python=True
    ),
    "switched off": Kind({"OTEL_SDK_DISABLED": "true"}),
}
ALONE = {"switched off", "stale bundle, TLS with nobody"}
"""Kinds that are not combined with others: they say that nothing is to be sent there."""


class Trial(msgspec.Struct, frozen=True):
    """What came of one environment; each of the first three compares with ``python``."""

    status: bool
    output: bool
    steps: int
    reason: str
    """A line that says why steps are missing, "" where there is none."""
    told: str

    @property
    def is_recorded(self) -> bool:
        """Whether all steps are there, once each."""
        return self.steps == STEPS

    @property
    def is_well(self) -> bool:
        """Whether the training was as without us, and recorded, or told why not."""
        return self.status and self.output and (self.is_recorded or bool(self.reason))


def together(names: Iterable[str]) -> Kind:
    """The kinds called ``names`` as one; of what only one can be, the last one's."""
    kinds = [KINDS[name] for name in names]
    return Kind(
        env={name: value for kind in kinds for name, value in kind.env.items()},
        shell=" ".join(kind.shell for kind in kinds if kind.shell),
        streams=" ".join(kind.streams for kind in kinds if kind.streams),
        site="\n".join(sorted({kind.site for kind in kinds if kind.site}, reverse=True)),
        to_python=any(kind.to_python for kind in kinds),
        grpc=any(kind.grpc for kind in kinds),
        torch=False,
    )


def combinations(seed: int = 1) -> list[tuple[str, ...]]:
    """Several kinds at a time, the same for the same ``seed``; each kind is in one at least."""
    chooser = random.Random(seed)
    names = [name for name in KINDS if name not in ALONE]
    found: list[tuple[str, ...]] = []
    while len(found) < COMBINATIONS:
        chooser.shuffle(names)
        found += [tuple(names[at : at + OF_EACH]) for at in range(0, len(names), OF_EACH)]
    return found[:COMBINATIONS]


def tried(kind: Kind) -> Trial:
    """Train in an environment of this kind, with ``python`` and with ours."""
    training = TRAINING if kind.torch else BY_HAND
    with (
        tempfile.TemporaryDirectory(prefix="esper-bench-") as name,
        (GrpcReceiver if kind.grpc else HttpReceiver)() as receiver,
    ):
        folder = Path(name)
        (folder / "train.py").write_text(training)
        (folder / "site").mkdir()
        if kind.site:
            (folder / "site" / "sitecustomize.py").write_text(kind.site)
        environment = _environment(kind, folder, receiver.url, receiver.port)
        bare = (
            _started(kind, folder, environment, [sys.executable])
            if kind.to_python
            else _bare(training)
        )
        ours = _started(kind, folder, environment, [sys.executable, "-m", "esper_otel", "run"])
        steps = set(receiver.inbox.steps()) | set(steps_in(folder.rglob("*.metrics.otlp")))
    told = [line for line in ours[2].splitlines() if line.startswith("esper-otel:")]
    lines = [line for line in told if not line.startswith("esper-otel: run ")]
    return Trial(
        status=ours[0] == bare[0],
        output=ours[1] == bare[1],
        steps=len(steps),
        reason=lines[-1] if lines else "",
        told=ours[2],
    )


def _environment(kind: Kind, folder: Path, url: str, port: int) -> dict[str, str]:
    kept = ("OTEL_", "ESPER_", "XDG_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(kept)}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder / "site"),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "ESPER_SPOOL_DIR": str(folder / "spool"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if kind.grpc else "http/protobuf",
    }
    for name, value in kind.env.items():
        if value is None:
            environment.pop(name, None)
        else:
            value = value.replace("FOLDER", str(folder)).replace("PORT", str(port))
            environment[name] = value
    if "TMPDIR" in kind.env and environment["TMPDIR"].startswith(str(folder)):
        Path(environment["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    if "PYTHONPATH" in kind.env and kind.site:
        environment["PYTHONPATH"] += os.pathsep + str(folder / "site")
    return environment


@cache
def _bare(training: str) -> tuple[int, str, str]:
    """What ``python`` does where nothing is wrong."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as name:
        folder = Path(name)
        (folder / "train.py").write_text(training)
        environment = _environment(Kind(), folder, "", 0)
        return _started(Kind(), folder, environment, [sys.executable])


def _started(
    kind: Kind, folder: Path, environment: dict[str, str], command: Sequence[str]
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the training."""
    words = " ".join([kind.shell, '"$@"', kind.streams])
    done = subprocess.run(
        ["sh", "-c", f"exec {words}", "sh", *command, str(folder / "train.py"), "a", "--", "b"],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    return (
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )


def figures() -> list[Figure]:
    trials = {name: tried(kind) for name, kind in KINDS.items()}
    mixed = {" + ".join(names): tried(together(names)) for names in combinations()}
    for name, trial in {**trials, **mixed}.items():
        expected = trial.is_recorded or name in ALONE
        if not trial.is_well or not expected:
            print(f"{name}: {trial}", file=sys.stderr)
    rows = []
    for what, some in (("kinds", trials), ("combinations", mixed)):
        wrong = [trial for trial in some.values() if not trial.is_well]
        rows += [
            Figure.report("environments", f"{what} tried", len(some), "environments"),
            Figure.report(
                "environments",
                f"{what} in which all steps were recorded",
                sum(trial.is_recorded for trial in some.values()),
                "environments",
            ),
            Figure.at_most(
                "environments",
                f"{what} in which status, output or weights differ, or steps are missing "
                "without a word",
                len(wrong),
                "environments",
                bar=0,
            ),
        ]
    return rows


if __name__ == "__main__":
    sys.exit(run(figures))
