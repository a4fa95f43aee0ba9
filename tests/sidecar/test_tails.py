"""Files that are appended to, read as they grow: segments of state, and the journal."""

from contextlib import ExitStack, closing

import pytest

from esper_tamiyo.keeping import segments
from esper_tamiyo.keeping.bodies import StepsBody, encode_body
from esper_tamiyo.keeping.segments import EntryKind, framed, segment_path
from esper_tamiyo.showing import tails
from esper_tamiyo.showing.tails import JournalTail, StepsTail
from sidecar.frames_made import frame


def of_steps(*steps):
    frames = [frame(step, loss=1.0) for step in steps]
    return framed(EntryKind.STEPS, encode_body(StepsBody(7, frames)))


def append(path, data):
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def steps_in(tail):
    found = []
    more = True
    while more:
        more, bodies = tail.read()
        found += [each.step for body in bodies for each in body.frames]
    return found


def lines_in(tail):
    found = []
    more = True
    while more:
        more, lines = tail.read()
        found += lines
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def following(folder):
    """Follows the folder, by a class of tail, until the test ends."""
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(closing(kind(folder)))


def test_what_is_not_there_yet(folder, following):
    tail = following(StepsTail)
    assert steps_in(tail) == []
    append(segment_path(folder, 1), of_steps(1, 2) + framed(EntryKind.ALIVE, b"7"))
    assert steps_in(tail) == [1, 2]
    assert tail.error == ""


def test_entries_that_come_in_pieces(folder, following, monkeypatch):
    monkeypatch.setattr(tails, "PIECE", 50)
    tail = following(StepsTail)
    path = segment_path(folder, 1)
    data = of_steps(1) + framed(EntryKind.RANK, b"x" * 500) + of_steps(2, 3)
    for place in range(0, len(data), 33):
        append(path, data[place : place + 33])
        if place > len(data) // 2:
            break
    found = steps_in(tail)
    append(path, data[place + 33 :])
    assert found + steps_in(tail) == [1, 2, 3]


def test_the_newest_segments_and_those_that_follow(folder, following):
    for number in range(1, 5):
        append(segment_path(folder, number), of_steps(number))
    tail = following(StepsTail)
    assert steps_in(tail) == [3, 4]
    append(segment_path(folder, 4), of_steps(40))
    append(segment_path(folder, 5), of_steps(50))
    segments.remove_older(folder, 1)  # what is open is read to its end all the same
    assert steps_in(tail) == [40, 50]


def test_a_damaged_segment_is_left_at_the_damage(folder, following):
    path = segment_path(folder, 1)
    damaged = bytearray(of_steps(2))
    damaged[-1] ^= 1
    append(path, of_steps(1) + damaged + of_steps(3))
    tail = following(StepsTail)
    assert steps_in(tail) == [1]
    append(path, of_steps(4))
    append(segment_path(folder, 2), of_steps(5))
    assert steps_in(tail) == [5]


@pytest.mark.parametrize(
    "entry",
    [
        framed(EntryKind.HEADER, b"no header"),
        framed(EntryKind.STEPS, b"\x93 no steps"),
        framed(EntryKind.STEPS, b"\x91" * 100_000),
        b"\xff" * 100,
    ],
    ids=["header", "steps", "nested", "no entry"],
)
def test_what_is_no_state_of_ours(folder, following, entry):
    append(segment_path(folder, 1), entry + of_steps(1))
    tail = following(StepsTail)
    assert steps_in(tail) == []
    append(segment_path(folder, 2), of_steps(2))
    assert steps_in(tail) == [2]


def test_a_folder_that_cannot_be_read_is_said_and_looked_at_again(folder, following):
    folder.write_text("a file")
    tail = following(StepsTail)
    assert steps_in(tail) == []
    assert tail.error == f"{folder}: not a directory"
    folder.unlink()
    append(segment_path(folder, 1), of_steps(1))
    assert steps_in(tail) == [1]
    assert tail.error == ""


def test_lines_of_a_journal(folder, following):
    tail = following(JournalTail)
    path = folder / "journal-000001.jsonl"
    append(path, b'{"a":1}\n{"b"')
    assert lines_in(tail) == [b'{"a":1}']
    append(path, b":2}\n\n")
    append(folder / "journal-000002.jsonl", b'{"c":3}\n')
    assert lines_in(tail) == [b'{"b":2}', b'{"c":3}']


def test_a_journal_that_is_cut_short_is_read_from_its_beginning(folder, following):
    tail = following(JournalTail)
    path = folder / "journal-000001.jsonl"
    append(path, b'{"a":1}\n{"b":2}\n')
    assert len(lines_in(tail)) == 2
    path.write_bytes(b'{"c":3}\n')
    assert lines_in(tail) == [b'{"c":3}']


def test_a_line_without_an_end_takes_no_memory(folder, following, monkeypatch):
    monkeypatch.setattr(tails, "PIECE", 1000)
    tail = following(JournalTail)
    append(folder / "journal-000001.jsonl", b"x" * 10_000 + b'\n{"a":1}\n')
    found = lines_in(tail)
    assert found[-1] == b'{"a":1}'
    assert all(len(line) <= 2000 for line in found)
