"""Names that pose as ours: every command shows them escaped, on our lines alone."""

import json
from collections import namedtuple

import pytest

from esper_otel import cli as trainer_cli
from esper_otel.leyline.decisions import Action, Decision, Finding, Severity
from esper_otel.leyline.terminal import printable
from esper_otel.leyline.wire import Latest, SilenceReply, Status
from esper_otel.stream import StreamReport
from esper_otel.summary import TrainingSummary, summary_of
from esper_tamiyo.cli import main
from esper_tamiyo.journaling.entries import Gap, Opened, RuleSilence
from esper_tamiyo.journaling.journal import Journal, files_of
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import TableSource, parse
from sidecar.entries_made import AT, changed, decided, found, reported, table
from sidecar.frames_made import frame
from sidecar.recorded_runs import FORMATS, cut

FORGED = "2026-11-29T00:00:00Z  prod/0/4711  PAUSE"
SHOWN = "ü漢字"
EVIL = (
    f"{SHOWN}🙂\n{FORGED}\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2066\u200b"
    f"\u2028{FORGED}\x7f\r{FORGED}"
)

Output = namedtuple("Output", "status out err")

TABLE = """
version: VERSION
rules:
  - {id: high, metric: loss, above: 5, severity: HIGH, action: PAUSE, text: EVIL}
  - id: seeds
    metric: kasmina.seed.alpha
    above: 0.5
    severity: WARNING
    action: PAUSE
    text: EVIL
""".replace("VERSION", json.dumps(EVIL[:60])).replace("EVIL", json.dumps(EVIL))


def is_ours(output):
    """Whether nothing in it poses as ours, and it shows the name at all."""
    for text in (output.out, output.err):
        for line in text.split("\n"):
            assert line.isprintable(), repr(line)
            assert not line.startswith(FORGED), line
    return SHOWN in output.out + output.err or r"\u00fc\u6f22" in output.out


@pytest.fixture
def tamiyo(capsys):
    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return Output(status, *capsys.readouterr())

    return run


@pytest.fixture
def journal(tmp_path):
    """The folder of a journal in which every name is hostile."""
    folder = tmp_path / "journal"
    journal = Journal(folder, 1_000_000, 2)
    finding = found(EVIL, **{EVIL: 1.0, f"baseline({EVIL})": 0.5})
    journal.append(
        [
            Opened(time_unix_nano=AT, pid=1, release=EVIL),
            table(EVIL),
            decided(3, EVIL, EVIL, findings=[finding], target_seed=EVIL, table_version="t-1"),
            decided(4, EVIL, EVIL, action=Action.CONTINUE, findings=[finding], instance=EVIL),
            changed(5, EVIL, run=EVIL, seed_id=EVIL, values={EVIL: 2.0}, silenced_by=EVIL),
            reported(3, run=EVIL, outcome=EVIL),
            RuleSilence(
                time_unix_nano=AT,
                run=EVIL,
                rule=EVIL,
                after_step=1,
                until_step=None,
                undone=False,
                uid=0,
            ),
            Gap(time_unix_nano=AT, lost=1, because=EVIL),
        ]
    )
    journal.close()
    with files_of(folder)[0].open("ab") as file:
        file.write(b'{"kind":"' + EVIL.encode() + b'"}\n')
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("journal",),
        ("journal", "--json"),
        ("journal", "--run", EVIL),
        ("explain", f"{EVIL}/0/3"),
        ("explain", f"{EVIL}/0/4"),
        ("explain", f"{EVIL}/0/3", "--json"),
        ("explain", "latest", "--run", EVIL),
        ("explain", f"{EVIL}/0/99"),
        ("explain", "latest", "--run", f"no {EVIL}"),
    ],
)
def test_the_journal_is_read_on_our_lines(tamiyo, journal, arguments):
    assert is_ours(tamiyo(*arguments, "--journal", journal))


def test_json_of_the_journal_has_the_names_as_they_are(tamiyo, journal):
    lines = map(json.loads, tamiyo("journal", "--json", "--journal", journal).out.splitlines())
    assert EVIL in {line.get("run") for line in lines}


def test_what_was_printed_can_be_asked_for(tamiyo, journal, recording):
    shown = printable(EVIL)
    explained = tamiyo("explain", f"{shown}/0/3", "--journal", journal)
    assert explained.status == 0
    assert explained == tamiyo("explain", f"{EVIL}/0/3", "--journal", journal)
    listed = tamiyo("journal", "--run", shown, "--journal", journal).out
    assert listed
    assert listed == tamiyo("journal", "--run", EVIL, "--journal", journal).out
    assert tamiyo("replay", recording, "--run", shown).status == 0


def test_a_folder_that_is_not_there_is_named_on_our_line(tamiyo, tmp_path):
    output = tamiyo("journal", "--journal", tmp_path / EVIL.replace("/", "|"))
    assert output.status == 1
    assert is_ours(output)


def report_of(engine):
    """What ``tamiyo status`` is told, hostile where names stand."""
    return {
        "pid": 1,
        "uptime_s": 3.0,
        "last_frame_age_s": 1.0,
        "missed_steps": 0,
        "table": {
            "version": EVIL,
            "source": EVIL,
            "last_error": "t.yaml:3: one\nt.yaml:4: two",
        },
        "connections": {},
        "answers": {EVIL: 1},
        "engine": engine.overview(AT),
        "ingest": None,
        "scribe": {"state": "working", "error": EVIL, "journal": EVIL},
    }


def judged():
    """An engine that has judged a step of a hostile run, with a hostile seed."""
    engine = Engine(parse(TableSource("t", TABLE.encode())))
    seeds = {EVIL: {"kasmina.seed.alpha": 1.0}}
    engine.observe(frame(1, seeds, run=EVIL, instance=EVIL, loss=9.0))
    return engine


DECISION = Decision(
    id=EVIL,
    run=EVIL,
    step=1,
    observed_step=1,
    action=Action.PAUSE,
    severity=Severity.HIGH,
    reason=EVIL,
    findings=[Finding(EVIL, Action.PAUSE, Severity.HIGH, EVIL, {EVIL: 1.0}, EVIL)],
    parameters={EVIL: 1.0},
    target_seed=EVIL,
    table_version=EVIL,
)


@pytest.mark.parametrize(
    ("reply", "arguments"),
    [
        (lambda: Status(report_of(judged())), ("status",)),
        (lambda: Status(report_of(judged())), ("status", "--json")),
        (lambda: Latest(DECISION), ("ask",)),
        (lambda: Latest(DECISION), ("ask", "--json")),
        (lambda: Latest(None), ("ask", "--run", EVIL)),
        (lambda: SilenceReply("", EVIL), ("silence", EVIL, EVIL)),
        (lambda: SilenceReply(EVIL), ("silence", EVIL, EVIL)),
    ],
)
def test_what_the_sidecar_replies_is_shown_on_our_lines(tamiyo, monkeypatch, reply, arguments):
    answer = reply()
    monkeypatch.setattr("esper_otel.leyline.tool_requests.reply_to", lambda *_: answer)
    assert is_ours(tamiyo(*arguments))


def test_a_table_that_was_not_reloaded_is_told_of_line_by_line(tamiyo, monkeypatch):
    monkeypatch.setattr(
        "esper_otel.leyline.tool_requests.reply_to", lambda *_: Status(report_of(judged()))
    )
    lines = tamiyo("status").err.splitlines()
    assert lines[-2:] == ["tamiyo: the table was not reloaded: t.yaml:3: one", "t.yaml:4: two"]


@pytest.fixture
def recording(tmp_path):
    """A recorded run whose names, the file's included, are hostile."""
    seeds = {EVIL: {"kasmina.seed.alpha": 1.0}}
    frames = [
        frame(step, seeds, run=EVIL, instance=EVIL, loss=1.0 if step < 5 else 9.0)
        for step in range(1, 9)
    ]
    path = tmp_path / "\n\x1b[31mforged.metrics.otlp"
    path.write_bytes(FORMATS["proto"](cut(frames, iter([100]))) + b"cut short")
    return path


@pytest.fixture
def hostile_table(tmp_path):
    path = tmp_path / f"{SHOWN}\n{FORGED}\x1b.yaml".replace("/", "|")
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize("more", [(), ("--json",), ("--run", f"no {EVIL}")])
def test_recordings_are_replayed_and_compared_on_our_lines(
    tamiyo, recording, hostile_table, more
):
    replayed = tamiyo("replay", recording, "--table", hostile_table, *more)
    assert is_ours(replayed)
    compared = tamiyo("compare", recording, hostile_table, "default", *more)
    assert is_ours(compared)
    assert r"\x1b[31mforged.metrics.otlp" in replayed.err
    if "--run" not in more:
        assert (replayed.status, compared.status) == (0, 1)


def test_tables_are_checked_on_our_lines(tamiyo, hostile_table):
    good = tamiyo("check", hostile_table)
    assert good.status == 0
    assert is_ours(good)
    hostile_table.write_text(f"{TABLE}  - id: {json.dumps(EVIL)}\n    {json.dumps(EVIL)}: 1\n")
    bad = tamiyo("check", hostile_table)
    assert bad.status == 1
    assert is_ours(bad)
    replayed = tamiyo("replay", "nothing", "--table", hostile_table)
    assert replayed.status == 1
    assert is_ours(replayed)


def test_tests_of_tables_are_told_on_our_lines(tamiyo, hostile_table):
    tests = hostile_table.with_name("\n\x1btests.yaml")
    name = json.dumps(EVIL)
    tests.write_text(
        f"table: {json.dumps(hostile_table.name)}\ntests:\n  - name: {name}\n"
        f"    metrics: {{loss: 9x3}}\n    seeds: {{{name}: {{kasmina.seed.alpha: 1x3}}}}\n"
        "    expect: []\n"
    )
    failed = tamiyo("test", tests)
    assert failed.status == 1
    assert is_ours(failed)
    tests.write_text(f"{name}: 1\n")
    broken = tamiyo("test", tests)
    assert broken.status == 2
    assert is_ours(broken)


def test_the_trainers_commands_show_them_on_our_lines(recording, capsys, monkeypatch):
    columns = ("--metrics", "loss,kasmina.seed.alpha")
    assert trainer_cli.main(["show", str(recording), *columns]) == 1
    assert r"\x1b[31mforged.metrics.otlp: byte" in capsys.readouterr().err
    shown = frame(1, {EVIL: {"kasmina.seed.alpha": 1.0}}, run=EVIL, instance=EVIL, loss=1.0)
    monkeypatch.setattr("esper_otel.stream.read_frames", lambda path: iter([shown]))
    assert trainer_cli.main(["show", str(recording), *columns]) == 0
    assert is_ours(Output(0, *capsys.readouterr()))
    assert trainer_cli.main(["show", "--json", str(recording)]) == 0
    output = Output(0, *capsys.readouterr())
    assert json.loads(output.out)["run"] == EVIL
    assert is_ours(output)
    assert trainer_cli.main(["resend", EVIL]) == 1
    assert is_ours(Output(1, *capsys.readouterr()))
    assert trainer_cli.main(["run", EVIL]) == 2
    assert is_ours(Output(1, *capsys.readouterr()))


def test_the_summary_of_a_run_is_ours():
    from esper_otel.stream.totals import RunTotals

    totals = RunTotals()
    totals.decisions["PAUSE", EVIL] += 1
    totals.unanswered.add(EVIL)
    report = StreamReport(files=[EVIL], recordings=[EVIL])
    summary = summary_of(EVIL, 0, totals, report, others=[(EVIL, totals)])
    assert isinstance(summary.trainings[0], TrainingSummary)
    text = summary.as_text()
    assert text.count(r"\x1b[2J") >= 5
    assert is_ours(Output(0, text, ""))
