"""Streams that keep what they are given, of one run or of several."""

from __future__ import annotations

from esper_otel.leyline.custom import custom_key
from esper_otel.leyline.frames import NO_CUSTOM, present
from esper_otel.leyline.metrics import STEP_KEYS


class CapturedStream:
    """Stands where the stream stands and keeps what it is given."""

    def __init__(self, *_: object, **__: object) -> None:
        self._frames: list[dict[str, float]] = []
        self._timelines: list[object] = []
        self._notes = None
        self.is_awaited = False
        self.events: list[object] = []
        self.ends: list[tuple[int, str]] = []
        """Each end of the run: its last step, and how it ended."""
        self.left: dict[str, float] = {}
        """Custom values that came with the ends."""
        self.config: dict[str, object] = {}
        self.closed = False

    def start(self) -> None:
        pass

    def configure(self, values, *, explicit=False):
        self.config.update(values)

    def follow(self, notes):
        self._notes = notes
        return self

    @property
    def frames(self):
        """The steps so far; those that were only noted are taken up now."""
        self._catch_up()
        return self._frames

    @property
    def timelines(self):
        self._catch_up()
        return self._timelines

    def _catch_up(self):
        if self._notes is not None:
            self._notes.catch_up()

    def frame(self, time_unix_nano, row, seeds=(), custom=NO_CUSTOM):
        own = {custom_key(name): value for name, value in custom.items()}
        self._frames.append(present(STEP_KEYS, row) | own)

    def timeline(self, timeline):
        self._timelines.append(timeline)

    def event(self, event):
        self.events.append(event)

    def end(self, frame):
        self.ends.append((frame.step, str(frame.ended)))
        self.left.update(frame.values)

    def snapshot(self):
        return None

    def close(self, timeout_s=None):
        self.closed = True
        return self


class CapturedRuns:
    """The frames of each run by its name, as far as it has any."""

    def __init__(self):
        self.made = []

    def open(self, *_, run_id, **__):
        stream = CapturedStream()
        self.made.append((run_id, stream))
        return stream

    def steps(self):
        told = {}
        for name, stream in self.made:
            if stream.frames:
                assert name not in told
                told[name] = [frame["step"] for frame in stream.frames]
        return told

    def frames(self, name):
        (frames,) = [s.frames for n, s in self.made if n == name and s.frames]
        return frames
