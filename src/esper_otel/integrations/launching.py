"""Launching: the processes of a start, and which of them train.

``python`` starts one process, ``torchrun`` or ``accelerate launch`` several, a script may start
itself anew, and a shell script anything at all. The *detour* is what has a Python instrument
itself when it begins: a folder in front of ``PYTHONPATH``. A process that trains takes it out
of its environment, so that its data workers know nothing of it, and hands it on to three kinds
alone: to the program that takes its place (``os.execv``), to launchers, and to further ranks.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

AUTOLOAD = str(Path(__file__).parent / "autoload")
CHAINED = "ESPER_CHAINED_PYTHONPATH"
"""Carries the user's own PYTHONPATH along; absent when there was none."""

ONLY_WORKERS = "ESPER_ONLY_WORKERS"
"""Set when the process that is started only launches those that train, or may do so."""

_FLAGS = "bBdEhiIOPqRsStuvVx?"
"""Options of ``python`` without a value; ``-W`` and ``-X`` have one, ``-c`` ``-m`` are last."""

_PYTHON = re.compile(r"python(\d+(\.\d+)*t?)?")

_SCRIPTS = frozenset(
    # raylet is the server that starts Ray's workers.
    [
        *("torchrun", "accelerate-launch", "deepspeed", "ds", "horovodrun", "composer"),
        *("raylet", "esper-otel"),
    ]
)
_WITH_COMMAND = {"accelerate": "launch", "fabric": "run", "lightning": "run"}
_MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.",
    "deepspeed.launcher.",
    "horovod.runner.",
    "composer.cli.launcher",
    "multiprocessing.",
    "esper_otel",
)
"""Programs, and modules, that start those which train."""

_HELPER = re.compile(r"from (multiprocessing|joblib)\b.* import ")
"""What multiprocessing has a Python run that is a worker, a tracker or a server of it."""

_OF_RAY = re.compile(r"/ray/(_private|dashboard)/")
"""Where Ray's own scripts are: its workers, which train if they are asked to, and agents."""

_RANKS = ("LOCAL_RANK", "RANK")


class PythonCall(NamedTuple):
    """What ``python`` is asked to run.

    ``kind`` is ``script``, ``module``, ``code``, ``stdin``, or "" for nothing; ``flags`` are
    the letters of its options without value, and ``words[:place]`` all options.
    """

    words: list[str]
    flags: str = ""
    place: int = 0
    kind: str = ""
    name: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def is_launcher(self) -> bool:
        """Whether it starts those that train, and does not train itself."""
        if self.kind == "module":
            return any(
                self.name == each.rstrip(".")
                or (each[-1] == "." and self.name.startswith(each))
                for each in _MODULES
            )
        if self.kind == "code":
            return _HELPER.match(self.name) is not None
        program = Path(self.name).name
        return program in _SCRIPTS or (
            program in _WITH_COMMAND and self.arguments[:1] == (_WITH_COMMAND[program],)
        )

    @property
    def may_idle(self) -> bool:
        """Whether it is nothing worth telling that it trains nothing: a worker, or an agent."""
        return self.kind == "code" or _OF_RAY.search(self.name) is not None


def past_option(words: Sequence[str], at: int) -> int | None:
    """Where the next word of ``python``'s command line is behind the option at ``at``.

    ``at`` itself where no option is, but what is to be run. None for what is no option of
    ``python``.
    """
    word = words[at]
    if word in ("-", "") or word[0] != "-":
        return at
    if word == "--":
        return at + 1
    if word.startswith("--"):
        name, equals, _ = word.partition("=")
        if name == "--check-hash-based-pycs":
            return at + (1 if equals else 2)
        return at + 1 if name.startswith("--help-") or name == "--version" else None
    for place, letter in enumerate(word[1:], 2):
        if letter in "cm":
            return at
        if letter in "WX":
            return at + (1 if word[place:] else 2)
        if letter not in _FLAGS:
            return None
    return at + 1


def python_call(words: Sequence[str]) -> PythonCall:
    """What ``python WORDS`` runs; raises ``ValueError`` that names a word that is no option."""
    at, flags = 0, ""
    while at < len(words):
        following = past_option(words, at)
        if following is None:
            raise ValueError(words[at])
        if following == at:
            break
        if not words[at].startswith("--"):
            flags += re.split("[WX]", words[at][1:])[0]
        at = following
        if words[at - 1] == "--":
            break
    rest = list(words[at:])
    if not rest:
        return PythonCall(list(words), flags, at)
    head = rest[0]
    is_named = head.startswith("-") and head != "-" and words[at - 1 : at] != ["--"]
    if not is_named:
        kind = "stdin" if head == "-" else "script"
        return PythonCall(list(words), flags, at, kind, head, tuple(rest[1:]))
    letter = re.search("[cm]", head)
    assert letter is not None
    flags += head[1 : letter.start()]
    name, others = head[letter.end() :], rest[1:]
    if not name:
        if not others:
            return PythonCall(list(words), flags, at)
        name, *others = others
    kind = "module" if letter[0] == "m" else "code"
    return PythonCall(list(words), flags, at, kind, name, tuple(others))


def is_interpreter(program: str) -> bool:
    """Whether ``program`` is called as Pythons are."""
    return _PYTHON.fullmatch(Path(program).name) is not None


def with_detour(environ: Mapping[str, str], *, only_workers: bool = False) -> dict[str, str]:
    """``environ`` for a process that is to instrument itself when it begins."""
    environment = without_detour(environ)
    own = environment.get("PYTHONPATH")
    # An empty one is none to Python; with a separator it would be the current folder.
    environment["PYTHONPATH"] = AUTOLOAD + os.pathsep + own if own else AUTOLOAD
    if own is not None:
        environment[CHAINED] = own
    if only_workers:
        environment[ONLY_WORKERS] = "1"
    return environment


def without_detour(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as it would have been without us.

    Folders that a shell script has put around it stay (``PYTHONPATH=lib:$PYTHONPATH``).
    """
    environment = dict(environ)
    own = environment.pop(CHAINED, None)
    environment.pop(ONLY_WORKERS, None)
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    if folders == [AUTOLOAD]:
        environment.pop("PYTHONPATH")
        if own is not None:
            environment["PYTHONPATH"] = own
    elif AUTOLOAD in folders:
        # Without one of the user's own, that script would have found an empty one.
        environment["PYTHONPATH"] = os.pathsep.join(
            "" if each == AUTOLOAD else each for each in folders if each != AUTOLOAD or not own
        )
    return environment


def leave_path(path: list[str], environ: Mapping[str, str]) -> None:
    """Take the detour out of ``sys.path``; ``environ`` is the one without it.

    An empty folder in ``PYTHONPATH`` is the current one, unless there is no other.
    """
    own = environ.get("PYTHONPATH", "")
    has_empty = own != "" and "" in own.split(os.pathsep)
    while AUTOLOAD in path:
        at = path.index(AUTOLOAD)
        current = [str(Path.cwd())] if has_empty else []
        path[at : at + 1] = [each for each in current if each not in path]


class HandsOn:
    """Hands the detour on from this process, which trains, to those that it should reach."""

    def __init__(self, before_exec: Callable[[], object]) -> None:
        """``before_exec`` is called when another program is about to take this one's place."""
        self.handed = False
        """Whether a process was started that may train in place of this one."""
        self._before_exec = before_exec
        self._pid = os.getpid()
        self._ranks = [os.environ.get(name) for name in _RANKS]
        self._own = _call_of(sys.orig_argv)

    def put_on(self) -> None:
        """Take part in ``os.execv``, ``os.execve`` and ``subprocess.Popen`` from now on."""
        execv, execve = os.execv, os.execve

        @functools.wraps(execv)
        def execv_with(path: Any, argv: Any, /) -> Any:
            environment = self._for_successor(path, os.environ)
            if environment is None:
                return execv(path, argv)
            return execve(path, argv, environment)

        @functools.wraps(execve)
        def execve_with(path: Any, argv: Any, env: Any) -> Any:
            environment = self._for_successor(path, env)
            return execve(path, argv, env if environment is None else environment)

        os.execv, os.execve = execv_with, execve_with
        begin = subprocess.Popen.__init__

        @functools.wraps(begin)
        def begin_with(popen: Any, *args: Any, **kwargs: Any) -> None:
            begin(popen, *args, **self._with_environment(args, kwargs))

        subprocess.Popen.__init__ = begin_with  # type: ignore[method-assign, assignment]

    def _for_successor(self, path: Any, environ: Any) -> dict[str, str] | None:
        """The environment of what takes this process's place; None to leave it alone."""
        try:
            if os.getpid() != self._pid or not os.access(path, os.X_OK):
                return None  # a child, which is no successor, or a place of the PATH without it
            environment = with_detour(
                {os.fsdecode(k): os.fsdecode(v) for k, v in environ.items()}
            )
            self._before_exec()
        except Exception:  # an environment that is none: the call itself says so
            return None
        return environment

    def _with_environment(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` of a ``Popen``, with the detour where the child is one that may train."""
        try:
            if len(args) > 9:  # the environment by its place: nobody calls it so
                return kwargs
            given = kwargs.get("env")
            environ = os.environ if given is None else given
            call = _call_of(_words(args[0] if args else kwargs["args"]))
            if not self._may_train(call, environ):
                return kwargs
            self.handed = True
            detour = with_detour(environ, only_workers=call is None or call.is_launcher)
        except Exception:  # whatever it is, the call itself says so
            return kwargs
        return {**kwargs, "env": detour}

    def _may_train(self, call: PythonCall | None, environ: Mapping[str, str]) -> bool:
        is_other_rank = [environ.get(name) for name in _RANKS] != self._ranks
        if call is None:
            return is_other_rank  # what starts a Python: numactl, a shell script
        if call.kind == "code" and call.is_launcher:
            return False  # workers of multiprocessing
        if call.is_launcher or is_other_rank:
            return True
        own = self._own
        return own is not None and (own.kind, own.name) == (call.kind, call.name)


def own_call() -> PythonCall | None:
    """What this process was asked to run."""
    return _call_of(sys.orig_argv)


def _call_of(words: Sequence[str]) -> PythonCall | None:
    """What a command has a Python run, as far as it can be told; None where it has none."""
    if not words:
        return None
    try:
        if is_interpreter(words[0]):
            return python_call(words[1:])
    except ValueError:
        return None
    call = PythonCall(list(words), "", 0, "script", words[0], tuple(words[1:]))
    return call if call.is_launcher else None


def _words(args: Any) -> list[str]:
    """The words of a command as ``Popen`` takes it."""
    if isinstance(args, bytes | str):
        return shlex.split(os.fsdecode(args))
    if isinstance(args, os.PathLike):
        return [os.fsdecode(args)]
    return [os.fsdecode(each) for each in args]
