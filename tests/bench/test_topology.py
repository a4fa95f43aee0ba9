"""The runbook's table of sizes is worked out from results, and from nothing else."""

import pytest

from bench import topology
from bench.figures import Figure
from bench.sizing import figures as sizing

TOLD = "64 ranks, 40,960 points/s"
MEASURED = [
    Figure.report("collector", f"{TOLD}: Collector, processor", 0.4, "cores"),
    Figure.report("collector", "the same: Collector, processor per 100,000 points", 1.0, "s"),
    Figure.report("collector", "the same: Prometheus, processor", 0.2, "cores"),
    Figure.report("collector", "the same: Tamiyo, processor", 0.4, "cores"),
    Figure.report("collector", "the same: steps that Tamiyo was not told of", 9600, "steps"),
    Figure.report("sizing", f"{topology.WHAT}: a step in a request of its own", 5000, "bytes"),
]


def test_the_runbook_is_what_the_last_results_make(capsys):
    assert topology.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("row", range(len(MEASURED)))
def test_without_all_that_was_measured_there_is_no_number(row):
    assert topology.section([]) == topology.UNMEASURED
    assert topology.section(MEASURED[:row] + MEASURED[row + 1 :]) == topology.UNMEASURED


def test_every_part_takes_what_it_took_for_the_same_points():
    """And Tamiyo, which was told of half of them, twice as much for all."""
    assert topology.costs(MEASURED) == topology.Costs(1.0, 0.5, 2.0, 5000)


def test_a_row_for_each_number_of_ranks():
    rows = topology.section(MEASURED).splitlines()[-5:-2]
    one, many, most = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert one[:5] == ["1", "640", "0.05 MB/s", "64", "1, `local.yaml`"]
    assert one[5:] == ["0.01", "", "0.00", "0.01", "0.18 GB"]
    assert many[:5] == ["64", "40,960", "3.20 MB/s", "4,096", "8 agents, 2 gateways"]
    assert most[0] == "1,024"
    assert most[4] == "128 agents, 5 gateways"
    assert most[5:9] == ["6.55", "6.55", "3.28", "13.11"]


def test_what_one_gateway_and_one_tamiyo_hold():
    """1.4 cores, of which 640 points a second take 0.0064, and twice that of Tamiyo's."""
    told = topology.section(MEASURED).splitlines()[-1]
    assert "a gateway holds 219 such ranks" in told
    assert "holds 109 by its cores" in told


def test_the_rest_of_the_page_is_left_alone():
    page = f"a\n{topology.BEGIN}\nold\n{topology.END}\nb"
    fresh = topology.renewed(page, [])
    assert fresh == f"a\n{topology.BEGIN}\n{topology.UNMEASURED}\n{topology.END}\nb"


def test_sizes_are_of_the_steps_that_the_table_is_about():
    names = [figure.figure for figure in sizing()]
    assert len(names) == len({*names})
    assert f"{topology.WHAT}: a step in a request of its own" in names
