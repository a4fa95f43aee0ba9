"""Answer latency: asks come between the parts of other work, and a process has its slice."""

import errno
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from esper_tamiyo import child_process, latency
from esper_tamiyo.child_process import ChildProcess
from esper_tamiyo.latency import (
    COLLECT_EVERY,
    LOOK_AGAIN_NS,
    SLICE_NS,
    YOUNG_OBJECTS,
    GarbageSchedule,
    Upkeep,
    shorten_slice,
)
from esper_tamiyo.serving.server import Server
from sidecar.running import sidecar, until

SHORT, LONG = LOOK_AGAIN_NS // 10, LOOK_AGAIN_NS + 1
SET, GET = 314, 315
OTHER, FIFO, BATCH, DEADLINE = 0, 1, 3, 6


class Work:
    """Parts that take as long as they are told, by a clock of their own."""

    def __init__(self, monkeypatch, *takes):
        self.now = 1_000
        self.done = []
        self.looks = 0
        self.asked = False
        monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.now)
        parts = [lambda nth=nth: self.do(nth) for nth in range(len(takes))]
        self.takes = list(takes)
        self.upkeep = Upkeep(parts, self.look)

    def do(self, nth):
        self.done.append(nth)
        self.now += self.takes[nth]

    def look(self):
        self.looks += 1
        return self.asked

    def turn(self):
        self.done.clear()
        self.upkeep.go_on(self.now)
        return self.done


def test_short_parts_are_all_done_in_one_turn_without_a_look(monkeypatch):
    work = Work(monkeypatch, SHORT, SHORT, SHORT)
    work.asked = True
    assert work.turn() == [0, 1, 2]
    assert work.turn() == [0, 1, 2]
    assert work.looks == 0


def test_who_asks_waits_for_one_long_part_and_the_next_turn_does_the_others(monkeypatch):
    work = Work(monkeypatch, LONG, LONG, SHORT)
    work.asked = True
    assert work.turn() == [0]
    assert work.turn() == [1]
    assert work.turn() == [2, 0]
    work.asked = False
    assert work.turn() == [1, 2, 0]


def test_many_short_parts_together_are_a_long_one(monkeypatch):
    work = Work(monkeypatch, *[LOOK_AGAIN_NS // 2] * 6)
    assert work.turn() == [0, 1, 2, 3, 4, 5]
    assert work.looks == 2, "after the third and the sixth"
    work.asked = True
    assert work.turn() == [0, 1, 2]


class Collector:
    """Python's garbage collector, as far as a schedule knows it."""

    def __init__(self):
        self.young = 0
        self.collected = []

    def get_count(self):
        return self.young, 0, 0

    def collect(self, generation=2):
        self.young = 0
        self.collected.append(generation)


@pytest.fixture
def collector(monkeypatch):
    fake = Collector()
    monkeypatch.setattr(latency, "gc", fake)
    return fake


def test_young_garbage_is_collected_after_some_steps_or_at_once_when_it_is_much(collector):
    schedule = GarbageSchedule()
    for _ in range(COLLECT_EVERY - 1):
        schedule.count_step()
        schedule.collect_young()
    assert collector.collected == []
    schedule.count_step()
    schedule.collect_young()
    schedule.collect_young()
    assert collector.collected == [0]
    collector.young = YOUNG_OBJECTS
    schedule.collect_young()
    schedule.collect_young()
    assert collector.collected == [0, 0]


def test_all_garbage_is_collected_once_after_young_garbage_was(collector):
    schedule = GarbageSchedule()
    schedule.collect_all()
    assert collector.collected == []
    collector.young = YOUNG_OBJECTS
    schedule.collect_young()
    schedule.collect_all()
    schedule.collect_all()
    assert collector.collected == [0, 2]


class Kernel:
    """The two system calls, with the attributes of one process."""

    def __init__(self, policy=OTHER, *, knows_slices=True, refuses=()):
        self.attributes = [48, policy, 1, -7, 0, 2_800_000, 0, 0, 0, 1024]
        self.calls = []
        self._knows_slices = knows_slices
        self._refuses = refuses
        if not knows_slices:
            self.attributes[5] = 0

    def __call__(self, number, pid, attributes, *others):
        self.calls.append((number, pid))
        if number in self._refuses:
            raise PermissionError(errno.EPERM, "not permitted")
        if number == GET:
            assert others == (len(attributes), 0)
            latency._ATTRIBUTES.pack_into(attributes, 0, *self.attributes)
        else:
            assert others == (0,)
            told = [*latency._ATTRIBUTES.unpack(attributes)]
            assert told[0] == len(attributes) == 56
            self.attributes = told if self._knows_slices else [*told[:5], 0, *told[6:]]


@pytest.fixture
def on_linux(monkeypatch):
    """A way to say what the system is, x86_64 unless told otherwise."""

    def system(kernel, machine="x86_64", name="linux", largest=2**63 - 1):
        monkeypatch.setattr(latency, "_system_call", kernel)
        monkeypatch.setattr(latency.platform, "machine", lambda: machine)
        monkeypatch.setattr(latency.sys, "platform", name)
        monkeypatch.setattr(latency.sys, "maxsize", largest)
        return kernel

    return system


@pytest.mark.parametrize("policy", [OTHER, BATCH])
def test_a_slice_is_shortened_and_all_else_stays(on_linux, policy):
    kernel = on_linux(Kernel(policy))
    assert shorten_slice(42)
    assert kernel.attributes == [56, policy, 1, -7, 0, SLICE_NS, 0, 0, 0, 1024]
    assert kernel.calls == [(GET, 42), (SET, 42), (GET, 42)]


def test_an_arm_machine_has_other_numbers(on_linux):
    kernel = on_linux(Kernel(refuses=[275]), "aarch64")
    assert not shorten_slice()
    assert kernel.calls == [(275, 0)]


@pytest.mark.parametrize("policy", [FIFO, DEADLINE])
def test_a_policy_without_slices_is_left_alone(on_linux, policy):
    kernel = on_linux(Kernel(policy))
    assert not shorten_slice()
    assert kernel.calls == [(GET, 0)]


@pytest.mark.parametrize(
    "kernel",
    [Kernel(knows_slices=False), Kernel(refuses=[GET]), Kernel(refuses=[SET])],
    ids=["ignores it", "does not tell", "refuses"],
)
def test_where_the_kernel_does_not_nothing_happens(on_linux, kernel, caplog):
    on_linux(kernel)
    assert not shorten_slice()
    assert caplog.text == ""


@pytest.mark.parametrize(
    "system",
    [{"machine": "riscv64"}, {"name": "darwin"}, {"largest": 2**31 - 1}],
    ids=["machine", "system", "32 bits"],
)
def test_no_other_system_is_called(on_linux, system):
    kernel = on_linux(Kernel(), **system)
    assert not shorten_slice()
    assert kernel.calls == []


OF_ITSELF = f"""
import os, subprocess
from esper_tamiyo import child_process, latency
from esper_tamiyo.child_process import ChildProcess

def attributes(pid=0):
    place = bytearray(56)
    latency._system_call({GET} if os.uname().machine == "x86_64" else 275, pid, place, 56, 0)
    return latency._ATTRIBUTES.unpack(place)

usual = attributes()
assert latency.shorten_slice()
assert attributes() == (*usual[:5], latency.SLICE_NS, *usual[6:])
with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
    assert attributes(child.pid)[1:6] == (*usual[1:5], latency.SLICE_NS)
    latency.put_behind(child.pid)
    assert attributes(child.pid)[1:6] == (os.SCHED_BATCH, *usual[2:6])
"""


def knows_slices():
    """Whether this machine's kernel lets processes choose their slices, by its release."""
    if not sys.platform.startswith("linux") or platform.machine() not in latency._SYSTEM_CALLS:
        return False
    major, minor = platform.release().split(".")[:2]
    return (int(major), int(minor)) >= (6, 12)


@pytest.mark.skipif(not knows_slices(), reason="slices can be chosen since Linux 6.12")
def test_this_kernel_shortens_a_slice_and_a_child_has_the_usual_one():
    subprocess.run([sys.executable, "-c", OF_ITSELF], check=True)


@pytest.mark.parametrize(
    ("is_prompt", "order"),
    [(True, ["answer", "yield", "upkeep"]), (False, ["answer", "upkeep"])],
)
def test_who_was_answered_runs_before_the_upkeep(monkeypatch, is_prompt, order):
    done = []
    monkeypatch.setattr(os, "sched_yield", lambda: done.append("yield"))
    server = Server.__new__(Server)
    server._is_prompt, server._connections = is_prompt, {8: object()}
    server._listener = SimpleNamespace(socket=SimpleNamespace(fileno=lambda: 3))
    server._patience = lambda: 0.0
    server._serve = lambda connection, events: done.append("answer")
    server._upkeep = SimpleNamespace(go_on=lambda looked_at: done.append("upkeep"))
    server._epoll = SimpleNamespace(poll=lambda patience: [(8, 1)])
    server._turn(None)
    assert done == order
    done.clear()
    server._epoll = SimpleNamespace(poll=lambda patience: [])
    server._turn(None)
    assert done == ["upkeep"]


def test_children_come_after_the_process_that_answers(tmp_path):
    with sidecar(tmp_path / "t.sock", ingest=True, is_forked=False) as running:
        status = running.status()
        own_nice = os.getpriority(os.PRIO_PROCESS, status["pid"])
        for pid in (status["ingest"]["pid"], status["scribe"]["pid"]):
            assert os.sched_getscheduler(pid) == os.SCHED_BATCH
            until(lambda pid=pid: os.getpriority(os.PRIO_PROCESS, pid) > own_nice)


def test_a_child_comes_after_it_from_the_start(monkeypatch):
    class Child(ChildProcess):
        def start(self):
            self._launch(())

    put = []
    monkeypatch.setattr(child_process, "put_behind", put.append)
    child = Child("no_such_module", 5.0)
    child.start()
    assert put == [child.pid]
    child.close()
