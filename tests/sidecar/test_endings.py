"""A rank that says that its run has ended: what is no longer asked of it, and what is kept."""

import msgspec
import pytest

from esper_otel.leyline.decisions import Action
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import MAX_STEP, MAX_TIME_UNIX_NANO, StepFrame
from esper_otel.leyline.metrics import EXCEPTION_TYPE, HOW_ENDED, RUN_ENDED
from esper_otel.leyline.otlp_file import framed
from esper_otel.leyline.wire import SilenceRequest
from esper_otel.stream.encoding import encode_end
from esper_tamiyo.journaling.decision_log import DecisionLog
from esper_tamiyo.journaling.entries import Decided, Ended
from esper_tamiyo.journaling.field_reports import DueReport
from esper_tamiyo.journaling.journal import encode_entry
from esper_tamiyo.journaling.lines import format_entry
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import TableSource, parse
from esper_tamiyo.receiving.otlp_frames import ExportMetricsServiceRequest, frames_of
from esper_tamiyo.receiving.pipe import frame as unpacked
from esper_tamiyo.receiving.pipe import pack
from esper_tamiyo.replaying.recordings import RecordedRuns
from esper_tamiyo.replaying.replay import replay
from sidecar.frames_made import otlp_of, put

SECOND = 1_000_000_000
START = 1_800_000_000 * SECOND
DONE = RunEnd(HowEnded.DONE)
FAILED = RunEnd(HowEnded.EXCEPTION, "ValueError")
INTERRUPTED = RunEnd(HowEnded.INTERRUPTED, "KeyboardInterrupt")
TABLE = parse(
    TableSource(
        "t",
        b"""
version: t
conservative: {clean_steps: 500}
rules:
  - {id: high, metric: loss, above: 5, severity: HIGH, action: PAUSE, conservative: true}
  - {id: quiet, metric: step, missing_for: 50, severity: HIGH, action: CONTINUE}
""",
    )
)


def at(step):
    return START + step * SECOND


def frame(step, rank=0, run="r", instance="one", loss=1.0):
    values = {"step": float(step), "loss": loss}
    return StepFrame(run, instance, rank, step, at(step), values)


def end(step, ended=DONE, rank=0, run="r", instance="one"):
    return StepFrame(run, instance, rank, step, at(step) + 1, {}, ended=ended)


def engine_after(steps, ranks=1, **more):
    engine = Engine(TABLE, **more)
    for step in range(1, steps + 1):
        for rank in range(ranks):
            engine.observe(frame(step, rank))
    return engine


def told(engine, seconds):
    """The overview so many seconds after the beginning, and the runs in it by rank."""
    engine.tick(at(seconds))
    report = engine.overview(at(seconds))
    return report, {run["rank"]: run for run in report["runs"]}


@pytest.mark.parametrize(
    ("ended", "state", "words"),
    [
        (DONE, "finished", "done"),
        (INTERRUPTED, "finished", "interrupted KeyboardInterrupt"),
        (FAILED, "failed", "exception ValueError"),
    ],
)
def test_a_rank_that_has_ended_is_not_missed(ended, state, words):
    engine = engine_after(20)
    engine.observe(end(20, ended))
    report, ranks = told(engine, 10_000)
    assert report["states"] == {state: 1}
    assert (ranks[0]["state"], ranks[0]["ended"]) == (state, words)
    assert engine.latest("r").reason == "nominal"


def test_one_that_says_nothing_is():
    engine = engine_after(20)
    report, ranks = told(engine, 10_000)
    assert report["states"] == {"stale": 1}
    assert "ended" not in ranks[0]
    assert engine.latest("r").reason == "quiet"


def test_an_end_after_a_silence_is_the_end_of_that_silence():
    engine = engine_after(20)
    assert told(engine, 1_000)[0]["rules"] == [{"rule": "quiet", "state": "firing", "count": 1}]
    engine.observe(end(20))
    report, _ = told(engine, 1_001)
    assert (report["states"], report["rules"]) == ({"finished": 1}, [])


def test_one_rank_ends_and_the_others_go_on():
    engine = engine_after(20, ranks=3)
    engine.observe(end(20, rank=1))
    for step in range(21, 400):
        for rank in (0, 2):
            assert engine.observe(frame(step, rank)).reason == "nominal"
            engine.tick(at(step))
    report, ranks = told(engine, 400)
    assert report["states"] == {"healthy": 2, "finished": 1}
    assert [ranks[rank]["state"] for rank in range(3)] == ["healthy", "finished", "healthy"]
    assert report["rules"] == []


def test_rules_and_conservative_mode_of_a_rank_that_ended_count_no_more():
    engine = engine_after(20)
    assert engine.observe(frame(21, loss=9.0)).conservative
    assert told(engine, 22)[0]["conservative"] == 1
    engine.observe(end(21))
    report, ranks = told(engine, 22)
    assert (report["conservative"], report["rules"]) == (0, [])
    assert (ranks[0]["conservative"], ranks[0]["rules"]) == (False, [])


def test_a_later_step_takes_the_end_back_and_goes_on_where_it_was():
    engine = engine_after(20)
    assert engine.observe(frame(21, loss=9.0)).conservative
    engine.observe(end(21))
    # An hour of evaluation is no silence: nobody said that it went on.
    later = msgspec.structs.replace(frame(22), time_unix_nano=at(3_600))
    decision = engine.observe(later)
    assert (decision.reason, decision.conservative) == ("nominal", True)
    engine.tick(at(3_601))
    assert engine.overview(at(3_601))["states"] == {"healthy": 1}
    engine.tick(at(300_000))
    assert engine.latest("r").reason == "quiet"


def test_steps_up_to_the_last_that_come_late_leave_the_end_as_it_is():
    engine = engine_after(20)
    engine.observe(end(23))
    for step in (21, 22, 23):
        engine.observe(frame(step))
        assert told(engine, 5_000)[0]["states"] == {"finished": 1}
    engine.observe(frame(24))
    assert told(engine, 25)[0]["states"] == {"healthy": 1}


def test_a_last_step_that_is_far_off_holds_no_end_against_what_follows_it():
    engine = engine_after(20)
    far = end(20, FAILED)
    engine.observe(msgspec.structs.replace(far, step=2**53 - 1))
    assert told(engine, 21)[0]["states"] == {"failed": 1}
    engine.observe(frame(21))
    assert told(engine, 22)[0]["states"] == {"healthy": 1}


@pytest.mark.parametrize("time_unix_nano", [0, MAX_TIME_UNIX_NANO])
@pytest.mark.parametrize("step", [20, MAX_STEP])
def test_whatever_numbers_an_end_has_the_journal_can_hold_it(step, time_unix_nano):
    log = DecisionLog()
    engine = engine_after(20, observer=log)
    odd = msgspec.structs.replace(end(20), step=step, time_unix_nano=time_unix_nano)
    engine.observe(odd)
    (ended,) = (each for each in log.make_entries(100, 0.0) if isinstance(each, Ended))
    assert str(step) in format_entry(ended)
    assert str(time_unix_nano) in encode_entry(ended).decode()
    assert told(engine, 21)[0]["frames"]["bad"] == 0


@pytest.mark.parametrize(
    "odd", [{"step": MAX_STEP + 1}, {"time_unix_nano": MAX_TIME_UNIX_NANO + 1}]
)
def test_an_end_beyond_a_limit_is_refused_and_counted(odd):
    engine = engine_after(20)
    engine.observe(msgspec.structs.replace(end(20), **odd))
    assert told(engine, 21)[0]["states"] == {"healthy": 1}
    assert told(engine, 21)[0]["frames"]["bad"] == 1


def test_ranks_that_go_on_are_not_compared_with_one_that_has_ended():
    table = parse(
        TableSource(
            "t",
            b"""
version: t
rules:
  - {id: slow, metric: loss, above_peers: 2, severity: HIGH, action: PAUSE}
  - {id: fast, metric: loss, below_peers: 0.5, severity: HIGH, action: PAUSE}
""",
        )
    )
    engine = Engine(table)
    decided = set()
    for step in range(1, 100):
        for rank in range(3):
            if rank == 0 and step == 20:
                engine.observe(end(19, rank=0))
            if rank or step < 20:
                # Without the first the others are alike, and no longer what they were.
                loss = 1.0 if step < 20 else 9.0
                decided.add(engine.observe(frame(step, rank, loss=loss)).reason)
    assert decided == {"nominal"}


@pytest.mark.parametrize(
    "foreign", [end(20, instance="another"), end(20, instance=""), end(20, rank=1)]
)
def test_only_the_process_itself_ends_its_rank(foreign):
    engine = engine_after(20)
    engine.observe(foreign)
    report, _ = told(engine, 21)
    assert report["states"] == {"healthy": 1}
    assert report["frames"]["bad"] == 0


def test_an_end_that_comes_behind_later_steps_is_old_news():
    engine = engine_after(30)
    engine.observe(end(20))
    assert told(engine, 31)[0]["states"] == {"healthy": 1}


def test_another_process_is_another_attempt():
    engine = engine_after(20)
    engine.observe(end(20, FAILED))
    engine.observe(frame(1, instance="two"))
    assert told(engine, 2)[0]["states"] == {"healthy": 1}
    engine.observe(end(20, FAILED))  # delivered late, of the attempt before
    assert told(engine, 2)[0]["states"] == {"healthy": 1}


def test_those_that_ended_are_forgotten_first_in_the_order_of_their_ends():
    engine = Engine(TABLE)
    engine.roster.capacity = engine.roster.capacity._replace(ranks=4)
    for run in "abcd":
        engine.observe(frame(1, run=run))
    for run in "cba":
        engine.observe(end(1, run=run))
    engine.observe(frame(2, run="c"))  # it goes on after all
    for run, left in (("e", "acde"), ("f", "cdef"), ("g", "cefg")):
        engine.observe(frame(1, run=run))
        assert {key[0] for key in engine._runs} == {*left}


@pytest.mark.parametrize(("last", "kept"), [(DONE, []), (INTERRUPTED, []), (FAILED, ["high"])])
def test_silences_end_with_the_last_rank_unless_it_failed(last, kept):
    engine = engine_after(20, ranks=2)
    engine.silence(SilenceRequest("r", "high"))
    engine.observe(end(20, rank=0))
    assert [one["rule"] for one in told(engine, 21)[0]["silences"]] == ["high"]
    engine.observe(end(20, last, rank=1))
    assert [one["rule"] for one in told(engine, 21)[0]["silences"]] == kept
    again = engine.observe(frame(1, instance="two", loss=9.0))
    assert again.action is (Action.CONTINUE if kept else Action.PAUSE)


def test_the_journal_has_the_end_once_with_what_was_seen_of_the_run():
    log = DecisionLog()
    engine = engine_after(19, observer=log)
    engine.observe(frame(20, loss=9.0))
    for _ in range(2):  # by the socket, and in the stream
        engine.observe(end(20, FAILED))
    entries = log.make_entries(1_000, 0.0)
    (ended,) = (entry for entry in entries if isinstance(entry, Ended))
    assert (ended.run, ended.rank, ended.instance, ended.step) == ("r", 0, "one", 20)
    assert (ended.how, ended.exception) == ("exception", "ValueError")
    assert (ended.steps, ended.decisions) == (20, 1)
    assert format_entry(ended).endswith(
        "r/0/20  run ended: exception ValueError; 20 steps seen, 1 decisions"
    )
    assert log.ends == {"done": 0, "exception": 1, "interrupted": 0}
    # Nobody will see what follows the decision.
    assert isinstance(entries[-1], DueReport)
    assert entries[-1].ended == "the run ended"
    assert any(isinstance(entry, Decided) for entry in entries)


def test_an_end_through_otlp_and_the_pipe_is_the_one_that_was_said():
    said = end(20, FAILED)
    resource = otlp_of(frame(1)).resource_metrics[0].resource.SerializeToString()
    request = ExportMetricsServiceRequest.FromString(encode_end(said, resource))
    harvest = frames_of(request, lambda whose, time: True)  # never too old
    assert harvest.frames == [said]
    assert (harvest.used, harvest.foreign, harvest.unusable, harvest.old) == (1, 0, 0, 0)
    assert unpacked(pack(said)[5:]) == said


def test_an_end_comes_behind_the_steps_of_its_request():
    request = otlp_of(frame(1), frame(2))
    add_end(request, 2, "done")
    assert frames_of(request).frames == [frame(1), frame(2), end(2)]


@pytest.mark.parametrize(
    ("step", "how"), [(2.5, "done"), (-1.0, "done"), (float("nan"), "done"), (2.0, "melted")]
)
def test_an_end_that_makes_no_sense_is_told_to_the_producer(step, how):
    request = otlp_of(frame(1))
    add_end(request, step, how)
    harvest = frames_of(request)
    assert (harvest.frames, harvest.unusable) == ([frame(1)], 1)


def add_end(request, step, how, exception=""):
    scope = request.resource_metrics[0].scope_metrics.add()
    metric = scope.metrics.add(name=RUN_ENDED.instrument)
    point = metric.gauge.data_points.add(time_unix_nano=at(2) + 1, as_double=step)
    put(point.attributes, HOW_ENDED, how)
    put(point.attributes, EXCEPTION_TYPE, exception)


def recorded(tmp_path, *requests):
    path = tmp_path / "run.metrics.otlp"
    path.write_bytes(b"".join(framed(one.SerializeToString()) for one in requests))
    return RecordedRuns(path)


def test_a_replay_finds_no_silence_of_a_rank_that_said_it_had_ended(tmp_path):
    steps = [otlp_of(frame(step), frame(step + 1)) for step in (1, 3)]
    others = [otlp_of(frame(step, rank=1)) for step in range(1, 200)]
    ends = otlp_of(frame(5))
    add_end(ends, 5.0, "done")
    ends.resource_metrics[0].scope_metrics[-1].metrics[0].gauge.data_points[
        0
    ].time_unix_nano = at(5) + 1

    def reasons(*requests):
        recording = recorded(tmp_path, *requests)
        found = [judged.decision.reason for judged in replay(recording.steps(), TABLE)]
        assert recording.problems == []
        assert recording.points.unusable == 0
        return {*found}

    assert reasons(*steps, otlp_of(frame(5)), *others) == {"nominal", "quiet"}
    assert reasons(*steps, ends, *others) == {"nominal"}


def test_an_end_that_comes_before_the_first_step_is_kept_for_it():
    engine = Engine(TABLE)
    engine.observe(end(3, FAILED))
    engine.observe(end(3, instance="foreign"))
    for step in range(1, 4):
        engine.observe(frame(step))
    report, ranks = told(engine, 10_000)
    assert (report["states"], ranks[0]["ended"]) == ({"failed": 1}, "exception ValueError")
    engine.observe(frame(1, instance="two"))  # another attempt, whose end was not said
    assert told(engine, 2)[0]["states"] == {"healthy": 1}


def test_ends_of_processes_that_are_never_heard_of_are_not_kept_for_ever():
    engine = Engine(TABLE)
    for run in range(1000):
        engine.observe(end(3, run=f"run-{run}"))
    engine.observe(frame(3, run="run-0"))
    engine.observe(frame(3, run="run-999"))
    assert told(engine, 4)[0]["states"] == {"healthy": 1, "finished": 1}
