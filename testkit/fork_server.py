"""Python processes that start with modules imported: forks of one that did only that.

A process takes three seconds of a processor to import torch, and two more to make its first
optimizer, which imports torch's compiler. A test that looks at something else need not pay
for them: it names its command as it would for ``subprocess.run``, and the process that runs it
is a fork that has these modules already, and nothing of ours. How a process starts (the order
of imports, launchers, ``esper-otel run`` itself) is for tests with processes of their own.

:func:`tamiyo_server` does the same for ``tamiyo``, whose four processes take two seconds.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NoReturn

from testkit.forks import Forks
from testkit.patience import PATIENCE_S

ROOT = str(Path(__file__).parent.parent)
COMMAND = str(Path(__file__).with_name("forked_command.py"))
COMMON = "torch", "torch._dynamo", "sklearn.datasets", "sklearn.model_selection"
"""What most scripts of tests import; scikit-learn, which the examples need, if it is here."""

OF_TAMIYO = (
    *("esper_tamiyo.cli", "esper_tamiyo.keeping.writer", "esper_tamiyo.receiving.ingest"),
    *("esper_tamiyo.serving.server", "esper_tamiyo.serving.table_watch"),
    *("esper_tamiyo.journaling.reporter", "esper_tamiyo.journaling.journal_writer"),
    "esper_tamiyo.showing.ui",
    *("testkit.forked_children", "testkit.shipped_tables"),
)
"""What a sidecar imports, what has its children be forks as well, and the tables there are."""

WITH_TORCH = "FORKS_WITH_TORCH"
WITH_SIDECARS = "FORKS_OF_TAMIYO"
"""Variables with the names of servers that all processes of a session of tests share."""
AS_IT_IS = "as-it-is"

LARGEST = 200_000
"""Bytes of a request: a command, and an environment."""


class Forked:
    """A process that was asked for: enough of a ``subprocess.Popen`` to wait for and to end."""

    def __init__(self, answers: socket.socket, command: Sequence[str]) -> None:
        self.args = command
        self.returncode: int | None = None
        self._answers = answers
        self.pid = int(answers.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal, once it has ended."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = int(self._answers.recv(64))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end, by SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A process that forks when asked, known by its ``name`` to all processes."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def prefix(self) -> list[str]:
        """Words that have it run the command behind them, for shells and programs."""
        return [sys.executable, "-I", "-S", COMMAND, self.name]

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdout: IO[Any] | socket.socket | int,
        stderr: IO[Any] | int,
        stdin: socket.socket | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        finalizes: bool = False,
    ) -> Forked:
        """Run ``command``, which begins with this Python or is a script of its ``bin``.

        It ends as what ``multiprocessing`` forks does, behind threads and exit functions; with
        ``finalizes`` its interpreter is finalized, which takes a second with torch's modules.
        """
        words = [os.fspath(word) for word in command]
        request = {
            "command": words,
            "env": dict(os.environ if env is None else env),
            "cwd": os.fspath(cwd or Path.cwd()),
            "finalizes": finalizes,
            "outlives": True,
        }
        answers = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            answers.connect(f"\0{self.name}")
        except OSError:  # it has ended
            answers.close()
            raise
        with Path(os.devnull).open() as nothing:
            streams = stdin or nothing, stdout, stderr
            fds = [f if isinstance(f, int) else f.fileno() for f in streams]
            socket.send_fds(answers, [json.dumps(request).encode()], fds)
        return Forked(answers, words)

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = PATIENCE_S,
        finalizes: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` with its output as text; ends it after ``timeout`` seconds."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(
                command, stdout=out, stderr=err, env=env, cwd=cwd, finalizes=finalizes
            )
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(command, status, out.read(), err.read())


class OwnForkServer(ForkServer):
    """One that has imported ``modules``, and ends with this process.

    Its forks forget the modules of :mod:`esper_otel`, unless ``keeps_ours``. With ``of`` it is
    itself a fork, of a server that has modules already.
    """

    def __init__(
        self, *modules: str, keeps_ours: bool = False, of: ForkServer | None = None
    ) -> None:
        self._owner, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A name that the system knows while somebody listens, and no file.
        super().__init__(f"esper-forks-{os.getpid()}-{self._owner.fileno()}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0{self.name}")
        listener.listen()
        own = os.environ.get("PYTHONPATH", "") if keeps_ours else ""
        path = os.pathsep.join(filter(None, [ROOT, own]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        told = f"{modules!r}, {keeps_ours}"
        command = [
            sys.executable,
            "-c",
            f"from testkit.fork_server import serve; serve({told})",
        ]
        start: Callable[..., Any] = of.start if of else subprocess.Popen
        with theirs, listener:  # in the place of streams, which every way to start hands over
            self._process = start(command, stdin=theirs, stdout=listener, stderr=2, env=env)
        atexit.register(self.close)

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._owner.close()
        self._process.wait()


@cache
def fork_server(*modules: str) -> ForkServer:
    """The one of these tests with torch and ``modules``; it takes seconds to be ready."""
    if modules:
        return OwnForkServer(*modules, of=fork_server())
    shared = os.environ.get(WITH_TORCH)
    return ForkServer(shared) if shared else OwnForkServer(*COMMON)


@cache
def tamiyo_server() -> ForkServer:
    """The one of these tests for commands of ``tamiyo``, with the modules of a sidecar."""
    shared = os.environ.get(WITH_SIDECARS)
    return ForkServer(shared) if shared else OwnForkServer(*OF_TAMIYO, keeps_ours=True)


def share_servers() -> list[str]:
    """Have all processes below this one use its servers; words before a Python that has torch.

    Such a Python can become another program, which what is forked for tests does not.
    """
    server = fork_server()
    os.environ[WITH_TORCH] = server.name
    os.environ[WITH_SIDECARS] = tamiyo_server().name
    return [*server.prefix, AS_IT_IS]


# --- in the server, and in what it forks


def serve(modules: Sequence[str], keeps_ours: bool) -> None:
    """Import, and fork for each request until the owner is gone.

    Standard input and output are sockets, the owner's and the one to listen on.
    """
    owner, listener = (socket.socket(fileno=os.dup(stream)) for stream in (0, 1))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for module in modules:
        with suppress(ModuleNotFoundError):
            __import__(module)
    given = os.environ["PYTHONPATH"].split(os.pathsep)
    path = [each for each in sys.path[1:] if each not in given]
    forgotten = re.compile(r"(?!)" if keeps_ours else r"esper_otel\b|testkit\b")
    gc.collect()
    gc.freeze()  # what is imported stays: no fork need look at it
    # Torch's own thousands would take most of the time of a fork that does little.
    finalizers, weakref.finalize._registry = weakref.finalize._registry, {}  # type: ignore[attr-defined]
    forks = Forks()
    while not forks.wait_for(owner, listener):
        answers, _ = listener.accept()
        body, streams, _, _ = socket.recv_fds(answers, LARGEST, 3)
        if not body:
            answers.close()
            continue
        request = json.loads(body)
        if forks.add(answers, outlives=request["outlives"]):
            owner.close()
            listener.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.chdir(request["cwd"])
            work = partial(_become, request["command"], request["env"], path, forgotten)
            if request["finalizes"]:
                gc.unfreeze()
                weakref.finalize._registry = finalizers  # type: ignore[attr-defined]
                work()
            end_by(work)
        for each in streams:
            os.close(each)
    os._exit(0)


def end_by(work: Callable[[], object]) -> NoReturn:
    """Do it, and then what Python does before it finalizes itself."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            status = error.code or 0
        else:
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 0xFF)


def _become(
    command: Sequence[str], env: Mapping[str, str], path: list[str], forgotten: re.Pattern[str]
) -> NoReturn:
    """Run a command of Python's as Python does, with ``path`` behind its own ``PYTHONPATH``."""
    given = dict(env)
    os.environ.clear()
    os.environ.update(given)
    own = [each for each in given.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = ["", *own, *path]
    for name in [name for name in sys.modules if forgotten.match(name)]:
        del sys.modules[name]

    def execve(_: object, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
        _become(argv, env, path, forgotten)

    if command[0] == AS_IT_IS:
        command = command[1:]
    else:
        # `esper-otel run` becomes another Python, whose modules this one has, and so does
        # `opentelemetry-instrument`.
        os.execve = execve  # type: ignore[assignment]
        os.execl = lambda _, *argv: execve(_, argv, os.environ)
    if any(Path(each, "sitecustomize.py").exists() for each in own):
        sys.modules.pop("sitecustomize", None)
        __import__("sitecustomize")
    python = Path(command[0]).name.startswith("python")
    first, *arguments = command[1:] if python else command
    if first == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        first, *arguments = arguments
    namespace = sys.modules["__main__"].__dict__
    if first == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = arguments
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
        sys.exit()
    if first == "-c":
        source, file = arguments[0], "<string>"
        sys.argv = ["-c", *arguments[1:]]
    else:
        source, file = Path(first).read_text(), first
        sys.argv = [first, *arguments]
        sys.path[0] = str(Path(first).resolve().parent)
        namespace["__file__"] = first
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    exec(compile(source, file, "exec"), namespace)
    sys.exit()
