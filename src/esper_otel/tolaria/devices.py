"""How busy the host and the accelerator are, sampled beside the training loop.

A thread asks the probes about once a second; a step only reads what was found last. No
probe creates a CUDA context, on any device: it looks at the one the run uses already.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Protocol

from esper_otel.finalization import FinalizingError, no_shutdown_inside

log = logging.getLogger("esper_otel")

INTERVAL_S = 1.0

FRESH_FOR = 3.0
"""Intervals after which a sample is stale. Unknown is not healthy, and old is unknown."""

_NOTHING: Mapping[str, float] = {}


class Probe(Protocol):
    """One source of values. Called on the sampler's thread only."""

    name: str

    def read(self, device: int | None) -> Mapping[str, float]:
        """Values by registry key, none when there is nothing to measure; may raise.

        ``device`` is torch's index of the CUDA device in use, None when there is none.
        """

    def close(self) -> None:
        """Give back what :meth:`read` has opened; may raise."""


class DeviceSampler:
    """Reads all ``probes`` every ``interval_s`` seconds, on a daemon thread of its own.

    ``enabled`` False: no thread, no values. A probe that raises, or is missing what it
    needs, leaves its values out and is logged once; it is tried again every time.
    Nothing here raises. In a forked child there is no thread, and no value.
    """

    def __init__(
        self,
        enabled: bool,
        probes: Sequence[Probe] | None = None,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._enabled = enabled
        self._probes = default_probes() if probes is None else tuple(probes)
        self._interval_s = interval_s
        self._fresh_s = FRESH_FOR * interval_s
        self._clock = clock
        self._device: int | None = None
        self._complained: set[str] = set()
        self._sample: tuple[float, Mapping[str, float]] = (0.0, _NOTHING)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        _samplers.add(self)

    def fresh_values(self) -> Mapping[str, float]:
        """The newest values by registry key; empty when there are none that are fresh."""
        taken_at, values = self._sample
        if values and self._clock() - taken_at > self._fresh_s:
            return _NOTHING
        return values

    def watch(self, device: int) -> None:
        """Say which CUDA device the run uses, by torch's index.

        The current device belongs to a thread, so the sampler's own cannot know it.
        Untold, it is the only visible one, or none.
        """
        self._device = device

    def start(self) -> None:
        """Begin to sample; does nothing when disabled or begun."""
        if not self._enabled or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="esper-devices", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 0.5) -> None:
        """End the thread, waiting at most ``timeout_s`` for a probe that hangs."""
        self._stop.set()
        self._sample = (0.0, _NOTHING)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def sample(self) -> None:
        """Read every probe once; what the thread does."""
        began = self._clock()
        values: dict[str, float] = {}
        device = self._device_in_use()
        for probe in self._probes:
            try:
                values.update(probe.read(device))
            except Exception as error:
                self._complain(probe, error)
        if not self._stop.is_set():
            self._sample = (began, values)

    def disable(self) -> None:
        """Have no values and no thread: in a forked child there is none."""
        self._enabled = False
        self._thread = None
        self._sample = (0.0, _NOTHING)

    def _run(self) -> None:
        while True:
            try:
                with no_shutdown_inside():
                    self.sample()
            except FinalizingError:
                return
            if self._stop.wait(self._interval_s):
                break
        for probe in self._probes:
            try:
                probe.close()
            except Exception as error:
                self._complain(probe, error)

    def _device_in_use(self) -> int | None:
        torch = _initialised_torch()
        if torch is None:
            return None
        if self._device is not None:
            return self._device
        try:
            return 0 if torch.cuda.device_count() == 1 else None
        except Exception:
            return None

    def _complain(self, probe: Probe, error: Exception) -> None:
        if probe.name not in self._complained:
            self._complained.add(probe.name)
            log.warning("%s cannot be measured, and is omitted: %s", probe.name, error)


class CpuUtilisation:
    """``cpu_util_percent``: how busy all CPUs of the host were since the last reading."""

    name = "CPU utilisation"

    def __init__(self) -> None:
        self._primed = False

    def read(self, device: int | None) -> Mapping[str, float]:
        """Nothing on the first reading, which has no earlier one to compare with."""
        import psutil

        percent = psutil.cpu_percent(interval=None)
        if not self._primed:
            self._primed = True
            return _NOTHING
        return {"cpu_util_percent": float(percent)}

    def close(self) -> None:
        """Nothing is open."""


class CudaMemory:
    """``gpu_mem_used_gb`` and ``gpu_mem_free_gb``, of all processes on the device.

    In UCUM's GBy: 1e9 bytes, not 2**30.
    """

    name = "GPU memory"

    def read(self, device: int | None) -> Mapping[str, float]:
        """Nothing without a device in use."""
        if device is None or (torch := _initialised_torch()) is None:
            return _NOTHING
        free, total = torch.cuda.mem_get_info(device)
        return {"gpu_mem_used_gb": (total - free) / 1e9, "gpu_mem_free_gb": free / 1e9}

    def close(self) -> None:
        """Nothing is open."""


class GpuUtilisation:
    """``gpu_util_percent``: share of the last moment in which the device had work."""

    name = "GPU utilisation"

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: dict[int, Any] = {}

    def read(self, device: int | None) -> Mapping[str, float]:
        """Nothing without a device in use; needs the nvidia-ml-py package."""
        if device is None:
            return _NOTHING
        if self._nvml is None:
            import pynvml

            nvml: Any = pynvml
            nvml.nvmlInit()
            self._nvml = nvml
        handle = self._handles.get(device)
        if handle is None:
            handle = self._handles[device] = self._handle(device)
        return {"gpu_util_percent": float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)}

    def close(self) -> None:
        """Shut NVML down, if it was begun."""
        nvml, self._nvml = self._nvml, None
        self._handles.clear()
        if nvml is not None:
            nvml.nvmlShutdown()

    def _handle(self, device: int) -> Any:
        # By its UUID: torch numbers the devices that CUDA_VISIBLE_DEVICES left, in its
        # order; NVML numbers all there are.
        torch = _initialised_torch()
        uuid = torch.cuda.get_device_properties(device).uuid if torch is not None else None
        return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def default_probes() -> tuple[Probe, ...]:
    """The probes of every registry metric that describes a device."""
    return (CpuUtilisation(), CudaMemory(), GpuUtilisation())


def _initialised_torch() -> Any:
    """The torch module if this process has a CUDA context of its own making, else None."""
    torch = sys.modules.get("torch")
    try:
        return torch if torch is not None and torch.cuda.is_initialized() else None
    except Exception:  # a torch that is half imported, or built without CUDA
        return None


_samplers: weakref.WeakSet[DeviceSampler] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for sampler in _samplers:
        sampler.disable()


os.register_at_fork(after_in_child=_after_fork_in_child)
