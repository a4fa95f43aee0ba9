"""The GPU check says why it cannot be run, and tells what failed."""

import pytest

from bench.figures import Figure
from ops import gpu_check


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs it with parts as given; the exit status, and the page that it wrote."""
    monkeypatch.delenv("ESPER_GPU_DEVICE", raising=False)
    monkeypatch.setattr(gpu_check, "devices", lambda: ["a GPU"])

    def checked(tests=True, ratio=1.0):
        def bench(rows):
            import msgspec

            row = Figure.at_most("gpu", "time per step", ratio, "ms", 1.0, bar=1.05)
            rows.write_bytes(msgspec.json.encode([row]))
            return True, "time per step"

        out = tmp_path / "page.md"
        monkeypatch.setattr(gpu_check, "tests", lambda: (tests, "3 passed"))
        monkeypatch.setattr(gpu_check, "bench", bench)
        monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(out)])
        status = gpu_check.main()
        return status, out.read_text() if out.exists() else ""

    return checked


def test_without_a_gpu_nothing_is_run_and_that_is_said(check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "devices", list)
    assert check() == (2, "")
    assert "esper-otel: the GPU check cannot be run: torch finds no GPU here" in (
        capsys.readouterr().err
    )


def test_wheels_that_are_missing_are_named(check, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.NEEDED, "not_there.at_all", "a-wheel")
    assert check() == (2, "")
    assert capsys.readouterr().err.rstrip().endswith("these wheels are missing: a-wheel")


def test_it_passes_where_tests_pass_and_bars_hold(check):
    status, page = check()
    assert status == 0
    assert "on: a GPU, torch " in page
    assert "## tests: passed" in page


@pytest.mark.parametrize("how", [{"tests": False}, {"ratio": 1.2}])
def test_it_fails_where_either_does_not(check, how):
    status, page = check(**how)
    assert status == 1
    assert ("**failed**" in page) is ("tests" in how)
