"""Coverage by package: sums over files, and a line where nothing was measured."""

import msgspec
import pytest

from ops import coverage_table
from ops.coverage_table import Counts, Report, by_package, main, table_of

COUNTS = {"num_statements": 10, "covered_lines": 5, "num_branches": 4, "covered_branches": 2}
HALF = {"summary": COUNTS | {"percent_covered": 50.0, "missing_lines": 5}}
WHOLE = {"summary": COUNTS | {"covered_lines": 10, "covered_branches": 4}}
REPORT = msgspec.json.encode(
    {
        "meta": {"version": "7"},
        "files": {
            "src/esper_otel/run.py": HALF,
            "src/esper_otel/stream/ring.py": HALF,
            "src/esper_otel/stream/deep/spool.py": WHOLE,
            "sidecar/esper_tamiyo/cli.py": WHOLE,
            "ops/site.py": HALF,
        },
    }
)


def test_files_of_a_package_and_of_those_below_it_add_up():
    packages = by_package(msgspec.json.decode(REPORT, type=Report))
    assert packages == {
        "esper_otel": Counts(10, 5, 4, 2),
        "esper_otel.stream": Counts(20, 15, 8, 6),
        "esper_tamiyo": Counts(10, 10, 4, 4),
    }
    assert packages["esper_otel.stream"].percent == pytest.approx(75)


def test_the_table_has_each_package_each_distribution_and_all():
    table = table_of(by_package(msgspec.json.decode(REPORT, type=Report)))
    assert table.splitlines()[2:] == [
        "| `esper_otel` | 10 | 4 | 50.0 % |",
        "| `esper_otel.stream` | 20 | 8 | 75.0 % |",
        "| `esper_tamiyo` | 10 | 4 | 100.0 % |",
        "| **all of `esper_otel`** | 30 | 12 | 66.7 % |",
        "| **all of `esper_tamiyo`** | 10 | 4 | 100.0 % |",
        "| **total** | 40 | 16 | 75.0 % |",
    ]


def test_a_package_without_code_is_covered():
    assert Counts().percent == 100


def test_nothing_measured_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["coverage_table"])
    monkeypatch.setattr(coverage_table, "ROOT", tmp_path)
    monkeypatch.setattr(coverage_table, "TABLE", tmp_path / "packages.md")
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("coverage: No data")
    assert "`make coverage`" in line
    assert not (tmp_path / "packages.md").exists()
