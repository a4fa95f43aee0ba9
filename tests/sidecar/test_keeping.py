"""Keeping state: files that are cut, damaged, foreign, old or in the way, and what is told."""

import os
import random
import shutil
import time
from contextlib import ExitStack, contextmanager
from time import perf_counter_ns
from types import SimpleNamespace

import pytest
from msgspec import msgpack, structs

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.saved_structs import SavedPace, SavedRank
from esper_tamiyo.keeping import rank_queue, restoring, segments, state_keeper, writer
from esper_tamiyo.keeping.bodies import OURS, Header, encode_body, encode_rank
from esper_tamiyo.keeping.restoring import last_table, restore
from esper_tamiyo.keeping.segments import (
    DamagedSegmentError,
    EntryKind,
    entries,
    framed,
    locked,
    segments_of,
)
from esper_tamiyo.keeping.writer import SegmentWriter
from esper_tamiyo.language.table_file import TableSource, load, parse
from testkit.kept_state import KeptEngine, Observed

RULES = """
version: t
conservative: {clean_steps: 5}
rules:
  - {id: kept, metric: loss, above: 1, for: 3, severity: HIGH, action: PAUSE,
     conservative: true}
  - {id: other, metric: accuracy, above: NUMBER, for: 3, severity: HIGH, action: OPTIMIZER}
"""
QUIET = "  - {id: quiet, metric: step, missing_for: 3, severity: HIGH, action: CONTINUE}\n"

SECOND = 1_000_000_000


def table(number=1):
    return parse(TableSource("t", RULES.replace("NUMBER", str(number)).encode()))


def frame(step, run="run", rank=0, loss=2.0):
    values = {"step": float(step), "loss": loss, "accuracy": 2.0}
    return StepFrame(run, "one", rank, step, 1_000_000_000 + step, values)


@contextmanager
def kept(folder, of=None, **options):
    one = KeptEngine(folder, of or table(), **options)
    try:
        yield one
    finally:
        one.kill()


OTHER_CLOCKS = {"time_ns": time.time_ns, "perf_counter_ns": perf_counter_ns}


def judge(folder, steps, **options):
    """What becomes of steps between a start and a kill: reasons, and what was restored."""
    with kept(folder, **options) as one:
        return [one.judge(frame(step)).reason for step in steps], one.restored


def ranks_of(folder):
    return restore(folder, table())[1].ranks


def test_counting_goes_on_behind_a_kill(tmp_path):
    assert judge(tmp_path, [0])[0] == ["nominal"]
    assert judge(tmp_path, [1])[0] == ["nominal"]
    reasons, restored = judge(tmp_path, [2])
    assert reasons == ["kept"]
    assert (restored.ranks, restored.problem, restored.found) == (1, "", True)
    assert 0 <= restored.age_s < 60


def test_a_first_start_finds_nothing(tmp_path):
    _, restored = judge(tmp_path / "new", [])
    assert not restored.found
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert segments_of(tmp_path / "new")[0].stat().st_mode & 0o777 == 0o600


def test_under_another_table_only_what_is_the_same_goes_on(tmp_path):
    judge(tmp_path, [0, 1])
    with kept(tmp_path, table(1.5)) as one:
        decision = one.judge(frame(2))
        assert [found.rule for found in decision.findings] == ["kept"]
        assert one.restored.table == table().version != decision.table_version


def quiet_rules():
    return parse(TableSource("q", f"{RULES}{QUIET}".replace("NUMBER", "1").encode()))


def changes_behind(folder, table, away_ns, times_s, ticks_s=()):
    """Rules that changed behind a restart that took so long, by frames at, and ticks after, so
    many seconds."""
    observed = Observed()
    with kept(folder, table, observer=observed) as one:
        for state in one.engine._runs.values():
            assert 0 <= state.pace.away_ns < 60 * SECOND
            state.pace.away_ns = away_ns
        now = perf_counter_ns()
        for after_s in ticks_s:
            one.engine.tick(now + after_s * SECOND)
        for time_s in times_s:
            one.judge(structs.replace(frame(time_s, loss=0.5), time_unix_nano=time_s * SECOND))
    return [change.rule for change in observed.changes]


def test_the_time_away_is_no_silence_of_a_rank(tmp_path):
    rules = quiet_rules()
    with kept(tmp_path, rules) as one:
        for step in range(3):
            one.judge(frame(step, loss=0.5))
    assert changes_behind(tmp_path, rules, 55 * SECOND, [60]) == []
    assert changes_behind(tmp_path, rules, 0, [61], ticks_s=[0, 5]) == []
    # Silences before the kill, and behind it, are: each begins and ends.
    assert changes_behind(tmp_path, rules, 5 * SECOND, [120, 200]) == ["quiet"] * 4
    assert changes_behind(tmp_path, rules, 0, [], ticks_s=[0, 7200]) == ["quiet"]


def test_a_segment_may_be_cut_anywhere(tmp_path):
    judge(tmp_path, [0, 1])
    segment = segments_of(tmp_path)[-1]
    whole = segment.read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        segment.write_bytes(whole[:size])
        restored = restore(tmp_path, table())[1]
        assert not restored.problem
        assert restored.ranks <= 1
    segment.write_bytes(whole + bytes(500))  # room that the disk made and never filled
    assert ranks_of(tmp_path) == 1


def test_what_is_damaged_is_set_aside_and_told(tmp_path):
    judge(tmp_path, [0, 1])
    segment = segments_of(tmp_path)[-1]
    whole = bytearray(segment.read_bytes())
    for place in range(0, len(whole), 131):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        segment.write_bytes(damaged)
        engine, restored = restore(tmp_path, table())
        if restored.problem:
            assert "set aside as" in restored.problem
            assert restored.ranks == 0
            assert segments_of(tmp_path) == []
            aside = segment.with_name(segment.name + ".unusable")
            assert aside.read_bytes() == damaged
            aside.rename(segment)
        else:  # a length that reaches beyond the end is as good as an end
            assert restored.ranks <= 1
        assert engine.observe(frame(7)).reason == "nominal"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"x" * 100, "damaged"),
        (framed(EntryKind.STEPS, b"\x90"), "not state of a sidecar"),
        (framed(EntryKind.HEADER, b"\x92\xa1x\x01"), "not state of a sidecar"),
        (framed(EntryKind.HEADER, b"\xc1"), "not state of a sidecar"),
        (framed(EntryKind.HEADER, encode_body(Header(OURS, 99, "", "", table()))), "format 99"),
    ],
)
def test_what_is_foreign_is_set_aside_and_told(tmp_path, content, why):
    (tmp_path / "state-000007.log").write_bytes(content)
    (tmp_path / "notes.txt").write_text("mine")
    reasons, restored = judge(tmp_path, [0])
    assert reasons == ["nominal"]
    assert why in restored.problem
    assert (tmp_path / "state-000007.log.unusable").read_bytes() == content
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert ranks_of(tmp_path) == 1


def test_a_body_that_is_not_what_it_should_be_is_set_aside(tmp_path):
    judge(tmp_path, [0])
    with segments_of(tmp_path)[-1].open("ab") as file:
        file.write(framed(EntryKind.STEPS, b"\xc1"))
    assert "set aside as" in restore(tmp_path, table())[1].problem


def test_whatever_a_body_says_a_start_goes_on(tmp_path):
    judge(tmp_path, range(4))
    segment = segments_of(tmp_path)[-1]
    found = [(kind, bytes(body)) for kind, body in entries(segment.read_bytes(), "s")]
    chance = random.Random(3)
    for _ in range(300):
        kind, body = found[place := chance.randrange(len(found))]
        changed = bytearray(body)
        for _ in range(chance.choice([1, 1, 3, 30])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        lying = [*found[:place], (kind, bytes(changed)), *found[place + 1 :]]
        segment.write_bytes(b"".join(framed(EntryKind(kind), body) for kind, body in lying))
        engine, restored = restore(tmp_path, table())
        assert engine.observe(frame(9, run="another")).reason == "nominal"
        if restored.problem:
            segment.with_name(segment.name + ".unusable").rename(segment)


def test_a_rank_that_does_not_fit_begins_anew_alone(tmp_path):
    with kept(tmp_path) as one:
        for rank in (0, 1):
            one.judge(frame(0, rank=rank))
            one.turn()
    segment = segments_of(tmp_path)[-1]
    found = list(entries(segment.read_bytes(), "s"))
    small = parse(TableSource("t", RULES.partition("  - {id: other")[0].encode()))
    head = encode_body(Header(OURS, 1, "", "", small))
    whole = [framed(EntryKind.HEADER, head), *(framed(kind, bytes(b)) for kind, b in found[1:])]
    segment.write_bytes(b"".join(whole))
    restored = restore(tmp_path, table())[1]
    assert (restored.problem, restored.unfit) == ("", 2)


@pytest.mark.parametrize("step_ns", [-1.0, -1e308, 1e308, float("inf"), float("nan")])
def test_a_rank_whose_steps_last_no_time_that_can_be_begins_anew(tmp_path, step_ns):
    """An entry whose checksum is right may still say what no sidecar wrote."""
    with kept(tmp_path) as one:
        one.judge(frame(0))
        one.turn()
        one.judge(frame(1))
    segment = segments_of(tmp_path)[-1]
    pace = SavedRank.__struct_fields__.index("pace")
    lying = []
    for kind, body in entries(segment.read_bytes(), "s"):
        if kind == EntryKind.RANK:
            said = msgpack.decode(body)
            said[3][pace][SavedPace.__struct_fields__.index("step_ns")] = step_ns
            body = msgpack.encode(said)
        lying.append(framed(EntryKind(kind), bytes(body)))
    segment.write_bytes(b"".join(lying))
    engine, restored = restore(tmp_path, table())
    assert (restored.problem, restored.unfit) == ("", 1)
    assert engine.observe(frame(2)).reason == "nominal"


def test_what_is_too_old_is_left_out(tmp_path, monkeypatch):
    judge(tmp_path, [0, 1])
    monkeypatch.setattr(restoring, "MAX_AGE_S", -1.0)
    reasons, restored = judge(tmp_path, [2])
    assert reasons == ["nominal"]
    assert (restored.ranks, restored.too_old) == (0, 1)


def test_files_are_bounded_however_long_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(state_keeper, "SEGMENT_BYTES", 20_000)
    with kept(tmp_path) as one:
        for step in range(2000):
            one.judge(frame(step, run=f"run {step // 500}", loss=0.5))
            assert len(segments_of(tmp_path)) <= 3
    assert segments_of(tmp_path)[0].name != "state-000001.log"
    assert sum(path.stat().st_size for path in segments_of(tmp_path)) < 200_000
    assert ranks_of(tmp_path) == 4


def test_ranks_beyond_the_room_are_left_out_the_longest_silent_first(tmp_path, monkeypatch):
    monkeypatch.setattr(state_keeper, "SEGMENT_BYTES", 30_000)
    monkeypatch.setattr(state_keeper, "MAX_RANKS_BYTES", 3_000)
    left_out = []
    with kept(tmp_path) as one:
        for step in range(1000):
            one.judge(frame(step, run=f"run {step // 25}", loss=0.5))
            left_out.append(one.status()["left_out"])
    assert max(left_out) > 20
    engine, restored = restore(tmp_path, table())
    assert 1 <= restored.ranks < 40
    assert engine.latest("run 39") is not None


def test_a_folder_that_another_sidecar_uses_is_left_alone(tmp_path):
    fd = locked(tmp_path)
    try:
        with pytest.raises(OSError, match="another sidecar"):
            locked(tmp_path)
    finally:
        os.close(fd)
    os.close(locked(tmp_path))


def test_where_no_folder_can_be_decisions_go_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    keeper = state_keeper.StateKeeper(tmp_path / "file" / "x", "t", Observed())
    engine = keeper.open(table())
    assert engine.observe(frame(0)).reason == "nominal"
    keeper.keep()
    assert (keeper.due_in_s(), keeper.status()["waiting"]) == (None, 0)
    assert "not a directory" in keeper.status()["error"]
    assert caplog.text.count("state is not kept") == 1
    keeper.close()


def test_a_full_disk_is_told_and_left_again_with_the_next_segment(tmp_path, monkeypatch):
    out = SegmentWriter(tmp_path)
    head = framed(EntryKind.HEADER, b"head")
    full = {"is": True}
    write = os.write

    def write_or_fail(fd, data):
        if full["is"]:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(writer.os, "write", write_or_fail)
    out.feed(head)
    assert "no space left" in out.error
    out.feed(framed(EntryKind.STEPS, b"lost"))
    full["is"] = False
    out.feed(framed(EntryKind.STEPS, b"lost too"))
    out.feed(head + framed(EntryKind.STEPS, b"there"))
    out.sync()
    assert out.error == ""
    assert [path.name for path in segments_of(tmp_path)] == ["state-000001.log"]
    assert b"there" in segments_of(tmp_path)[0].read_bytes()


def test_files_that_are_gone_are_told_and_come_again_with_the_next_segment(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    out = SegmentWriter(folder)
    head = framed(EntryKind.HEADER, b"head")
    out.feed(head)
    out.look_after()
    assert out.error == ""
    shutil.rmtree(folder)
    out.look_after()
    assert "no such file" in out.error
    out.feed(head)
    out.look_after()
    assert out.error == ""
    assert segments_of(folder)[0].read_bytes() == head


def test_entries_are_written_whole_however_they_come(tmp_path):
    out = SegmentWriter(tmp_path)
    data = b"".join(framed(EntryKind.STEPS, bytes([n]) * n) for n in range(40))
    data = framed(EntryKind.HEADER, b"head") + data
    for place in range(0, len(data), 7):
        out.feed(data[place : place + 7])
        on_disk = segments_of(tmp_path)[0].read_bytes() if segments_of(tmp_path) else b""
        assert data.startswith(on_disk)
        assert sum(9 + len(body) for _, body in entries(on_disk, "s")) == len(on_disk)
    assert on_disk == data


def seeded(step, run, seeds=56):
    return structs.replace(
        frame(step, run=run), seeds={f"s{number}": {"alpha": 0.5} for number in range(seeds)}
    )


@contextmanager
def clocked(folder, monkeypatch, *runs):
    """Ranks with 56 seeds that are due, a function that lets time go by and takes a turn, and
    the entries put down by it."""
    now, put = 1000.0, []
    clock = SimpleNamespace(monotonic=lambda: now, **OTHER_CLOCKS)
    monkeypatch.setattr(state_keeper, "time", clock)
    monkeypatch.setattr(rank_queue, "time", clock)
    with kept(folder, load("default"), round_s=60.0) as one:

        def turn(later_s):
            nonlocal now
            now += later_s
            before = len(put)
            one.turn()
            return put[before:]

        for step in range(4):  # sixteen new seeds are taken up in each
            for run in runs:
                one.engine.observe(seeded(step, run), None, perf_counter_ns())
        one.turn()  # the round begins
        monkeypatch.setattr(
            rank_queue,
            "encode_rank",
            lambda key, *rest: put.append(key[0]) or encode_rank(key, *rest),
        )
        yield one, turn


PART_S = rank_queue.PART_PAUSE_S


def test_a_rank_with_many_seeds_is_saved_in_parts_with_pauses_between(tmp_path, monkeypatch):
    """All at once takes milliseconds, in which nobody is answered."""
    with clocked(tmp_path, monkeypatch, "a", "b") as (_, turn):
        parts = [turn(PART_S) for _ in range(8)]
        assert parts == [[], [], [], ["a"], [], [], [], ["b"]]
        assert turn(PART_S / 2) == []


def test_parts_of_one_rank_are_of_one_step(tmp_path, monkeypatch):
    """A rank that goes on between two of its parts is saved at once, and none for long then."""
    with clocked(tmp_path, monkeypatch, "a", "b") as (one, turn):
        assert turn(PART_S) == []
        expected = one.engine.observe(seeded(4, "a"), None, perf_counter_ns())
        assert turn(PART_S) == ["a"]
        pause_s = rank_queue.pause_after(56)
        assert pause_s > 50 * PART_S
        assert turn(pause_s * 0.9) == []
        assert [turn(pause_s) for _ in range(4)] == [[], [], [], ["b"]]
    with kept(tmp_path, load("default")) as again:
        assert again.engine.latest("a") == expected
        assert len(again.engine._runs["a", 0].seeds) == 56


def test_a_rank_that_is_forgotten_between_two_parts_is_not_saved(tmp_path, monkeypatch):
    with clocked(tmp_path, monkeypatch, "a", "b") as (one, turn):
        assert turn(PART_S) == []
        one.engine.roster._forget(("a", 0))
        assert [turn(PART_S) for _ in range(5)] == [[], [], [], [], ["b"]]


def test_a_writer_that_does_not_keep_up_costs_one_new_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(state_keeper, "MAX_BACKLOG", 50_000)
    with kept(tmp_path) as one:
        one.judge(frame(0))
        for step in range(1, 3000):
            one.engine.observe(frame(step))
            one.turn(write_out=False)
        assert one.status()["lost"] == 1
        one.turn()
        one.judge(frame(3000))
        one.turn()
    engine, restored = restore(tmp_path, table())
    assert restored.ranks == 1
    assert engine.latest("run").step == 3000


def test_the_last_table_is_known_by_its_name(tmp_path):
    judge(tmp_path, [0])
    assert last_table(tmp_path, "a table") == table()
    assert last_table(tmp_path, "another") is None
    assert last_table(tmp_path / "nowhere", "a table") is None


def test_the_last_table_is_read_when_the_writer_has_ended(tmp_path, monkeypatch):
    """A sidecar that was killed, whose writer still writes when the next one begins."""
    judge(tmp_path / "written", [0])
    (written,) = segments_of(tmp_path / "written")
    state = tmp_path / "state"
    lock = locked(state)

    def ends(_):
        written.rename(state / written.name)
        os.close(lock)

    monkeypatch.setattr(segments.time, "sleep", ends)
    assert last_table(state, "a table") == table()


def test_what_is_nested_without_end_is_set_aside_like_any_other(tmp_path, caplog):
    head = encode_body(Header(OURS, 1, "", "a table", table()))
    whole = encode_body(table())
    assert head.endswith(whole)
    nested = b"\x81\xa1x" + b"\x91" * 100_000
    (tmp_path / "state-000001.log").write_bytes(
        framed(EntryKind.HEADER, head.removesuffix(whole) + nested)
    )
    assert last_table(tmp_path, "a table") is None
    judge(tmp_path / "sound", [0])
    segment = segments_of(tmp_path / "sound")[-1]
    with segment.open("ab") as file:
        file.write(framed(EntryKind.STEPS, b"\x92\x01" + b"\x91" * 100_000))
    assert "set aside as" in restore(tmp_path / "sound", table())[1].problem
    assert "Traceback" not in caplog.text


def test_a_checksum_is_of_the_kind_as_well(tmp_path):
    entry = bytearray(framed(EntryKind.STEPS, b"body"))
    entry[8] = EntryKind.RANK
    with pytest.raises(DamagedSegmentError), ExitStack():
        list(entries(bytes(entry), "s"))
