"""What Prometheus scrapes of the sidecar's page, read by Prometheus' own tools."""

import subprocess

import pytest

from esper_tamiyo.journaling.messages import ANSWER_MS, Histogram
from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from esper_tamiyo.showing import exposition
from esper_tamiyo.showing.exposition import LEFT_OUT, wants_openmetrics
from ops.stack.programs import PROMETHEUS, MissingError, find
from sidecar.frames_made import frame

REPORT = {
    "beat": 7,
    "uptime_s": 12.5,
    "decisions": [
        {"action": "PAUSE", "severity": "HIGH", "rule": 'a"b\\c\nd', "count": 3},
        {"action": "CONTINUE", "severity": "NORMAL", "rule": "nominal", "count": 40},
    ],
    "engine": {"frames": {"judged": 43}, "states": {"healthy": 2}},
    "table": {"version": "default-1"},
}

HOSTILE = [
    "plain",
    'quo"te',
    "back\\slash",
    "back\\\\slash",
    "new\nline",
    "carriage\rreturn",
    "nul\0",
    "nul\\x00",
    "<img src=x onerror=alert(1)>",
    "</script>",
    '{a="b"} 1',
    "# EOF",
    "\u202e\u2028é𝄞",
    "",
]


def answers():
    histogram = Histogram(ANSWER_MS)
    for value in (0.01, 0.3, 7.0, 1e9):
        histogram.add(value)
    return {"answers": histogram.snapshot()}


def text_of(ranks=(), openmetrics=False, report=REPORT):
    return exposition.exposition(report, answers(), ranks, openmetrics).decode()


def samples(text):
    """Name and labels of each sample → value."""
    found = {}
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name not in found
            found[name] = value
    return found


@pytest.fixture(scope="module")
def promtool():
    try:
        return find(PROMETHEUS).with_name("promtool")
    except MissingError as error:
        pytest.skip(str(error))


def ranks():
    seeds = {'se"ed': {"kasmina.seed.alpha": 0.5, "kasmina.seed.stage": 4.0}}
    return [
        frame(
            9,
            run=name,
            rank=rank,
            seeds=seeds,
            loss=float("1e-7"),
            unheard_of=1.0,
            **{f"custom.{name}": 1.0},
        )
        for rank, name in enumerate(HOSTILE)
    ]


def test_own_metrics_and_the_newest_values_of_ranks():
    found = samples(text_of(ranks()[:2]))
    assert found[
        'tamiyo_decisions_total{action="PAUSE",severity="HIGH",rule="a\\"b\\\\c\\nd"}'
    ] == ("3.0")
    assert found["tamiyo_heartbeat_total"] == "7.0"
    assert found["tamiyo_uptime_seconds"] == "12.5"
    assert found['tamiyo_answer_duration_milliseconds_bucket{le="0.02"}'] == "1.0"
    assert found['tamiyo_answer_duration_milliseconds_bucket{le="+Inf"}'] == "4.0"
    assert found["tamiyo_answer_duration_milliseconds_count"] == "4.0"
    assert found['tolaria_loss{esper_run_id="plain",esper_rank="0"}'] == "1e-07"
    assert found[
        'kasmina_seed_alpha_ratio{esper_run_id="quo\\"te",esper_rank="1",seed_id="se\\"ed"}'
    ] == ("0.5")
    assert not any("unheard_of" in name for name in found)
    assert found[LEFT_OUT] == "0.0"


def test_values_of_the_scripts_own_are_samples_of_one_family():
    own = {
        "custom.val/loss": 0.5,
        'custom.k"l': 2.0,
        "custom.nul\0": 1.0,
        "custom.nul\\x00": 3.0,
    }
    text = text_of([frame(9, run="r", **own)])
    found = samples(text)
    of_run = 'tolaria_custom{esper_run_id="r",esper_rank="0",name='
    assert found[of_run + '"val/loss",esper_evaluation="true"}'] == "0.5"
    assert found[of_run + '"k\\"l"}'] == "2.0"
    assert text.count("# TYPE tolaria_custom gauge") == 1
    # Two that are shown alike would be one series, told twice.
    assert sum(name.startswith(of_run + '"nul') for name in found) == 1
    assert found[LEFT_OUT] == "1.0"


def test_promtool_reads_the_text_format(promtool):
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text_of(ranks()), capture_output=True, text=True
    )
    # 3: it would have other names; 1: it cannot read them.
    assert done.returncode in (0, 3), done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("report", [{}, REPORT], ids=["before the first heartbeat", "after it"])
def test_promtool_reads_openmetrics(promtool, tmp_path, report):
    lines = text_of(ranks(), openmetrics=True, report=report).split("\n")
    assert lines[-2:] == ["# EOF", ""]
    path = tmp_path / "scraped"
    # What it imports has times, which a scrape leaves to the scraper.
    path.write_text(
        "\n".join(line if line.startswith("#") or not line else f"{line} 1" for line in lines)
    )
    done = subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", path, tmp_path / "blocks"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [promtool, "tsdb", "list", tmp_path / "blocks"], capture_output=True, text=True
    )
    count = len(samples("\n".join(lines)))
    assert f" {count} " in listed.stdout.replace("\t", " ")


def test_names_that_are_shown_alike_are_not_told_twice():
    same = [frame(1, run=name, loss=1.0) for name in ("nul\0", "nul\\x00", "nul\0")]
    found = samples(text_of(same))
    assert sum(name.startswith("tolaria_loss{") for name in found) == 1
    assert found[LEFT_OUT] == "4.0"


def test_values_of_ranks_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(exposition, "MOST_SAMPLES", 10)
    found = samples(text_of([frame(1, rank=rank, loss=1.0) for rank in range(9)]))
    told = [name for name in found if name.startswith("tolaria_")]
    assert len(told) == 10
    assert found[LEFT_OUT] == "8.0"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml", False),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", False),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", True),
        ("text/plain, application/openmetrics-text; version=1.0.0; q=0.3", True),
    ],
)
def test_which_format_a_scraper_gets(accept, wanted):
    assert wants_openmetrics(accept) is wanted


def test_every_family_is_told_once_and_explained():
    text = text_of(ranks())
    kinds = [line.split()[2] for line in text.split("\n") if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    assert len(kinds) == sum(line.startswith("# HELP") for line in text.split("\n"))
    assert len(OWN_METRICS) > 20
