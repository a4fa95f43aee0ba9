"""The figures of the bench on judgement: what has a bar, and who cannot hide behind whom."""

from bench.judgement import judged, of_each_workload
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
    pooled = judged(told, told)[0]
    assert (pooled.figure, pooled.holds) == (
        "default, unused half: troubles not answered",
        True,
    )
    bars = {row.figure: (row.bar, row.holds) for row in of_each_workload(made) if row.bar}
    assert bars == {
        "default, unused half, digits: 100 troubles, not answered": (pooled.bar, True),
        "default, unused half, restore: 2 troubles, not answered": (pooled.bar, False),
    }
