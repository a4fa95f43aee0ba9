"""The journal: whole lines, bounded files, and what a kill leaves behind."""

import errno
import json
import os
import shutil
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.folders import default_socket_path
from esper_tamiyo.journaling.entries import Closed, Gap, Opened
from esper_tamiyo.journaling.journal import (
    Damage,
    Journal,
    default_folder,
    encode_entry,
    files_of,
    follow,
    read,
    rfc3339,
)
from esper_tamiyo.journaling.journal_thread import JournalThread
from sidecar.entries_made import AT, changed, decided, reported, table
from sidecar.running import until


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "journal"


def written(folder, entries, max_bytes=1_000_000, max_files=8):
    journal = Journal(folder, max_bytes, max_files)
    for entry in entries:
        journal.append([entry])
    journal.close()


def test_what_is_written_is_read(folder):
    entries = [table("loss_spike"), decided(3), changed(4), reported(3), Gap(
        time_unix_nano=AT, lost=3, because="full"
    )]  # fmt: skip
    written(folder, entries)
    assert list(read(folder)) == entries


def test_a_line_is_for_people_and_machines():
    told = json.loads(encode_entry(decided(3)))
    assert list(told)[:3] == ["at", "kind", "time_unix_nano"]
    assert told["at"].endswith("Z")
    assert told["kind"] == "decision"
    assert told["id"] == "run/0/3"
    assert told["findings"][0]["values"] == {"loss": 3.0}


@given(st.integers(-(2**63), 2**64) | st.sampled_from([10**400, -(10**400)]))
def test_every_time_has_words(time_unix_nano):
    assert rfc3339(time_unix_nano).endswith("Z")


def test_a_line_that_is_nested_without_end_is_no_entry(folder):
    written(folder, [decided(1)])
    path = files_of(folder)[0]
    with path.open("ab") as file:
        file.write(b'{"x":' + b"[" * 100_000 + b"\n" + encode_entry(decided(2)))
    first, damage, second = read(folder)
    assert (first, second) == (decided(1), decided(2))
    assert damage[:2] == (path, 2)


def test_a_full_file_is_followed_by_the_next_and_the_oldest_go(folder):
    written(folder, [table("loss_spike"), *map(decided, range(40))], 4000, max_files=3)
    files = files_of(folder)
    assert len(files) == 3
    assert files[0].name > "journal-000001.jsonl"
    assert all(path.stat().st_size < 6000 for path in files)
    steps = [entry.step for entry in read(folder) if hasattr(entry, "step")]
    assert steps == list(range(steps[0], 40)), "what is left has no hole"
    for path in files:
        first = json.loads(path.read_bytes().splitlines()[0])
        assert first["kind"] == "table", "each file explains itself"


def test_the_disk_is_asked_once_to_keep_what_was_written(folder, monkeypatch):
    kept = []
    monkeypatch.setattr(os, "fsync", kept.append)
    journal = Journal(folder, 1_000_000, 8)
    journal.append([decided(1)])
    journal.sync()
    journal.sync()
    assert len(kept) == 1
    journal.append([decided(2)])
    journal.close()
    assert len(kept) == 2


def test_the_next_sidecar_goes_on_in_the_newest_file(folder):
    written(folder, [decided(1)])
    written(folder, [decided(2)])
    assert len(files_of(folder)) == 1
    assert [entry.step for entry in read(folder)] == [1, 2]


@given(cut=st.integers(1, 200))
def test_a_line_cut_short_is_recognised_and_costs_no_other(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    written(folder, [decided(1), decided(2)])
    (path,) = files_of(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    torn = list(read(folder))
    assert torn[0] == decided(1)
    if cut == 1:  # only its newline
        assert torn[1] == decided(2)
    else:
        assert torn[1] == Damage(path, 2, "ends in the middle")
    written(folder, [decided(3)])
    after = list(read(folder))
    assert after[0] == decided(1)
    assert after[-1] == decided(3)
    assert len(after) == 3


def test_lines_that_are_not_ours_are_told_of(folder):
    written(folder, [decided(1)])
    (path,) = files_of(folder)
    with path.open("ab") as file:
        file.write(b'{"kind":"from the future"}\n\xff\xfe\n\n')
    (folder / "notes.txt").write_text("mine")
    one, *damaged = read(folder)
    assert one == decided(1)
    assert [damage.line for damage in damaged] == [2, 3]
    assert all("no entry" in damage.problem for damage in damaged)
    assert str(damaged[0]).startswith(f"{path}:2: ")


def test_two_sidecars_do_not_mix_their_lines(folder):
    first = Journal(folder, 1000, 2)
    with pytest.raises(OSError, match="another sidecar writes its journal there"):
        Journal(folder, 1000, 2)
    first.close()
    Journal(folder, 1000, 2).close()


def test_it_is_private(folder):
    written(folder, [decided(1)])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert files_of(folder)[0].stat().st_mode & 0o777 == 0o600


def test_following_goes_on_across_files_and_waits_for_whole_lines(folder):
    journal = Journal(folder, 700, 8)
    journal.append([decided(1)])
    followed = follow(folder, poll_s=0.0)
    assert next(followed) == decided(1)
    for step in range(2, 8):
        journal.append([decided(step)])
    assert [entry.step for entry in islice(followed, 6)] == list(range(2, 8))
    assert len(files_of(folder)) > 1
    journal.close()
    newest = files_of(folder)[-1]
    line = encode_entry(decided(8))
    with newest.open("ab") as file:
        file.write(line[:20])
        file.flush()
        os.fsync(file.fileno())
        file.write(line[20:])
    assert next(followed) == decided(8)


def test_following_goes_on_after_a_rotation_that_removes_the_file(folder):
    two = 2 * len(encode_entry(decided(1)))
    journal = Journal(folder, two, max_files=1)
    journal.append([decided(1)])
    followed = follow(folder, poll_s=0.0)
    assert next(followed) == decided(1)
    for step in range(2, 20, 2):  # one to the end of a file, one to the next
        journal.append([decided(step)])
        journal.append([decided(step + 1)])
        assert len(files_of(folder)) == 1
        assert list(islice(followed, 2)) == [decided(step), decided(step + 1)]
    journal.close()


def test_following_passes_over_a_file_that_is_gone_when_it_is_to_be_read(folder, monkeypatch):
    written(folder, [decided(1)])
    gone = folder / "journal-000000.jsonl"
    with_it = [[gone, *files_of(folder)]]

    def listed(folder, real=files_of):
        return with_it.pop() if with_it else real(folder)

    monkeypatch.setattr("esper_tamiyo.journaling.journal.files_of", listed)
    assert next(follow(folder, poll_s=0.0)) == decided(1)


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "esper" / "journal"
    assert default_folder(default_socket_path()) == tmp_path / "esper" / "journal"
    assert default_folder(tmp_path / "t.sock") == tmp_path / "t.journal"


class Disk:
    """Opens a journal unless told to be broken."""

    def __init__(self, folder):
        self.folder = folder
        self.broken = False

    def open(self):
        if self.broken:
            raise OSError(errno.EROFS, "Read-only file system")
        return Journal(self.folder, 1_000_000, 2)


def test_a_journal_that_cannot_be_written_is_told_of_and_tried_again(folder, monkeypatch):
    monkeypatch.setattr("esper_tamiyo.journaling.journal_thread.RETRY_S", 0.0)
    disk = Disk(folder)
    disk.broken = True
    thread = JournalThread(disk.open, folder)
    thread.start()
    thread.put([table("loss_spike"), decided(1)])
    until(lambda: thread.all_lost == 2)
    assert thread.error == f"{folder}: read-only file system"
    disk.broken = False
    thread.put([decided(2)])
    until(lambda: not thread.error)
    thread.close(5.0)
    opened, its_table, gap, entry, closed = read(folder)
    assert isinstance(opened, Opened)
    assert its_table == table("loss_spike")
    assert (gap.lost, gap.because) == (2, f"{folder}: read-only file system")
    assert entry == decided(2)
    assert isinstance(closed, Closed)
    assert thread.all_lost == 2


def test_a_disk_that_stands_still_costs_entries_and_no_time(folder, monkeypatch):
    monkeypatch.setattr("esper_tamiyo.journaling.journal_thread.MAX_QUEUE", 2)
    thread = JournalThread(
        Disk(folder).open, folder
    )  # not started: as a disk that never returns
    for step in range(5):
        thread.put([decided(step)])
    assert thread.all_lost == 3
    thread.start()
    thread.close(5.0)
    kinds = [type(entry).__name__ for entry in read(folder)]
    assert kinds == ["Opened", "Gap", "Decided", "Decided", "Closed"]


def delete(folder):
    files_of(folder)[-1].unlink()


def move_as_logrotate_does(folder):
    path = files_of(folder)[-1]
    path.rename(path.with_name(f"{path.name}.1"))


def move_and_create(folder):
    path = files_of(folder)[-1]
    path.rename(path.with_name(f"{path.name}.1"))
    path.touch()


def copy_and_truncate(folder):
    path = files_of(folder)[-1]
    path.with_name(f"{path.name}.1").write_bytes(path.read_bytes())
    os.truncate(path, 0)


def cut_in_the_middle_of_a_line(folder):
    path = files_of(folder)[-1]
    os.truncate(path, path.stat().st_size - 5)


def remove_the_folder(folder):
    shutil.rmtree(folder)


def move_the_folder(folder):
    folder.rename(folder.with_name(f"before-{files_of(folder)[-1].name}"))


@pytest.mark.parametrize(
    "tidy_up",
    [
        delete,
        move_as_logrotate_does,
        move_and_create,
        copy_and_truncate,
        cut_in_the_middle_of_a_line,
        remove_the_folder,
        move_the_folder,
    ],
)
def test_what_is_written_after_a_file_was_taken_away_is_found(
    folder, tidy_up, caplog, monkeypatch
):
    monkeypatch.setattr("esper_tamiyo.journaling.journal_thread.SYNC_S", 60.0)
    thread = JournalThread(Disk(folder).open, folder)
    thread.start()
    thread.put([table("loss_spike"), decided(1)])
    until(lambda: thread.written == 2)
    gone = files_of(folder)[-1]
    tidy_up(folder)
    thread.put([decided(2)])
    until(lambda: thread.written == 3)
    tidy_up(folder)
    thread.put([decided(3)])
    thread.close(5.0)
    assert thread.taken_away == 2
    assert (thread.all_lost, thread.error) == (0, "")
    found = [entry for entry in read(folder) if not isinstance(entry, Damage)]
    assert decided(3) in found
    assert found[found.index(decided(3)) - 1] == table("loss_spike"), "the file explains itself"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1, "once in a while, not each time"
    assert f"{gone} was " in told[0]
    assert "continues in" in told[0]


def test_a_file_that_is_taken_away_while_nothing_happens_is_noticed_as_well(
    folder, monkeypatch
):
    monkeypatch.setattr("esper_tamiyo.journaling.journal_thread.SYNC_S", 0.01)
    thread = JournalThread(Disk(folder).open, folder)
    thread.start()
    until(lambda: folder.exists() and files_of(folder))
    until(lambda: list(read(folder)))
    delete(folder)
    until(lambda: thread.taken_away == 1)
    thread.close(5.0)
    assert isinstance(list(read(folder))[-1], Closed)


def test_a_journal_whose_folder_cannot_be_made_again_is_told_of(folder, monkeypatch):
    monkeypatch.setattr("esper_tamiyo.journaling.journal_thread.RETRY_S", 0.0)
    monkeypatch.setattr("esper_tamiyo.journaling.journal_thread.SYNC_S", 60.0)
    thread = JournalThread(Disk(folder).open, folder)
    thread.start()
    thread.put([decided(1)])
    until(lambda: thread.written == 1)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    thread.put([decided(2)])
    until(lambda: thread.all_lost == 1)
    assert thread.error.startswith(f"{folder}: ")
    folder.unlink()
    thread.put([decided(3)])
    until(lambda: not thread.error)
    thread.close(5.0)
    _, gap, entry, _ = read(folder)
    assert (gap.lost, entry) == (1, decided(3))


def test_the_first_entries_wait_until_the_writer_of_a_killed_sidecar_is_gone(folder):
    killed = Journal(folder, 1_000_000, 8)
    tries = []

    def opening():
        tries.append(None)
        if len(tries) == 3:
            killed.close()
        return Disk(folder).open()

    thread = JournalThread(opening, folder)
    thread.put([decided(1)])
    thread.start()
    until(lambda: thread.written == 1)
    assert (thread.all_lost, thread.error, len(tries)) == (0, "", 3)
    thread.close(5.0)
    assert [each for each in read(folder) if each == decided(1)] == [decided(1)]


@pytest.mark.parametrize("tidy_up", [delete, move_and_create, copy_and_truncate])
def test_following_goes_on_in_the_file_that_is_begun_instead(folder, tidy_up):
    journal = Journal(folder, 1_000_000, 8)
    journal.append([decided(1)])
    followed = follow(folder, poll_s=0.0)
    assert next(followed) == decided(1)
    tidy_up(folder)
    assert journal.go_on()
    assert journal.go_on() == ""
    journal.append([decided(2)])
    assert next(followed) == decided(2)
    journal.close()


def test_another_sidecar_that_took_the_place_keeps_it(folder):
    first = Journal(folder, 1000, 2)
    shutil.rmtree(folder)
    second = Journal(folder, 1000, 2)
    with pytest.raises(OSError, match="another sidecar writes its journal there"):
        first.go_on()
    second.close()
    assert first.go_on() == "was replaced"
    first.close()
