"""``python -m ops.stack``: one stack from binaries, and one line for every mistake.

Mistakes are made in forks, which have most of the modules already.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from ops.stack import traces_page
from ops.stack.__main__ import _summary
from ops.stack.ports import free
from ops.stack.programs import (
    COLLECTOR,
    DEPLOYED,
    PARTS,
    PROGRAMS,
    PROMETHEUS,
    ROOT,
    MissingError,
    find,
    obtain,
)
from ops.stack.queries import is_page
from ops.stack.services import Ports
from sidecar.running import is_alive
from testkit.fork_server import tamiyo_server
from testkit.patience import PATIENCE_S

COMMAND = [sys.executable, "-m", "ops.stack"]


def environment(tmp_path, **more):
    """With a cache that is empty, so that nothing is found but what is named."""
    named = {*(program.variable for program in PROGRAMS.values()), *DEPLOYED}
    kept = {key: value for key, value in os.environ.items() if key not in named}
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/nowhere"} | more


def mistake(*arguments, **options):
    """The one line that a mistake gets."""
    done = tamiyo_server().run([*COMMAND, *map(str, arguments)], cwd=ROOT, **options)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def programs(stack):
    """All are here: their absence is not what is tested."""


def some_ports():
    names = Ports.__struct_fields__
    return dict(zip(names, free(len(names)), strict=True))


def test_a_port_that_is_taken(programs, tmp_path):
    ports = some_ports()
    with socket.create_server(("127.0.0.1", ports["jaeger"])):
        line = mistake(
            *("up", "--state", tmp_path, "--socket", tmp_path / "s"),
            *("--port", " ".join(f"{name}={port}" for name, port in ports.items())),
        )
    taken = f"port {ports['jaeger']} (jaeger) is taken"
    assert re.fullmatch(rf"stack: {re.escape(taken)}: .* make stack PORTS=jaeger=\d+", line)


@pytest.mark.parametrize("program", PARTS, ids=lambda program: program.name)
def test_a_binary_that_is_missing(program, tmp_path):
    others = {other.variable: sys.executable for other in PROGRAMS.values() if other != program}
    line = mistake("up", "--state", tmp_path, env=environment(tmp_path, **others))
    assert line.startswith(f"stack: {program.binary} is not here: `make stack-programs` gets")
    assert f"{program.variable}=/path/to/{program.binary}" in line


def test_a_binary_that_is_named_and_is_none(tmp_path):
    others = {program.variable: sys.executable for program in PROGRAMS.values()}
    given = others | {"OTELCOL": "/no/such"}
    line = mistake("up", "--state", tmp_path, env=environment(tmp_path, **given))
    assert line == "stack: OTELCOL=/no/such: expected a program that can be run"


def test_a_binary_that_cannot_be_made_without_go(tmp_path):
    line = mistake("build", "collector", env=environment(tmp_path))
    assert line == (
        "stack: esper-otelcol cannot be had: go is not here; "
        "OTELCOL=/path/to/esper-otelcol names one"
    )


def test_a_command_on_what_the_images_hold(tmp_path):
    named = {program.variable: sys.executable for program in DEPLOYED.values()}
    script = "import os, sys; print(os.environ['PROMTOOL']); sys.exit(7)"
    done = subprocess.run(
        [*COMMAND, "as-deployed", sys.executable, "-c", script],
        env=environment(tmp_path, **named),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (7, f"{sys.executable}\n")
    line = mistake("as-deployed", "true", env=environment(tmp_path))
    assert line == (
        "stack: prometheus cannot be had: go is not here; "
        "PROMETHEUS_3=/path/to/prometheus names one"
    )
    # Said at once, and not after some minutes of building.
    line = mistake("as-deployed", env=environment(tmp_path))
    assert line == "stack: as-deployed: expected a command"


def test_what_cannot_be_made_is_no_failure_of_the_tests(tmp_path):
    command = [*COMMAND, "build", "--if-possible"]
    done = tamiyo_server().run(command, cwd=ROOT, env=environment(tmp_path))
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == len(PROGRAMS)
    assert not list((tmp_path / "cache").rglob("*otelcol*"))


def test_a_collector_of_another_make_is_taken_from_the_path(tmp_path, monkeypatch):
    contrib = tmp_path / "otelcol-contrib"
    contrib.write_text("#!/bin/sh\n")
    contrib.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OTELCOL", raising=False)
    assert find(COLLECTOR) == contrib
    contrib.unlink()
    with pytest.raises(MissingError):
        obtain(COLLECTOR)


def test_a_package_that_holds_other_files_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed = "usr/bin/prometheus"
    program = replace(
        PROMETHEUS,
        variable="NO_SUCH",
        make=lambda folder: (folder / packed).rename(folder / "p"),
    )
    with pytest.raises(MissingError, match=rf"prometheus cannot be had: .*{packed}.*NO_SUCH="):
        obtain(program)
    assert list((tmp_path / "esper-otel").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("grafana=1", "--port grafana=1: expected one of otlp_grpc, "),
        ("jaeger=high", "--port jaeger=high: expected jaeger= and a number up to 65535"),
        ("jaeger=0", "--port jaeger=0: expected jaeger= and a number up to 65535"),
    ],
)
def test_a_port_that_is_none(given, told):
    assert mistake("up", "--port", given).startswith(f"stack: {told}")


def test_a_misspelt_component(programs, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("receivers: {otpl: {}}\nexporters: {}\nservice: {pipelines: {}}\n")
    ports = " ".join(f"{name}={port}" for name, port in some_ports().items())
    line = mistake(
        *("up", "--state", tmp_path, "--socket", tmp_path / "s", "--port", ports),
        *("--collector-config", config),
    )
    assert line.startswith(f"stack: {config}: ")
    assert 'unknown type: "otpl"' in line


def test_what_has_no_page_is_printed_without_an_address(monkeypatch):
    monkeypatch.setattr(traces_page, "missing", lambda: ["viztracer"])
    stack = SimpleNamespace(
        ports=Ports(),
        pages=dict,
        parts={},
        url="http://127.0.0.1:4318",
        socket=Path("/s"),
        state=Path("/state"),
    )
    told = _summary(stack)
    assert "send OTLP to  http://127.0.0.1:4318 (gRPC: 4317)" in told
    for name, port in (("Prometheus", 9090), ("Jaeger", 16686)):
        assert f"  {name:12}  no page in this build; its API is on port {port}\n" in told
        assert f"http://127.0.0.1:{port}" not in told
    assert "traces        no page: viztracer not installed" in told


def children_of(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_it_comes_up_says_where_and_ctrl_c_ends_all_of_it(programs, tmp_path, wait_until):
    ports = some_ports()
    command = [*COMMAND, "up", "--state", str(tmp_path), "--socket", str(tmp_path / "s")]
    command += ["--port", " ".join(f"{name}={port}" for name, port in ports.items())]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        said = [process.stdout.readline()]
        while len(said) < 8:
            said.append(process.stdout.readline())
        assert said[0] == "The stack is up; Ctrl-C ends it.\n"
        assert any(f"send OTLP to  http://127.0.0.1:{ports['otlp_http']}" in s for s in said)
        # What is printed as an address is a page, and no error and no placeholder.
        addresses = re.findall(
            r"^  (?:Prometheus|Jaeger|traces) +(http\S+)", "".join(said), re.M
        )
        assert addresses
        assert all(map(is_page, addresses))
        parts = children_of(process.pid)
        assert len(parts) == (4 if traces_page.missing() else 5)
        # A part that ends while the others run is told of, and they go on.
        os.kill(parts[1], signal.SIGKILL)
        wait_until(lambda: said.append(process.stdout.readline()) or "ended with" in said[-1])
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert not any(map(is_alive, parts))
