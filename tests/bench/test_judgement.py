"""The figures of the bench on judgement: what has a bar, and who cannot hide behind whom."""

from bench.judgement import baseline, judged, of_each_workload
from bench.scenarios.scoring import Outcome, score
from bench.scenarios.suite import Scenario


def outcomes(workload, answered, missed):
    return [
        Outcome(
            scenario=Scenario(workload, "lr_zero", number),
            at=50,
            shown=50,
            answered=50 if number < answered else None,
            acted=(),
            told=(),
            others=(),
            frames=100,
            healthy=50,
            load=1.0,
        )
        for number in range(answered + missed)
    ]


def test_a_workload_that_goes_unanswered_does_not_hide_among_the_many_of_another():
    made = outcomes("digits", 99, 1) + outcomes("restore", 1, 1)
    told = score(made)
    pooled = judged(told, told, {"prototype": told})[0]
    assert (pooled.figure, pooled.holds) == (
        "default, unused half: troubles not answered",
        True,
    )
    bars = {row.figure: (row.bar, row.holds) for row in of_each_workload(made) if row.bar}
    assert bars == {
        "default, unused half, digits: 100 troubles, not answered": (pooled.bar, True),
        "default, unused half, restore: 2 troubles, not answered": (pooled.bar, False),
    }


def test_what_comes_too_late_does_not_hold_the_bars_of_telling_and_acting():
    late = [
        each._replace(
            scenario=Scenario("digits", "lr_times_50", number), answered=71, acted_on=acted_on
        )
        for number, (each, acted_on) in enumerate(
            zip(outcomes("digits", 2, 0), (100, 101), strict=True)
        )
    ]
    rows = {row.figure: row for row in judged(score(late), score([]), {})}
    told, acted = (
        next(row for name, row in rows.items() if name.startswith("default") and part in name)
        for part in ("not told within 20", "not acted on within 50")
    )
    assert (told.value, told.holds) == (100, False)
    assert (acted.value, acted.holds) == (50, False)


def test_baselines_have_no_bars():
    assert all(row.bar is None for row in baseline("somebody", score(outcomes("digits", 1, 1))))
