"""Two tables over one recording: where they differ, said so that a person can follow."""

import json

import pytest

from esper_tamiyo.language.table_file import TableSource, load, parse
from esper_tamiyo.replaying.recordings import RecordedRuns
from esper_tamiyo.replaying.replay import Comparison
from sidecar.frames_made import frame, otlp_of
from sidecar.recorded_runs import FORMATS, proposed
from sidecar.running import tamiyo

TABLE = """\
version: 1
rules:
  - {{id: high, metric: loss, above: {bound}, severity: HIGH, action: {action}{more}}}
"""


def table(bound, action="PAUSE", more=""):
    text = TABLE.format(bound=bound, action=action, more=more)
    return parse(TableSource("table", text.encode()))


def frames(*losses, **whose):
    return [(frame(step, loss=loss, **whose), None) for step, loss in enumerate(losses, 1)]


def differences(steps, a, b):
    """(rank, first, last, A's action, B's) of every difference."""
    comparison = Comparison(a, b)
    return [
        (each.rank, each.first_step, each.last_step, str(each.a.action), str(each.b.action))
        for each in comparison.differences(steps)
    ]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((0, 0, 0), []),
        ((9, 9, 9), []),
        ((0, 5, 5, 0), [(0, 2, 3, "PAUSE", "CONTINUE")]),
        ((5, 9, 5), [(0, 1, 1, "PAUSE", "CONTINUE"), (0, 3, 3, "PAUSE", "CONTINUE")]),
        ((0, 0, 5), [(0, 3, 3, "PAUSE", "CONTINUE")]),
    ],
)
def test_steps_that_differ_alike_are_one_difference(losses, expected):
    assert differences(frames(*losses), table(4), table(8)) == expected


def test_ranks_have_differences_of_their_own():
    steps = [
        pair
        for pairs in zip(frames(0, 5, 5, 5), frames(0, 0, 5, 0, rank=1), strict=True)
        for pair in pairs
    ]
    assert sorted(differences(steps, table(4), table(8))) == [
        (0, 2, 4, "PAUSE", "CONTINUE"),
        (1, 3, 3, "PAUSE", "CONTINUE"),
    ]


def test_another_way_to_differ_begins_another_difference():
    more = ", parameters: {lr_scale: 0.5}"
    harder, softer = table(4, "OPTIMIZER", more), table(8, "OPTIMIZER")
    assert differences(frames(5, 9), harder, softer) == [
        (0, 1, 1, "OPTIMIZER", "CONTINUE"),
        (0, 2, 2, "OPTIMIZER", "OPTIMIZER"),
    ]


def test_the_mode_a_run_is_in_is_part_of_a_decision():
    strict = table(4, more=", conservative: true")
    differences = list(Comparison(strict, table(4)).differences(frames(0, 5, 0)))
    assert [(each.first_step, each.last_step) for each in differences] == [(2, 2), (3, 3)]
    assert [(each.a.conservative, each.b.conservative) for each in differences] == [
        (True, False),
        (True, False),
    ]


def test_what_a_table_calls_itself_is_no_difference():
    one = table(4)
    other = parse(
        TableSource(
            "table",
            TABLE.replace("1", "2", 1).format(bound=4, action="PAUSE", more="").encode(),
        )
    )
    assert one.version != other.version
    assert differences(frames(0, 5, 9), one, other) == []


# The command.


@pytest.fixture
def files(tmp_path):
    """A recording and two tables that differ at steps 2 and 3 of it."""
    steps = [one for one, _ in frames(0, 5, 5, 9, 0)]
    recording = tmp_path / "run-rank0.metrics.otlp"
    recording.write_bytes(FORMATS["proto"]([otlp_of(*steps)]))
    paths = []
    for name, bound in (("a.yaml", 4), ("longer.yaml", 8)):
        paths.append(tmp_path / name)
        paths[-1].write_text(TABLE.format(bound=bound, action="PAUSE", more=""))
    return recording, *paths


def test_a_difference_is_shown_and_is_status_1(files):
    recording, a, b = files
    done = tamiyo("compare", recording, a, b)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "run/0  steps 2 to 3",
        f"  {a}       PAUSE HIGH high",
        f"  {b}  CONTINUE NORMAL nominal",
        "2 of 5 steps differ",
    ]


def test_for_machines(files):
    recording, a, b = files
    done = tamiyo("compare", recording, a, b, "--json")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["first_step"], line["last_step"], line["steps"]) == (2, 3, 2)
    assert (line["a"]["reason"], line["b"]["reason"]) == ("high", "nominal")


def test_no_difference_is_status_0(files):
    recording, a, _ = files
    done = tamiyo("compare", recording, a, a)
    assert (done.returncode, done.stdout) == (0, "0 of 5 steps differ\n")


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_trouble_is_status_2(files, wrong):
    arguments = [*files]
    arguments[wrong] = files[0].with_name("nowhere")
    done = tamiyo("compare", *arguments)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_tail_is_a_warning(files):
    recording, a, b = files
    recording.write_bytes(recording.read_bytes() + b"\0")
    done = tamiyo("compare", recording, a, b)
    assert done.returncode == 1
    assert "2 of 5 steps differ" in done.stdout
    assert "the file ends inside a size; read up to there" in done.stderr


def test_proposals_are_part_of_it(tmp_path):
    path = tmp_path / "recording"
    steps = [one for one, _ in frames(5, 5)]
    path.write_bytes(FORMATS["json"]([proposed((2, "train", "s1")), otlp_of(*steps)]))
    downgrade = table(4, "OPTIMIZER", ", downgrade: true")
    comparison = Comparison(downgrade, load("default"))
    (difference,) = comparison.differences(RecordedRuns(path).steps())
    assert (difference.first_step, difference.a.action, difference.b.action) == (
        2,
        "OPTIMIZER",
        "SEED",
    )


def test_a_silence_that_one_table_minds_is_a_difference():
    steps = []
    for step in range(1, 101):
        for rank in (0, 1) if step <= 20 else (0,):
            made = frame(step, rank=rank)
            at = type(made)(made.run, f"p{rank}", rank, step, step * 1_000_000_000, made.values)
            steps.append((at, None))
    comparison = Comparison(load("default"), load("prototype"))
    (difference,) = comparison.differences(steps)
    assert (difference.rank, difference.first_step, difference.silence) == (1, 20, True)
    assert (difference.a.reason, difference.b) == ("telemetry_quiet", None)
    assert (comparison.differing, comparison.silences) == (0, 1)
