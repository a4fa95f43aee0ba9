"""Runs in memory: what a report would show of them, what is new, and the bounds."""

import zlib

import msgspec
import numpy as np
import pytest

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import MAX_CUSTOM, StepFrame
from esper_otel.report import page_of
from esper_otel.report.runs import runs_of
from esper_otel.report.sources import Archive
from esper_tamiyo.showing import live_curves, live_runs, stories
from esper_tamiyo.showing.live_runs import LiveRuns
from report.made import BEGAN_NS, JOURNAL, frames, recorded
from testkit.report_data import unpacked, unpacked_data


def taken(runs, made, at=BEGAN_NS):
    for frame in made:
        runs.take_frame(frame, at)
    return runs


def lines_of(runs, text=JOURNAL):
    for line in text.encode().splitlines():
        runs.take_line(line)


def data_of(runs, *names):
    known = runs.index({}, BEGAN_NS)
    ids = [line["id"] for line in known if not names or line["name"] in names]
    return unpacked_data(runs.pack(runs.named(ids), []))


def decision(step, run="run", time_ns=2):
    entry = msgspec.json.decode(
        next(line for line in JOURNAL.splitlines() if '"kind":"decision"' in line)
    )
    entry |= {"id": f"{run}/0/{step}", "run": run, "step": step, "time_unix_nano": time_ns}
    return msgspec.json.encode(entry)


CURVES = {
    "loss": lambda s: 2.0 / (1 + s),
    "gradient_norm": lambda s: 1.0 + s % 7,
    "step_latency_ms": lambda s: 10.0 if s else None,
    "nonfinite": lambda s: float(s == 20),
}


def test_curves_are_those_of_a_report(tmp_path):
    made = frames(50, seeds=["a", "b"], **CURVES)
    made += frames(50, seeds=["a"], rank=1, instance="two", **CURVES)
    made = [f for f in made if f.step != 30]
    del made[20].values["loss"]  # it was NaN there
    for rank in (0, 1):
        path = tmp_path / f"run-rank{rank}.metrics.otlp"
        recorded(path, [frame for frame in made if frame.rank == rank])
    (tmp_path / "journal-000001.jsonl").write_text(JOURNAL)
    archive = Archive()
    archive.read([tmp_path])
    expected = unpacked(page_of(runs_of(archive), archive.ledger.rules, []))
    runs = taken(LiveRuns(), made)
    lines_of(runs)
    found = data_of(runs)
    assert found["rules"] == expected["rules"]
    (run,), (other,) = found["runs"], expected["runs"]
    for field in ("name", "templates", "decisions", "aftermaths", "rules"):
        assert run[field] == other[field], field
    for mine, theirs in zip(run["ranks"], other["ranks"], strict=True):
        for field in ("rank", "count", "first", "last", "start_ms", "seconds"):
            assert mine[field] == theirs[field], field
        pairs = [(mine["curves"], theirs["curves"])]
        assert mine["seeds"].keys() == theirs["seeds"].keys()
        pairs += [(mine["seeds"][seed], theirs["seeds"][seed]) for seed in mine["seeds"]]
        for some, others in pairs:
            assert some.keys() == others.keys()
            for key, curve in some.items():
                for place in (0, 1, 2, 4, 6, 7):  # less the steps of extremes, which may tie
                    expected = pytest.approx(others[key]["total"][place], rel=1e-12)
                    assert curve["total"][place] == expected, key
                np.testing.assert_array_equal(curve["x"], others[key]["x"], key)
                np.testing.assert_array_equal(curve["y"], others[key]["y"], key)


def test_news_are_what_came_since():
    runs = taken(LiveRuns(), frames(30, **CURVES))
    first = data_of(runs)
    chosen = runs.named(first["ids"])
    assert runs.news(chosen, first["version"]) == b""
    taken(runs, frames(5, first=30, **CURVES))
    lines_of(runs)
    news = unpacked_data(runs.news(chosen, first["version"]))
    (run,) = news["runs"]
    (rank,) = run["ranks"]
    assert news["ids"] == news["told"] == first["ids"]
    assert list(rank["curves"]["gradient_norm"]["x"]) == [30, 31, 32, 33, 34]
    assert rank["curves"]["loss"]["total"][0] == 35
    assert (rank["count"], rank["last"]) == (35, 34)
    assert [numbers[1] for numbers in run["decisions"]] == [30]
    assert run["aftermaths"]["0"]["outcome"] == "improved"
    assert len(run["rules"]) == 1
    again = runs.news(chosen, news["version"])
    assert again == b""


def test_an_outcome_is_news_of_its_decision():
    runs = taken(LiveRuns(), frames(3, **CURVES))
    *before, outcome = JOURNAL.splitlines()
    lines_of(runs, "\n".join(before))
    data = data_of(runs)
    lines_of(runs, outcome)
    (run,) = unpacked_data(runs.news(runs.named(data["ids"]), data["version"]))["runs"]
    assert run["aftermaths"]["0"]["outcome"] == "improved"
    assert run["rules"] == []


def test_whoever_asks_for_what_is_forgotten_loads_all_again(monkeypatch):
    monkeypatch.setattr(live_runs, "RECENT_BYTES", 4096)
    runs = taken(LiveRuns(), frames(3, **CURVES))
    data = data_of(runs)
    for step in range(3, 100):
        taken(runs, frames(1, first=step, **CURVES))
        runs.make_curves()
    chosen = runs.named(data["ids"])
    assert runs.news(chosen, data["version"]) is None
    assert runs.news(chosen, runs.version + 1) is None  # of another process
    assert runs.news(chosen, LiveRuns().version - 10**9) is None
    assert data_of(runs)["runs"][0]["ranks"][0]["count"] == 100


def test_a_process_that_goes_on_is_one_rank_and_one_that_begins_anew_another_run():
    runs = taken(LiveRuns(), frames(10, **CURVES))
    taken(runs, frames(10, first=10, instance="two", at_s=1, **CURVES))
    (run,) = data_of(runs)["runs"]
    assert (run["name"], run["ranks"][0]["count"], run["ranks"][0]["instance"]) == (
        *("run", 20),
        "two",
    )
    later = frames(5, instance="three", at_s=60, **CURVES)
    taken(runs, later, BEGAN_NS + 1)
    runs.take_line(decision(3, time_ns=later[3].time_unix_nano))
    runs.take_line(decision(12, time_ns=BEGAN_NS))
    index = {line["name"]: line for line in runs.index({}, BEGAN_NS + 1)}
    assert list(index) == ["run (2)", "run (1)"]
    assert [index[name]["decisions"] for name in index] == [1, 1]
    second = data_of(runs, "run (2)")["runs"][0]
    assert second["decisions"][0][1] == 3
    assert second["ranks"][0]["count"] == 5
    assert len({line["id"] for line in index.values()}) == 2


def test_how_a_run_ended_and_that_it_is_stale():
    runs = taken(LiveRuns(), frames(3, **CURVES) + frames(3, rank=1, **CURVES))
    (line,) = runs.index({("run", 1): "stale"}, BEGAN_NS + 10**10)
    assert (line["ended"], line["stale"], line["heard_s"]) == ("", True, 10.0)
    data = data_of(runs)
    for rank, how in ((0, HowEnded.DONE), (1, HowEnded.EXCEPTION)):
        end = RunEnd(how, "ValueError" if rank else "")
        runs.take_frame(StepFrame("run", "one", rank, 2, BEGAN_NS, {}, ended=end), BEGAN_NS)
    (line,) = runs.index({}, BEGAN_NS)
    assert line["ended"] == "exception ValueError"
    assert runs.newest(0) == []
    (run,) = unpacked_data(runs.news(runs.named(data["ids"]), data["version"]))["runs"]
    assert [(rank["ended"], rank["count"]) for rank in run["ranks"]] == [
        ("done", 0),
        ("exception ValueError", 0),
    ]


def test_the_newest_of_each_value_of_the_scripts_own_is_there():
    made = frames(
        5,
        loss=lambda s: float(s),
        **{
            "custom.val_loss": lambda s: 0.5 if s == 1 else None,
            "custom.kl": lambda s: 0.1 * s,
        },
    )
    runs = taken(LiveRuns(), made)
    (newest,) = runs.newest(0)
    assert newest.values["loss"] == 4.0
    assert newest.values["custom.val_loss"] == 0.5
    assert newest.values["custom.kl"] == 0.4
    # A sender whose names never end takes the room of its own older ones.
    names = [f"custom.{nth}" for nth in range(3 * MAX_CUSTOM)]
    for nth, name in enumerate(names):
        taken(runs, frames(1, first=5 + nth, **{name: lambda s: 1.0}))
    (newest,) = runs.newest(0)
    assert [key for key in newest.values if is_custom(key)] == names[-MAX_CUSTOM:]


def test_many_runs_stay_within_their_number():
    runs = LiveRuns()
    for number in range(300):
        taken(runs, frames(1, run=f"run {number}", loss=float), BEGAN_NS + number)
    names = [line["name"] for line in runs.index({}, BEGAN_NS)]
    assert names == [f"run {n}" for n in range(299, 299 - live_runs.MOST_RUNS, -1)]
    # One that begins anew time and again pushes nobody out.
    for number in range(300):
        again = frames(1, run="crash", instance=str(number), loss=float)
        taken(runs, again, BEGAN_NS + 1000 + number)
    names = [line["name"] for line in runs.index({}, BEGAN_NS)]
    assert sum(name.startswith("crash") for name in names) == live_runs.MOST_BEGINNINGS
    assert "run 299" in names


def test_many_ranks_stay_within_their_number():
    runs = LiveRuns()
    made = [frames(1, rank=rank, instance=f"i{rank}", loss=float)[0] for rank in range(400)]
    taken(runs, made)
    (line,) = runs.index({}, BEGAN_NS)
    assert line["ranks"] == live_runs.MOST_RANKS
    assert runs.left_out == 400 - live_runs.MOST_RANKS


def test_curves_share_their_points_and_lose_no_extreme(monkeypatch):
    monkeypatch.setattr(live_runs, "MOST_POINTS", 4 * 512)
    runs = LiveRuns()
    for start in range(0, 20_000, 250):
        taken(
            runs,
            frames(250, first=start, loss=lambda s: 1e6 if s == 7777 else 1.0 + s % 3),
        )
        runs.make_curves()
    (run,) = data_of(runs)["runs"]
    loss = run["ranks"][0]["curves"]["loss"]
    assert len(loss["x"]) <= 1024
    assert loss["total"][:1] == [20_000]
    assert loss["y"].max() == 1e6
    assert loss["x"][loss["y"].argmax()] == 7777


def test_seeds_of_a_rank_stay_within_their_number(monkeypatch):
    monkeypatch.setattr(live_curves, "MOST_SEEDS", 3)
    runs = taken(LiveRuns(), frames(2, seeds=[f"s{n}" for n in range(9)], loss=float))
    (run,) = data_of(runs)["runs"]
    assert list(run["ranks"][0]["seeds"]) == ["s0", "s1", "s2"]


def test_a_long_story_forgets_its_older_half(monkeypatch):
    monkeypatch.setattr(stories, "STORY_BYTES", 20_000)
    runs = taken(LiveRuns(), frames(3, **CURVES))
    runs.take_line(decision(1, run="other"))
    for step in range(200):
        runs.take_line(decision(step))
    story = runs.stories.story_of("run")
    steps = [ruling.step for ruling in story.ledger.rulings.values()]
    assert steps == list(range(steps[0], 200))
    assert 10 < len(steps) < 60
    assert story.forgotten == steps[0]
    assert story.size < 20_000
    assert set(story.changed) == {f"run/0/{step}" for step in steps}
    assert runs.stories.story_of("other").forgotten == 0


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b'{"kind":7}', b'{"kind":"decision"}', b"\xff\xfe", b"[" * 100_000],
)
def test_what_is_no_line_of_a_journal_changes_nothing(line):
    runs = taken(LiveRuns(), frames(3, **CURVES))
    runs.take_line(line)
    assert data_of(runs)["runs"][0]["decisions"] == []


def test_what_is_sent_is_compressed_json_and_arrays():
    runs = taken(LiveRuns(), frames(3, run="</script>", **CURVES))
    raw = zlib.decompress(runs.pack(runs.named([runs.index({}, 0)[0]["id"]]), []))
    assert b"</script>" in raw  # as data, which the page shows as text
