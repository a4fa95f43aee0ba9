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
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NoReturn

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
    """A process that has imported ``modules``, and forks when asked.

    Its forks forget the modules of :mod:`esper_otel`, unless ``keeps_ours``.
    """

    def __init__(self, *modules: str, keeps_ours: bool = False) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A name that the system knows while somebody listens, and no file.
        self._name = f"esper-forks-{os.getpid()}-{listener.fileno()}"
        listener.bind(f"\0{self._name}")
        listener.listen()
        fds = [theirs.fileno(), listener.fileno()]
        told = f"{fds}, {modules!r}, {keeps_ours}"
        own = os.environ.get("PYTHONPATH", "") if keeps_ours else ""
        path = os.pathsep.join(filter(None, [ROOT, own]))
        with theirs, listener:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from testkit.fork_server import serve; serve({told})"],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    @property
    def prefix(self) -> list[str]:
        """Words that have it run the command behind them, for shells and programs."""
        return [sys.executable, "-I", "-S", COMMAND, self._name]

    def close(self) -> None:
        """End it; what it has forked goes on. It also ends when this process does."""
        self._requests.close()
        self._process.wait()

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdout: IO[Any] | int,
        stderr: IO[Any] | int,
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
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, Path(os.devnull).open() as nothing:
            streams = (
                f if isinstance(f, int) else f.fileno() for f in (nothing, stdout, stderr)
            )
            fds = [theirs.fileno(), *streams]
            socket.send_fds(self._requests, [json.dumps(request).encode()], fds)
        return Forked(ours, words)

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


@cache
def fork_server(*modules: str) -> ForkServer:
    """The one of this process with torch and ``modules``; it takes seconds to be ready."""
    server = ForkServer(*COMMON, *modules)
    atexit.register(server.close)
    return server


@cache
def tamiyo_server() -> ForkServer:
    """The one of this process for commands of ``tamiyo``, with the modules of a sidecar."""
    server = ForkServer(*OF_TAMIYO, keeps_ours=True)
    atexit.register(server.close)
    return server


# --- in the server, and in what it forks


def serve(fds: Sequence[int], modules: Sequence[str], keeps_ours: bool) -> None:
    """Import, and fork for each request until nobody can send any more."""
    for module in modules:
        with suppress(ModuleNotFoundError):
            __import__(module)
    given = os.environ["PYTHONPATH"].split(os.pathsep)
    path = [each for each in sys.path[1:] if each not in given]
    forgotten = re.compile(r"(?!)" if keeps_ours else r"esper_otel\b|testkit\b")
    signal.signal(signal.SIGCHLD, _reap)
    requests, listener = (socket.socket(fileno=fd) for fd in fds)
    while True:
        ready, _, _ = select.select([requests, listener], [], [])
        is_ours = requests in ready
        if is_ours:
            body, given_fds, _, _ = socket.recv_fds(requests, LARGEST, 4)
            if not body:
                os._exit(0)
        else:  # a command of somebody who waits for it on the same connection
            answers, _ = listener.accept()
            body, given_fds, _, _ = socket.recv_fds(answers, LARGEST, 3)
            given_fds.insert(0, answers.detach())
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            listener.close()
            answers_fd, *streams = given_fds
            _watch_a_fork(answers_fd, ends_with_asker=not is_ours)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            request = json.loads(body)
            os.chdir(request["cwd"])
            work = partial(_become, request["command"], request["env"], path, forgotten)
            if request["finalizes"]:
                work()
            end_by(work)
        for each in given_fds:
            os.close(each)


def _reap(*_: object) -> None:
    """Wait for the processes that have told how their forks have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch_a_fork(fd: int, *, ends_with_asker: bool) -> None:
    """Fork; returns in the child, and its parent tells how the child has ended."""
    answers = socket.socket(fileno=fd)
    pid = os.fork()
    if pid == 0:
        answers.close()
        return
    answers.send(str(pid).encode())
    if ends_with_asker:
        looks = select.poll()
        looks.register(answers, 0)  # for its end
        looks.register(os.pidfd_open(pid), select.POLLIN)
        if answers.fileno() in dict(looks.poll()):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        answers.send(str(os.waitstatus_to_exitcode(status)).encode())
    finally:
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

    # `esper-otel run` becomes another Python, whose modules this one has, and so does
    # `opentelemetry-instrument`.
    os.execve = execve  # type: ignore[assignment]
    os.execl = lambda _, *argv: execve(_, argv, os.environ)
    if any(Path(each, "sitecustomize.py").exists() for each in own):
        sys.modules.pop("sitecustomize", None)
        __import__("sitecustomize")
    python = Path(command[0]).name.startswith("python")
    first, *arguments = command[1:] if python else command
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
