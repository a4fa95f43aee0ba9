"""How ranks come to agree untold: what they exchange, and from which step on they do."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from esper_otel import run as runs
from esper_otel import shared_decisions
from esper_otel.leyline.decisions import NOT_AGREED, NOT_ASKED
from esper_otel.ranks import rendezvous
from esper_otel.ranks.rendezvous import APART_STEPS, RefusedError, Rendezvous
from esper_otel.settings import EsperSettings


class ProcessGroup:
    """Other ranks that say what they are told to."""

    leads = True

    def __init__(self, *said: list[tuple[int, int]]) -> None:
        self.said = list(said)
        self.heard: list[tuple[int, ...]] = []
        self.left = 0

    def extremes(self, *numbers: int) -> list[tuple[int, int]]:
        self.heard.append(numbers)
        return self.said.pop(0)

    def send(self, data: bytes) -> None:
        return None

    def leave(self) -> None:
        self.left += 1


class Unstarted:
    """A thread whose work is left to the test."""

    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass


def met(*, step: int, apart: int = 0, alike: bool = True, together: bool = True) -> list[Any]:
    """What comes of the first exchange."""
    return [(step - apart, step), (7, 7 if alike else 8), (int(together), 1)]


IN_TIME, LATE = [(0, 0)], [(0, 1)]


@pytest.fixture
def subject(monkeypatch) -> Rendezvous:
    """One that has been through two steps, and whose thread does not run."""
    monkeypatch.setattr(rendezvous, "_collectives", iter([3, 5]).__next__)
    monkeypatch.setattr(rendezvous, "Thread", Unstarted)
    made = Rendezvous("r", alike=7, timeout_s=5.0)
    assert [made.settle(step).reason for step in (1, 2)] == [NOT_AGREED] * 2
    return made


def test_all_begin_at_the_end_of_the_same_step(subject) -> None:
    group = ProcessGroup(met(step=3, apart=1), IN_TIME)
    assert subject._begin(group, 2)
    assert group.heard == [(2, 7, 1), (0,)]
    reasons = [subject.settle(step).reason for step in (3, 4, 5)]
    # At the first there is nothing to apply yet.
    assert reasons == [NOT_AGREED, NOT_AGREED, NOT_ASKED]
    assert subject.end() is not None


def test_a_rank_that_is_past_that_step_says_so(subject) -> None:
    group = ProcessGroup(met(step=2), LATE)
    for step in (3, 4):
        subject.settle(step)
    assert not subject._begin(group, 2)
    assert group.heard[1] == (1,)
    assert subject.settle(5).reason == NOT_AGREED


def test_if_one_is_late_none_begins_and_they_try_again_further_ahead(subject) -> None:
    group = ProcessGroup(met(step=2), LATE, met(step=6), IN_TIME)
    assert not subject._begin(group, 2)
    # It would have been at step 4.
    assert subject.settle(4).reason == NOT_AGREED
    assert subject._begin(group, 16)
    assert subject.settle(22).reason == NOT_ASKED


@pytest.mark.parametrize(
    ("differs", "why"),
    [
        ({"together": False}, "without waiting for another"),
        ({"alike": False}, "settings for decisions differ"),
        ({"apart": APART_STEPS + 1}, "steps apart"),
    ],
)
def test_ranks_that_should_not_agree_find_out(subject, monkeypatch, differs, why) -> None:
    group = ProcessGroup(met(step=900, **differs))
    monkeypatch.setattr(rendezvous, "join", lambda timeout_s, name: group)
    with pytest.raises(RefusedError, match=why):
        subject._meet_all()
    assert group.left == 1


@pytest.mark.parametrize(
    ("counts", "together"), [((3, 5), 1), ((3, 3), 0), ((None, None), 0), ((3, None), 0)]
)
def test_ranks_train_together_if_a_step_had_a_collective(monkeypatch, counts, together) -> None:
    monkeypatch.setattr(rendezvous, "_collectives", iter(counts).__next__)
    monkeypatch.setattr(rendezvous, "Thread", Unstarted)
    made = Rendezvous("r", alike=7, timeout_s=5.0)
    for step in (1, 2):
        made.settle(step)
    group = ProcessGroup(met(step=2), IN_TIME)
    made._begin(group, 2)
    assert group.heard[0][2] == together


@pytest.mark.parametrize(
    ("settings", "shared", "meets"),
    [
        ({}, True, 1),
        ({}, False, 0),
        ({"ranks_agree": False}, True, 0),
        ({"mode": "off"}, True, 0),
    ],
)
def test_a_run_meets_the_others_at_its_first_step(
    monkeypatch, tmp_path, settings, shared, meets
) -> None:
    made = []

    class Counted(Rendezvous):
        leads = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(shared_decisions, "is_shared", lambda: shared)
    monkeypatch.setattr(runs, "Stream", _NoStream)
    monkeypatch.setattr(rendezvous, "Rendezvous", Counted)
    monkeypatch.setattr(rendezvous, "Thread", Unstarted)
    given = {"mode": "advise", "run_id": "r", "tamiyo_socket": str(tmp_path / "s"), **settings}
    run = runs.Run(EsperSettings().changed(**given))
    try:
        for _ in range(3):
            run.step()
        assert len(made) == meets
        if meets:
            assert run.decision.reason == NOT_AGREED
    finally:
        run.close()


class _NoStream:
    """Stands where the stream stands."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def start(self) -> None:
        pass

    def configure(self, *_: object, **__: object) -> None:
        pass

    def follow(self, *_: object) -> None:
        pass

    def frame(self, *_: object) -> None:
        pass

    def timeline(self, *_: object) -> None:
        pass

    def report(self) -> None:
        return None

    def close(self, timeout_s: float | None = None) -> Any:
        return self
