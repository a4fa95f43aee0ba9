"""What a command has Python run, and to whom the detour is handed on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_otel.integrations.launching import (
    AUTOLOAD,
    CHAINED,
    ONLY_WORKERS,
    HandsOn,
    leave_path,
    python_call,
    with_detour,
    without_detour,
)


@pytest.mark.parametrize(
    ("words", "flags", "place", "kind", "name", "arguments"),
    [
        ("train.py -m x", "", 0, "script", "train.py", ("-m", "x")),
        ("-u -X dev -W error train.py", "u", 5, "script", "train.py", ()),
        ("-uXdev -Werror -OO t.py -u", "uOO", 3, "script", "t.py", ("-u",)),
        ("-um package a", "u", 0, "module", "package", ("a",)),
        ("-mpackage -c", "", 0, "module", "package", ("-c",)),
        ("-B -c code a --", "B", 1, "code", "code", ("a", "--")),
        ("-- -train.py a", "", 1, "script", "-train.py", ("a",)),
        ("- a", "", 0, "stdin", "-", ("a",)),
        ("--check-hash-based-pycs always t.py", "", 2, "script", "t.py", ()),
        ("-m", "", 0, "", "", ()),
        ("-V", "V", 1, "", "", ()),
        ("", "", 0, "", "", ()),
    ],
)
def test_a_command_line_is_read_as_python_reads_it(words, flags, place, kind, name, arguments):
    call = python_call(words.split())
    assert (call.flags, call.place, call.kind, call.name, call.arguments) == (
        flags,
        place,
        kind,
        name,
        arguments,
    )


@pytest.mark.parametrize("words", ["-Z t.py", "--lr 1", "-uZ"])
def test_what_is_no_option_of_python_is_named(words):
    with pytest.raises(ValueError, match=words.split()[0]):
        python_call(words.split())


@pytest.mark.parametrize(
    ("words", "is_launcher"),
    [
        ("/env/bin/torchrun t.py", True),
        ("/env/bin/accelerate launch t.py", True),
        ("/env/ray/core/src/ray/raylet/raylet --node_ip=::1", True),
        ("/env/bin/accelerate config", False),
        ("-m torch.distributed.run t.py", True),
        ("-m deepspeed.launcher.launch t.py", True),
        ("-m torch.distributed.runner t.py", False),
        ("-m esper_otel t.py", True),
        ("train.py", False),
        ("-m package.train", False),
    ],
)
def test_launchers_are_known(words, is_launcher):
    assert python_call(words.split()).is_launcher == is_launcher


@pytest.mark.parametrize(
    ("words", "may_idle"),
    [
        ("/env/site-packages/ray/_private/workers/default_worker.py --node=1", True),
        ("-u /env/site-packages/ray/dashboard/agent.py", True),
        ("-c pass", True),
        ("/home/ray/train.py", False),
        ("-m package.train", False),
    ],
)
def test_workers_that_a_server_keeps_ready_may_train_nothing(words, may_idle):
    assert python_call(words.split()).may_idle == may_idle


@pytest.mark.parametrize("own", [None, "", "lib", ":lib:"])
def test_the_detour_can_be_undone(own):
    environ = {"A": "1"} if own is None else {"A": "1", "PYTHONPATH": own}
    there = with_detour(environ, only_workers=True)
    assert there["PYTHONPATH"].split(os.pathsep)[0] == AUTOLOAD
    assert "" not in there["PYTHONPATH"].split(os.pathsep) or own == ":lib:"
    assert without_detour(there) == environ
    assert with_detour(there) == with_detour(environ)


@pytest.mark.parametrize("own", [None, "", "lib", "lib:more"])
@pytest.mark.parametrize("around", ["a:{}", "{}:a", "a:b:{}:c"])
def test_folders_that_a_script_puts_around_it_stay(own, around):
    there = with_detour({} if own is None else {"PYTHONPATH": own})
    there["PYTHONPATH"] = around.format(there["PYTHONPATH"])
    assert without_detour(there) == {"PYTHONPATH": around.format(own or "")}


@pytest.mark.parametrize(
    ("own", "left"), [(None, ["a"]), ("", ["a"]), ("a:", ["a", "HERE"]), ("a", ["a"])]
)
def test_an_empty_folder_that_it_leaves_is_the_current_one(own, left):
    path, here = ["a", AUTOLOAD, "zip"], str(Path.cwd())
    leave_path(path, {} if own is None else {"PYTHONPATH": own})
    assert path == [*(here if each == "HERE" else each for each in left), "zip"]


@pytest.fixture
def put_on(monkeypatch):
    """HandsOn of a process that runs train.py as rank 0, and what children were given."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py"])
    given = []

    def begin(popen, args, **kwargs):
        given.append(kwargs.get("env"))
        popen.pid, popen.returncode, popen._child_created = 0, 0, False

    monkeypatch.setattr(subprocess.Popen, "__init__", begin)
    execed = []
    monkeypatch.setattr(os, "execv", lambda path, argv: execed.append((path, None)))
    monkeypatch.setattr(os, "execve", lambda path, argv, env: execed.append((path, env)))
    hands_on = HandsOn(before_exec=lambda: execed.append("sent"))
    hands_on.put_on()
    hands_on.given, hands_on.execed = given, execed
    return hands_on


TRAINS = {
    "another rank": (["python", "other.py"], {"RANK": "1", "LOCAL_RANK": "1"}, False),
    "another rank, bound": (["numactl", "python", "other.py"], {"RANK": "1"}, True),
    "the script itself": ([sys.executable, "-u", "train.py", "a"], None, False),
    "a launcher": (["/env/bin/torchrun", "x.py"], None, True),
    "a module that is one": (["python3", "-m", "torch.distributed.run", "x.py"], None, True),
    "in one text": ("python -m accelerate.commands.launch x.py", None, True),
}
OTHERS = {
    "another script": ["python", "other.py"],
    "another program": ["nvidia-smi", "-L"],
    "a worker": ["python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"],
    "no command": [],
    "quotes that do not end": "python 'train.py",
}


@pytest.mark.parametrize(("args", "env", "launches"), TRAINS.values(), ids=TRAINS)
def test_children_that_train_get_the_detour(put_on, args, env, launches):
    environ = None if env is None else {**os.environ, **env}
    subprocess.Popen(args, env=environ)
    (given,) = put_on.given
    assert given["PYTHONPATH"].split(os.pathsep)[0] == AUTOLOAD
    assert (ONLY_WORKERS in given) == launches
    assert put_on.handed
    assert environ is None or AUTOLOAD not in environ.get("PYTHONPATH", "")


@pytest.mark.parametrize("args", OTHERS.values(), ids=OTHERS)
def test_other_children_do_not(put_on, args):
    subprocess.Popen(args)
    assert put_on.given == [None]
    assert not put_on.handed


def test_what_takes_the_place_of_the_process_gets_it_and_what_was_unsent_is_sent(put_on):
    os.execv("/nowhere/program", ["program"])
    assert put_on.execed.pop() == ("/nowhere/program", None)
    os.execv(sys.executable, ["program"])
    os.execvpe(sys.executable, ["program"], {"PYTHONPATH": "lib"})
    sent, (_, first), again, (_, second) = put_on.execed
    assert sent == again == "sent"
    assert first["PYTHONPATH"].startswith(AUTOLOAD)
    assert second == {"PYTHONPATH": f"{AUTOLOAD}{os.pathsep}lib", CHAINED: "lib"}


def test_a_forked_child_execs_without_it(put_on, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: -1)
    os.execv(sys.executable, ["program"])
    assert put_on.execed == [(sys.executable, None)]
