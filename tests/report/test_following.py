"""Recordings and journals read while they are written: everything once, and nothing twice."""

import gzip

import pytest

from esper_otel.leyline.otlp_file import framed
from esper_otel.report import following
from esper_otel.report.following import GrowingArchive
from esper_otel.report.rulings import Ledger, Ruling
from report.made import JOURNAL, frames, logs, recorded, spans
from sidecar.frames_made import otlp_of


def loss(step):
    return 1.0 / (step + 1)


def steps_in(archive):
    return {source.rank: trainer.steps() for source, trainer in archive.trainers.items()}


@pytest.fixture
def recording(tmp_path):
    return recorded(tmp_path / "run-rank0.metrics.otlp", frames(10, loss=loss))


def test_what_is_added_is_read_once_it_is_whole(recording):
    archive = GrowingArchive([recording])
    assert archive.read_growth(0.0)
    assert steps_in(archive) == {0: (10, 0, 9)}
    assert not archive.read_growth(1.0)
    more = framed(otlp_of(*frames(5, first=10, loss=loss)).SerializeToString())
    for part, is_read in ((more[:2], False), (more[2:50], False), (more[50:], True)):
        with recording.open("ab") as file:
            file.write(part)
        assert archive.read_growth(2.0) is is_read
    assert steps_in(archive) == {0: (15, 0, 14)}
    (trainer,) = archive.trainers.values()
    curve = trainer.curves[None, "loss"]
    assert curve.points().values.tolist() == [loss(step) for step in range(15)]
    assert archive.problems == []


def test_files_that_come_later_are_found(tmp_path, recording):
    archive = GrowingArchive([tmp_path, tmp_path / "not-there-yet"])
    assert archive.read_growth(0.0)
    recorded(tmp_path / "run-rank1.metrics.otlp", frames(4, rank=1, loss=loss))
    spans(tmp_path / "run-rank0.traces.otlp", "run", 3)
    logs(tmp_path / "run-rank0.logs.otlp", "run", "seed", "it grew")
    assert archive.read_growth(1.0)
    assert steps_in(archive) == {0: (10, 0, 9), 1: (4, 0, 3)}
    assert [ruling.step for ruling in archive.ledger.rulings.values()] == [3]
    assert [each.text for each in archive.ledger.happenings] == ["it grew"]
    assert archive.problems == []


def test_a_journal_and_files_of_json_are_followed_by_lines(tmp_path):
    path = tmp_path / "journal-000001.jsonl"
    first, rest = JOURNAL[:700], JOURNAL[700:]
    path.write_text(first)
    archive = GrowingArchive([tmp_path])
    archive.read_growth(0.0)
    with path.open("a") as file:
        file.write(rest)
    assert archive.read_growth(1.0)
    assert not archive.read_growth(2.0)
    (ruling,) = archive.ledger.rulings.values()
    assert (ruling.step, ruling.aftermath.outcome) == (30, "improved")


def test_what_turns_bad_is_a_problem_once_and_what_came_before_stays(tmp_path, recording):
    with recording.open("ab") as file:
        file.write(b"\xff\xff\xff\xff and more")
    archive = GrowingArchive([tmp_path])
    assert archive.read_growth(0.0)
    with recording.open("ab") as file:
        file.write(b"!")
    assert not archive.read_growth(1.0)
    (problem,) = archive.problems
    assert problem.startswith(f"{recording}: byte ")
    assert steps_in(archive) == {0: (10, 0, 9)}


def test_what_is_compressed_as_a_whole_is_read_where_it_is(tmp_path, recording):
    packed = tmp_path / "older.metrics.otlp.gz"
    packed.write_bytes(gzip.compress(recording.read_bytes()))
    recording.unlink()
    archive = GrowingArchive([tmp_path])
    assert archive.read_growth(0.0)
    assert steps_in(archive) == {0: (10, 0, 9)}


def test_a_folder_that_cannot_be_looked_through_is_a_problem_once(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(following, "files_of", refused)
    archive = GrowingArchive([tmp_path])
    for second in range(3):
        archive.read_growth(100.0 * second)
    assert archive.problems == [f"{tmp_path}: Permission denied"]


def test_files_that_stand_still_are_looked_at_less_often(recording, monkeypatch):
    archive = GrowingArchive([recording])
    archive.read_growth(0.0)
    looked = []
    monkeypatch.setattr(
        following._Followed, "size", lambda file: looked.append(1) or file.offset
    )
    late = following.IDLE_S + 1
    for tenth in range(100):
        archive.read_growth(late + tenth / 10)
    assert len(looked) == 10 / following.IDLE_EVERY_S


def test_progress_is_told_of_the_first_reading(tmp_path, recording):
    other = recorded(tmp_path / "run-rank1.metrics.otlp", frames(300, rank=1, loss=loss))
    told = []
    GrowingArchive([tmp_path]).read_growth(0.0, told.append)
    assert told == sorted(told)
    assert told[-1] == recording.stat().st_size + other.stat().st_size


def ruling(step, run="run"):
    return Ruling(
        id=f"{run}/0/{step}",
        run=run,
        rank=0,
        step=step,
        time_unix_nano=step,
        action="PAUSE",
        severity="HIGH",
        reason="loss_spike",
    )


def test_a_ledger_that_goes_on_for_ever_keeps_the_newest(monkeypatch):
    monkeypatch.setattr("esper_otel.report.rulings.MOST", 6)
    ledger = Ledger()
    gone = 0
    for step in range(100):
        ledger.add(ruling(step))
        gone += ledger.forget_old(5)
    assert [each.step for each in ledger.rulings.values()] == [95, 96, 97, 98, 99]
    assert gone == 95
    assert not ledger.more
