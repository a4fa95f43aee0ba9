"""Device probes beside the training loop: present, absent, failing, hanging, stale."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from esper_otel.leyline.metrics import BY_KEY
from esper_otel.tolaria.devices import (
    CpuUtilisation,
    CudaMemory,
    DeviceSampler,
    GpuUtilisation,
    default_probes,
)
from testkit.patience import PATIENCE_S


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeProbe:
    """Gives the results one after another, the last for ever; exceptions are raised."""

    def __init__(self, name: str, *results: Mapping[str, float] | Exception) -> None:
        self.name = name
        self.results = list(results)
        self.threads: set[str] = set()
        self.closed = 0

    def read(self, device: int | None) -> Mapping[str, float]:
        self.threads.add(threading.current_thread().name)
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self.closed += 1


CPU = FakeProbe("cpu", {"cpu_util_percent": 50.0})


def eventually(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> bool:
    until = monotonic() + within_s
    while not condition():
        if monotonic() > until:
            return False
        sleep(0.001)
    return True


@pytest.fixture(autouse=True)
def left():
    """Threads that tests before have left behind, as they had them fail at their end."""
    LEFT[:] = threading.enumerate()


LEFT: list[threading.Thread] = []


def names_of_threads() -> set[str]:
    """Of those that have been started since."""
    return {thread.name for thread in threading.enumerate() if thread not in LEFT}


def test_values_of_all_probes_are_there_after_one_sample() -> None:
    sampler = DeviceSampler(True, [CPU, FakeProbe("gpu", {"gpu_util_percent": 9.0})])
    assert sampler.fresh_values() == {}
    sampler.sample()
    assert sampler.fresh_values() == {"cpu_util_percent": 50.0, "gpu_util_percent": 9.0}


def test_a_probe_that_raises_leaves_its_value_out_is_told_once_and_may_come_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trouble = RuntimeError("driver is gone")
    moody = FakeProbe(
        "gpu", {"gpu_util_percent": 1.0}, trouble, trouble, {"gpu_util_percent": 2.0}, trouble
    )
    sampler = DeviceSampler(True, [moody, CPU])
    seen = []
    for _ in range(5):
        sampler.sample()
        seen.append(sampler.fresh_values().get("gpu_util_percent"))
        assert sampler.fresh_values()["cpu_util_percent"] == 50.0
    assert seen == [1.0, None, None, 2.0, None]
    assert [record.getMessage() for record in caplog.records] == [
        "gpu cannot be measured, and is omitted: driver is gone"
    ]
    assert {record.name for record in caplog.records} == {"esper_otel"}


def test_an_old_sample_is_no_sample() -> None:
    clock = Clock()
    sampler = DeviceSampler(True, [CPU], interval_s=1.0, clock=clock)
    sampler.sample()
    clock.now += 2.9
    assert sampler.fresh_values() == {"cpu_util_percent": 50.0}
    clock.now += 0.2
    assert sampler.fresh_values() == {}
    sampler.sample()
    assert sampler.fresh_values() == {"cpu_util_percent": 50.0}


def test_the_thread_samples_again_and_again_and_ends_with_its_probes_closed() -> None:
    probe = FakeProbe("cpu", *({"cpu_util_percent": float(i)} for i in range(5)))
    sampler = DeviceSampler(True, [probe], interval_s=0.001)
    sampler.start()
    sampler.start()
    assert eventually(lambda: sampler.fresh_values().get("cpu_util_percent") == 4.0)
    assert probe.threads == {"esper-devices"}
    sampler.stop()
    assert sampler.fresh_values() == {}
    assert probe.closed == 1
    assert "esper-devices" not in names_of_threads()
    sampler.stop()


def test_stopping_does_not_wait_for_the_next_sample() -> None:
    sampler = DeviceSampler(True, [CPU], interval_s=3600.0)
    sampler.start()
    assert eventually(lambda: bool(sampler.fresh_values()))
    began = monotonic()
    sampler.stop()
    assert monotonic() - began < 0.4


def test_a_probe_that_hangs_holds_up_nobody_and_makes_the_values_stale() -> None:
    release, hanging = threading.Event(), threading.Event()

    class Hanging(FakeProbe):
        def read(self, device: int | None) -> Mapping[str, float]:
            if self.results.pop() == {}:
                hanging.set()
                release.wait(30)
            return {}

    clock = Clock()
    sampler = DeviceSampler(
        True, [CPU, Hanging("gpu", {}, {"x": 0.0})], interval_s=0.001, clock=clock
    )
    sampler.start()
    assert hanging.wait(PATIENCE_S)
    assert sampler.fresh_values() == {"cpu_util_percent": 50.0}
    clock.now += 1.0
    assert sampler.fresh_values() == {}
    began = monotonic()
    sampler.stop(timeout_s=0.05)
    assert monotonic() - began < 1.0
    release.set()
    assert eventually(lambda: "esper-devices" not in names_of_threads())
    assert sampler.fresh_values() == {}


def test_a_probe_whose_end_fails_does_not_stop_the_others_from_ending() -> None:
    class Stuck(FakeProbe):
        def close(self) -> None:
            raise OSError("already gone")

    last = FakeProbe("cpu", {})
    sampler = DeviceSampler(True, [Stuck("gpu", {}), last], interval_s=0.001)
    sampler.start()
    sampler.stop(timeout_s=5)
    assert last.closed == 1


def test_disabled_there_is_no_thread_and_no_value() -> None:
    before = threading.active_count()
    sampler = DeviceSampler(False, [CPU])
    sampler.start()
    assert threading.active_count() == before
    assert sampler.fresh_values() == {}
    sampler.stop()


def test_a_forked_child_has_no_values_and_starts_no_thread() -> None:
    sampler = DeviceSampler(True, [CPU])
    sampler.sample()
    child = os.fork()
    if child == 0:
        try:
            sampler.start()
            clean = sampler.fresh_values() == {} and threading.active_count() == 1
            sampler.stop()
            os._exit(0 if clean else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sampler.fresh_values() == {"cpu_util_percent": 50.0}


# --- the probes themselves


def fake_psutil(monkeypatch: pytest.MonkeyPatch, *percents: float) -> None:
    answers = iter(percents)

    def cpu_percent(interval: float | None) -> float:
        assert interval is None, "it would wait"
        return next(answers)

    module = ModuleType("psutil")
    module.cpu_percent = cpu_percent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "psutil", module)


def fake_cuda(
    monkeypatch: pytest.MonkeyPatch,
    *,
    initialised: bool = True,
    devices: int = 1,
    memory: tuple[int, int] = (20_000_000_000, 80_000_000_000),
) -> list[Any]:
    asked: list[Any] = []

    def mem_get_info(device: int) -> tuple[int, int]:
        asked.append(device)
        return memory

    cuda = SimpleNamespace(
        is_initialized=lambda: initialised,
        device_count=lambda: devices,
        mem_get_info=mem_get_info,
        get_device_properties=lambda device: SimpleNamespace(uuid=f"uuid-of-{device}"),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return asked


def fake_nvml(monkeypatch: pytest.MonkeyPatch, utilisation: int = 73) -> list[str]:
    calls: list[str] = []
    module = ModuleType("pynvml")

    def record(name: str, answer: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(" ".join([name, *map(str, arguments)]))
            return answer

        return call

    module.nvmlInit = record("init", None)  # type: ignore[attr-defined]
    module.nvmlShutdown = record("shutdown", None)  # type: ignore[attr-defined]
    module.nvmlDeviceGetHandleByUUID = record("handle", "h0")  # type: ignore[attr-defined]
    module.nvmlDeviceGetUtilizationRates = record(  # type: ignore[attr-defined]
        "rates", SimpleNamespace(gpu=utilisation)
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


def test_the_first_cpu_reading_has_nothing_to_compare_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_psutil(monkeypatch, 0.0, 37.5)
    probe = CpuUtilisation()
    assert probe.read(None) == {}
    assert probe.read(None) == {"cpu_util_percent": 37.5}


def test_cpu_utilisation_of_this_host_is_a_percentage() -> None:
    probe = CpuUtilisation()
    probe.read(None)
    assert 0.0 <= probe.read(None)["cpu_util_percent"] <= 100.0


def test_memory_is_in_units_of_a_thousand_million_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = fake_cuda(monkeypatch)
    assert CudaMemory().read(3) == {"gpu_mem_used_gb": 60.0, "gpu_mem_free_gb": 20.0}
    assert asked == [3]


def test_nvml_is_begun_once_and_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch)
    calls = fake_nvml(monkeypatch)
    probe = GpuUtilisation()
    assert probe.read(1) == probe.read(1) == {"gpu_util_percent": 73.0}
    probe.close()
    probe.close()
    assert calls == ["init", "handle GPU-uuid-of-1", "rates h0", "rates h0", "shutdown"]


@pytest.mark.parametrize("module", ["psutil", "pynvml"])
def test_a_package_that_is_not_installed_leaves_its_metric_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str
) -> None:
    fake_psutil(monkeypatch, 0.0, 10.0)
    fake_cuda(monkeypatch)
    fake_nvml(monkeypatch)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    sampler = DeviceSampler(True)
    sampler.sample()
    sampler.sample()
    everything = {"cpu_util_percent", "gpu_util_percent", "gpu_mem_used_gb", "gpu_mem_free_gb"}
    missing = {"psutil": "cpu_util_percent", "pynvml": "gpu_util_percent"}[module]
    assert set(sampler.fresh_values()) == everything - {missing}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("torch", [None, "half imported", "no context yet"])
def test_without_a_cuda_context_of_the_run_the_device_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, torch: str | None
) -> None:
    calls = fake_nvml(monkeypatch)
    asked = fake_cuda(monkeypatch, initialised=False)
    if torch is None:
        monkeypatch.delitem(sys.modules, "torch")
    elif torch == "half imported":
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())  # type: ignore[arg-type]
    sampler = DeviceSampler(True, [CudaMemory(), GpuUtilisation()])
    sampler.watch(0)
    sampler.sample()
    assert sampler.fresh_values() == {}
    assert (asked, calls, caplog.records) == ([], [], [])


@pytest.mark.parametrize(
    ("devices", "watched", "expected"),
    [(1, None, [0]), (1, 0, [0]), (8, None, []), (8, 5, [5])],
)
def test_only_the_device_of_the_run_is_asked(
    monkeypatch: pytest.MonkeyPatch, devices: int, watched: int | None, expected: list[int]
) -> None:
    asked = fake_cuda(monkeypatch, devices=devices)
    sampler = DeviceSampler(True, [CudaMemory()])
    if watched is not None:
        sampler.watch(watched)
    sampler.sample()
    assert asked == expected


def test_probes_fill_exactly_the_device_metrics_of_the_registry(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_psutil(monkeypatch, 0.0, 10.0)
    fake_cuda(monkeypatch)
    fake_nvml(monkeypatch)
    sampler = DeviceSampler(True, default_probes())
    sampler.sample()
    sampler.sample()
    assert set(sampler.fresh_values()) == {k for k in BY_KEY if k.startswith(("gpu_", "cpu_"))}
    assert all(BY_KEY[key].gated for key in sampler.fresh_values())
    assert caplog.records == []
