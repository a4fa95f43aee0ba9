"""The picture: what is known of runs, in rows that fit any terminal."""

import pytest

from esper_otel.top.choice import WINDOWS, Choice
from esper_otel.top.picture import picture, snapshot
from esper_otel.top.rows import Piece, fitted
from esper_otel.top.sources import PROBLEM_S, RecordedSource
from report.made import frames, recorded, spans
from sidecar.frames_made import frame

PHASES = {
    "step_latency_ms": lambda step: 10.0,
    "forward_ms": lambda step: 3.0,
    "backward_ms": lambda step: 5.0,
}


def loss(step):
    return 2.0 / (step + 1)


def norm(step):
    return 0.5


def read(folder):
    source = RecordedSource([folder])
    source.read(0.0, lambda _: None)
    return source


@pytest.fixture
def folder(tmp_path):
    """A run of two ranks with a seed and decisions, and another one before it."""
    curves = {"loss": loss, "gradient_norm": norm, **PHASES}
    for rank in (0, 1):
        made = frames(50, run="two", rank=rank, seeds=["wide"], at_s=9.0, **curves)
        recorded(tmp_path / f"two-rank{rank}.metrics.otlp", made)
    spans(tmp_path / "two-rank0.traces.otlp", "two", 20, 21, 22, 30)
    recorded(tmp_path / "one-rank0.metrics.otlp", frames(20, run="one", loss=loss))
    return tmp_path


def text_of(rows):
    return ["".join(piece.text for piece in row).rstrip() for row in rows]


def shown(source, choice=None, width=80, height=24):
    rows = picture(source.runs(), choice or Choice(), width, height, source.name, "")
    assert len(rows) == height
    lines = text_of(rows)
    assert all(len(line) <= width for line in lines)
    return lines


def test_a_run_is_there_with_all_that_is_known_of_it(folder):
    lines = shown(read(folder))
    assert lines[0].startswith(" two  rank 0 of 2  step 49  loss 0.04  10 ms  newest step at ")
    assert lines[1].startswith(" loss 2 → 0.04")
    assert "gradient_norm 0.5 → 0.5" in lines[1]
    text = "\n".join(lines)
    assert "step time" in text
    assert " 5 ms  50%" in next(line for line in lines if line.startswith(" backward"))
    assert "seed wide" in text
    assert " ▸rank 0     step        49  loss 0.04" in text
    assert "  rank 1     step        49  loss 0.04" in text
    assert " decisions and notices 4 so far" in lines
    newest = lines.index(" decisions and notices 4 so far") + 1
    assert lines[newest].startswith(
        "          30 PAUSE     loss_spike applied loss 8.5, baseline"
    )
    assert lines[newest + 1].startswith("       20-22 PAUSE     loss_spike ×3 applied loss 8.5")
    axis = next(line for line in lines if "▲" in line)
    assert axis.count("▲") == 2 * len({step * 37 // 49 for step in (20, 21, 22, 30)})
    assert lines[-1].endswith("q quit")


def test_all_runs_are_a_table(folder):
    choice = Choice()
    choice.press("a", [])
    lines = shown(read(folder), choice)
    assert lines[0].startswith("  2 runs")
    assert lines[1].startswith(" ▸two")
    assert lines[2].startswith("  one")
    assert "█" in lines[2]


@pytest.mark.parametrize("size", [(40, 10), (60, 15), (80, 24), (120, 40), (220, 80), (20, 5)])
def test_it_fits_whatever_the_size(folder, size):
    width, height = size
    source = read(folder)
    for all_runs in (False, True):
        choice = Choice()
        choice.shows_all = all_runs
        lines = shown(source, choice, width, height)
        assert any(lines)


def test_keys_choose_run_rank_curve_window_and_scale(folder):
    source, choice = read(folder), Choice()
    runs = source.runs()
    assert choice.press("down", runs)
    assert shown(source, choice)[0].startswith(" two  rank 1 of 2")
    assert choice.press("down", runs)
    assert shown(source, choice)[0].startswith(" two  rank 0 of 2")
    assert choice.press("left", runs)
    assert shown(source, choice)[0].startswith(" one  step 19")
    assert choice.press("right", runs)
    titles = []
    for _ in range(5):
        titles.append(shown(source, choice)[1].split()[0])
        assert choice.press("c", runs)
    assert titles[:2] == ["loss", "gradient_norm"]
    assert titles == [*dict.fromkeys(titles)]
    assert choice.press("C", runs)
    choice.curve = "loss"
    assert choice.press("l", runs)
    assert "log" in shown(source, choice)[1]
    assert choice.press("w", runs)
    assert f"last {WINDOWS[1]:,}" in shown(source, choice, width=100)[-1]
    assert choice.press(" ", runs)
    assert "HELD" in shown(source, choice, width=100)[-1]
    assert not choice.press("x", runs)


def test_a_run_that_was_asked_for_and_is_not_there_is_waited_for(folder):
    lines = shown(read(folder), Choice("later"))
    assert lines[0].startswith(f" no step of a run yet: {folder}"[:70])


def test_an_empty_folder_has_no_run_yet(tmp_path):
    source = read(tmp_path)
    assert shown(source)[0].startswith(" no step of a run yet")
    assert snapshot(source.runs(), Choice(), 80, 30) == []
    for key in ("left", "up", "c", "z"):
        assert not Choice().press(key, [])


def test_what_is_wrong_takes_the_place_of_the_keys(folder):
    rows = picture(read(folder).runs(), Choice(), 80, 24, "here", "it hangs")
    assert text_of(rows)[-1] == " it hangs"


def test_a_file_that_turns_bad_is_told_for_a_while(folder):
    source = read(folder)
    assert not source.refresh("", 0, 1.0)
    with (folder / "one-rank0.metrics.otlp").open("ab") as file:
        file.write(b"\xff" * 10)
    assert source.refresh("", 0, 2.0)
    assert "one-rank0.metrics.otlp: byte" in source.problem
    assert not source.refresh("", 0, 2.0 + PROBLEM_S / 2)
    assert source.refresh("", 0, 2.0 + PROBLEM_S)
    assert (source.problem, len(source.problems)) == ("", 1)


def test_a_loss_that_is_no_number_is_told(tmp_path):
    made = frames(
        10,
        loss=lambda step: loss(step) if step < 5 else None,
        nonfinite=lambda step: float(step >= 5),
    )
    recorded(tmp_path / "run-rank0.metrics.otlp", made)
    assert "loss not finite" in shown(read(tmp_path))[0]


def test_names_cannot_pose_as_ours(tmp_path):
    evil = "a\x1b[2Jb\nc\u202e"
    recorded(tmp_path / "x-rank0.metrics.otlp", frames(3, run=evil, seeds=[evil], loss=loss))
    text = "\n".join(shown(read(tmp_path)))
    assert "a\\x1b[2Jb\\nc\\u202e" in text
    assert "\x1b" not in text


def test_a_process_that_went_on_is_one_curve_and_one_that_began_anew_is_its_own(tmp_path):
    for name, first in (("one", 0), ("two", 10)):
        made = frames(10, instance=name, first=first, at_s=first, loss=loss)
        recorded(tmp_path / f"{name}-rank0.metrics.otlp", made)
    (run,) = read(tmp_path).runs()
    assert len(run.lead.curve("loss").points().steps) == 20
    recorded(tmp_path / "z.metrics.otlp", frames(4, instance="three", at_s=99.0, loss=loss))
    (run,) = read(tmp_path).runs()
    assert run.lead.step == 3
    assert len(run.lead.curve("loss").points().steps) == 4


def test_rows_are_as_wide_as_a_terminal_shows_them():
    wide = Piece("日本語")
    assert fitted([wide, Piece("x")], 5) == [Piece("日本")]
    assert fitted([wide], 8, pad=True) == [wide, Piece("  ")]
    assert fitted([Piece("e\u0301" * 3)], 2) == [Piece("e\u0301e\u0301")]


def test_seeds_tell_their_stages(tmp_path):
    made = []
    for step in range(40):
        seeds = {"s": {"kasmina.seed.stage": float(2 + step // 10), "kasmina.seed.alpha": 0.5}}
        if step < 20:
            seeds["gone"] = {"kasmina.seed.stage": 3.0, "kasmina.seed.alpha": 0.0}
        made.append(frame(step, seeds=seeds, loss=1.0))
    recorded(tmp_path / "run-rank0.metrics.otlp", made)
    lines = [line for line in shown(read(tmp_path), width=120) if line.startswith(" seed")]
    assert "shadowing    0.50 ████" in lines[0]
    assert "germinated 0 → training 10 → blending 20 → shadowing 30" in lines[0]
    assert "culled" in lines[1]
