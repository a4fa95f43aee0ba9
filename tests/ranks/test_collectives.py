"""What ranks do together they do in the same order, or they wait for each other for good."""

from __future__ import annotations

from typing import Any

import pytest
from tolaria.loops import Clock, Late, make, one_step
from tolaria.sidecars import Sidecar

from esper_otel.leyline.frames import GardenFrame
from esper_otel.ranks.agreement import Agreement

pytestmark = pytest.mark.torch

STEPS = 8
BAD = 4


class ProcessGroup:
    """Notes what one rank does together with the others; what comes of it is no matter."""

    def __init__(self, leads: bool) -> None:
        self.leads = leads
        self.done: list[str] = []

    def send(self, data: bytes) -> Any:
        self.done.append("post")
        return self

    def wait(self) -> bytes:
        raise AssertionError("not needed here")

    def leave(self) -> None:
        pass


class Garden:
    """One whose seeds learn: their gradients are averaged at the end of each step."""

    planted = True

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def learn(self, optimizer: object) -> None:
        self.group.done.append("average")

    def finalize(self, step: int, latest: object) -> GardenFrame:
        return GardenFrame([], 0.0, 0.0, 0.0)

    def proposal_sent(self, step: int) -> None:
        pass

    def apply(self, decision: object, *, enforced: bool) -> bool:
        return False

    def take_events(self) -> list[Any]:
        return []


class Rank:
    def __init__(self, leads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.group = ProcessGroup(leads)
        self.agreement = Agreement(self.group, "r")  # type: ignore[arg-type]
        monkeypatch.setattr(self.agreement, "_take", lambda: None)
        self.sidecar = Sidecar(self.clock)
        self.recorder, _ = make(client=self.sidecar)
        self.recorder.share_decisions(self.agreement, asks=leads)
        self.recorder.attach_garden(Garden(self.group))

    def step(self, *, watched: bool = True, loss: Any = 1.0) -> None:
        if watched:
            one_step(self.recorder, self.clock, loss=loss)
        else:
            self.recorder.loop_reported(loss, {})
            self.recorder.end_step()

    def plant(self) -> None:
        """As :meth:`esper_otel.run.Run.plant` does, in an agreement that is there."""
        self.recorder.collect()
        self.group.done.append("share what seeds begin with")


TROUBLES = ["none", "nobody watches its optimizers", "its loss is late", "its request fails"]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_with_a_leader_that_has_trouble_at_a_step_too(monkeypatch, trouble) -> None:
    leader, other = (Rank(leads, monkeypatch) for leads in (True, False))
    send = leader.sidecar.send

    def fails(step: int, *more: Any) -> None:
        if trouble == "its request fails" and step == BAD:
            raise RuntimeError("no")
        send(step, *more)

    monkeypatch.setattr(leader.sidecar, "send", fails)
    late = Late()
    for step in range(1, STEPS + 1):
        is_late = trouble == "its loss is late" and step == BAD
        leader.step(
            watched=trouble != "nobody watches its optimizers", loss=late if is_late else 1.0
        )
        if is_late:
            late.number = 1.0
        other.step()
        if step in (BAD, BAD + 2):
            leader.plant()
            other.plant()
    leader.recorder.flush()
    shortest = min(len(leader.group.done), len(other.group.done))
    assert leader.group.done[:shortest] == other.group.done[:shortest]
    assert leader.group.done.count("post") == other.group.done.count("post") == STEPS
