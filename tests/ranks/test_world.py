"""Which rank of which run a process is."""

from __future__ import annotations

import logging
import socket
import threading

import psutil
import pytest

from esper_otel.leyline.frames import MAX_NAME
from esper_otel.ranks import world
from esper_otel.settings import EsperSettings

torch = pytest.importorskip("torch")

OF_TWO = EsperSettings(world_size=2)


@pytest.fixture
def agent(monkeypatch):
    """A store as torchrun's agent keeps one, and the environment of a worker."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    worker(monkeypatch, store.port)
    return store


def worker(monkeypatch, port: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def named(monkeypatch, settings=OF_TWO) -> str:
    """The run's name in a fresh process."""
    monkeypatch.setattr(world, "_named", 0)
    return world.with_identity(settings).run_id


def test_one_process_names_its_run_itself(caplog) -> None:
    with caplog.at_level(logging.WARNING, "esper_otel"):
        names = {world.with_identity(EsperSettings()).run_id for _ in range(3)}
    assert len(names) == 3
    assert not caplog.records


def test_a_name_that_is_given_is_taken(agent) -> None:
    assert world.with_identity(EsperSettings(world_size=2, run_id="mine")).run_id == "mine"


@pytest.mark.parametrize("name", ["mine", "a/b c", "ünïcode", "x" * MAX_NAME])
def test_a_name_that_can_be_borne_is_borne_as_it_is(name, caplog):
    assert world.with_identity(EsperSettings(run_id=name)).run_id == name
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    ["two\nlines", "\x1b[2Jscreen", "\udcff", "x" * (MAX_NAME + 1), "ü" * 5000, "a\u202eb"],
)
def test_another_name_is_the_same_short_one_on_all_ranks(name, caplog):
    got = {
        world.with_identity(EsperSettings(run_id=name, rank=rank, world_size=2)).run_id
        for rank in (0, 1)
    }
    (run,) = got
    assert len(run) <= MAX_NAME
    assert run.isprintable()
    run.encode()
    assert run != world.usable_run_id(name + "!")
    assert world.usable_run_id(run) == run
    assert run in caplog.text
    assert "\x1b" not in caplog.text


def test_only_the_first_rank_of_a_host_says_so(caplog):
    settings = EsperSettings(run_id="a\nb", rank=1, world_size=2, local_rank=1)
    assert world.with_identity(settings).run_id.startswith("a_b-")
    assert not caplog.records


def test_torchruns_workers_have_one_name_for_each_of_their_runs(agent, monkeypatch) -> None:
    first = named(monkeypatch)
    second = world.with_identity(OF_TWO).run_id
    assert named(monkeypatch) == first
    assert world.with_identity(OF_TWO).run_id == second != first


def test_workers_that_are_started_again_are_another_run(agent, monkeypatch) -> None:
    before = named(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    after = named(monkeypatch)
    assert named(monkeypatch) == after != before


class Parent:
    """A process above this one."""

    def __init__(self, pid: int, command: str, began: float = 1e9) -> None:
        self.pid, self._command, self._began = pid, command, began

    def cmdline(self) -> list[str]:
        return self._command.split()

    def create_time(self) -> float:
        return self._began


LAUNCH = "python -u -m deepspeed.launcher.launch --world_info=e30= train.py"


@pytest.fixture
def below(monkeypatch):
    """A way to put launchers above this process, which is one of DeepSpeed's two ranks."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def put(*parents: Parent) -> None:
        monkeypatch.setattr(psutil.Process, "parents", lambda _: list(parents))

    return put


def test_deepspeeds_ranks_of_one_host_have_one_name_for_each_of_their_runs(
    below, monkeypatch, caplog
) -> None:
    below(Parent(7, LAUNCH), Parent(1, "init"))
    first = named(monkeypatch)
    second = world.with_identity(OF_TWO).run_id
    # The other rank, which numactl started.
    below(Parent(9, "numactl -C 1 python train.py"), Parent(7, LAUNCH), Parent(1, "init"))
    assert named(monkeypatch) == first
    assert world.with_identity(OF_TWO).run_id == second != first
    assert not caplog.records


def test_each_launch_of_deepspeed_is_another_run(below, monkeypatch) -> None:
    names = set()
    for pid, began in ((7, 1e9), (7, 2e9), (8, 1e9)):
        below(Parent(pid, LAUNCH, began))
        names.add(named(monkeypatch))
    assert len(names) == 3


def several_hosts(monkeypatch) -> None:
    monkeypatch.setenv("CROSS_SIZE", "2")


def another_launcher(monkeypatch) -> None:
    monkeypatch.setattr(psutil.Process, "parents", lambda _: [Parent(7, "mpirun train.py")])


def no_permission(monkeypatch) -> None:
    def parents(_: object) -> list[Parent]:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "parents", parents)


@pytest.mark.parametrize("trouble", [several_hosts, another_launcher, no_permission])
def test_where_deepspeeds_launcher_tells_nothing_each_rank_says_so(
    below, trouble, monkeypatch, caplog
) -> None:
    below(Parent(7, LAUNCH))
    trouble(monkeypatch)
    with caplog.at_level(logging.WARNING, "esper_otel"):
        assert len({named(monkeypatch) for _ in range(2)}) == 2
    assert "set the same ESPER_RUN_ID on all ranks" in caplog.text


def nothing_there(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def nobody_listens(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    worker(monkeypatch, port)


def no_port(monkeypatch) -> None:
    worker(monkeypatch, 1)
    monkeypatch.setenv("MASTER_PORT", "tcp")


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (nothing_there, "have no store in common yet"),
        (nobody_listens, "refused"),
        (no_port, "invalid literal"),
    ],
)
def test_without_a_store_each_rank_has_a_name_of_its_own(
    trouble, told, monkeypatch, caplog
) -> None:
    trouble(monkeypatch)
    with caplog.at_level(logging.WARNING, "esper_otel"):
        names = {named(monkeypatch) for _ in range(2)}
    assert len(names) == 2
    assert told in caplog.text
    assert "set the same ESPER_RUN_ID on all ranks" in caplog.text


def test_a_store_that_never_answers_is_not_waited_for(monkeypatch, caplog) -> None:
    class Mute:
        answer = threading.Event()

        def compare_set(self, *_: str) -> bytes:
            self.answer.wait()
            return b"too late"

    monkeypatch.setattr(world, "STORE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(world, "_agents_store", Mute)
    with caplog.at_level(logging.WARNING, "esper_otel"):
        assert named(monkeypatch) != "too late"
    Mute.answer.set()
    assert "their store has not answered within 0.05 s" in caplog.text
