"""Both programs on the command line: help, mistakes, completion, output for machines."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper_otel import cli as esper_otel
from esper_otel._version import __version__
from esper_otel.commands.run import divided, spelled_out
from esper_otel.leyline.command_line import SHELLS
from esper_otel.leyline.decisions import Severity
from esper_tamiyo import cli as tamiyo
from esper_tamiyo.commands.sidecar import _duration
from esper_tamiyo.journaling.entries import Changed, Decided, Found, Opened, TableInUse
from esper_tamiyo.journaling.journal import Journal
from esper_tamiyo.judging.observer import RuleState
from ops.stack.programs import FISH, ZSH, MissingError, find

PROGRAMS = {"esper-otel": esper_otel, "tamiyo": tamiyo}


def commands():
    """The parser of each command, those within others included."""
    waiting = [each.command_parser() for each in PROGRAMS.values()]
    while waiting:
        parser = waiting.pop(0)
        yield parser
        waiting += parser.commands.values()


COMMANDS = list(commands())


def example_lines():
    for parser in COMMANDS:
        for command, _ in parser.examples:
            yield command


@pytest.mark.parametrize("parser", COMMANDS, ids=lambda parser: parser.prog)
def test_help_has_examples_on_lines_of_their_own(parser):
    assert parser.examples
    shown = parser.format_help().splitlines()
    for command, what in parser.examples:
        assert any(line.strip().startswith(command) and what in line for line in shown)


@pytest.mark.parametrize("line", sorted(set(example_lines())))
def test_an_example_is_a_command_line_that_is_taken(line):
    program, *words = shlex.split(line.partition(" > ")[0])
    parser = PROGRAMS[program].command_parser()
    if words[0] == "run" and words[1:] != ["--help"]:
        ours, pythons = divided(parser.commands["run"], spelled_out(words)[1:])
        assert pythons, "nothing to run"
        words = ["run", *ours]
    if words[-1] == "--help":
        words.pop()
        assert words[0] in parser.commands
    elif words[0] == "runs" or words:
        assert parser.parse_args(words).parser.prog.startswith(program)


@pytest.mark.parametrize(
    ("line", "usage", "told"),
    [
        ("tamiyo", "tamiyo [-h]", "tamiyo: the following arguments are required: COMMAND"),
        ("tamiyo srve", "tamiyo [-h]", "tamiyo: argument COMMAND: invalid choice: 'srve'"),
        ("tamiyo check", "tamiyo check [-h]", "tamiyo: check: the following arguments"),
        ("tamiyo check x --bad", "tamiyo check [-h]", "tamiyo: check: unrecognized"),
        ("tamiyo check x y", "tamiyo check [-h]", "check: unrecognized arguments: y"),
        ("tamiyo journal --since soon", "tamiyo journal [-h]", "expected an age like 30m"),
        ("tamiyo journal --severity odd", "tamiyo journal [-h]", "invalid choice: 'ODD'"),
        ("esper-otel show --metrics", "esper-otel show [-h]", "expected one argument"),
        ("esper-otel runs prune --bad", "esper-otel runs prune", "esper-otel: runs prune: "),
        (
            "esper-otel run --bad x.py",
            "esper-otel run [option",
            "unrecognized arguments: --bad",
        ),
        ("esper-otel check '\x1b[31m'", "esper-otel [-h]", "invalid choice: "),
        ("tamiyo ask '\x1b[31m'", "tamiyo ask [-h]", r"unrecognized arguments: \x1b[31m"),
    ],
)
def test_a_wrong_line_gets_the_usage_of_its_command_and_status_2(line, usage, told, capsys):
    program, *words = shlex.split(line)
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program].main(words)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"usage: {usage}")
    last = shown.err.splitlines()[-1]
    assert last.startswith(f"{program}: ")
    assert told in last
    assert shown.err.count("\x1b") == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_tells_its_version(program, capsys):
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program].main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{program} {__version__}\n"


def path_of(shell):
    """Where a shell is, in ``PATH`` or in the cache of programs."""
    if shell == "bash":
        return shutil.which(shell) or pytest.skip("bash is not installed")
    try:
        return find({"zsh": ZSH, "fish": FISH}[shell])
    except MissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_completion_prints_a_script_that_its_shell_takes(program, shell, capsys, tmp_path):
    assert PROGRAMS[program].main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert program in script.read_text()
    check = "--no-execute" if shell == "fish" else "-n"
    command = [path_of(shell), check, script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    script.write_text(f'{script.read_text()}\necho "\n')
    assert subprocess.run(command, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tamiyo jou", "journal"),
        ("tamiyo journal --sev", "--severity"),
        ("tamiyo journal --severity CR", "CRITICAL"),
        ("esper-otel exp", "export"),
        ("esper-otel export --to par", "parquet"),
        ("esper-otel runs pr", "prune"),
    ],
)
def test_bash_completes(words, completed):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    program = words.partition(" ")[0]
    script = PROGRAMS[program].SCRIPTS / f"{program}.bash"
    typed = " ".join(map(shlex.quote, words.split(" ")))
    ask = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=({typed}); "
        f"COMP_CWORD={words.count(' ')}; _shtab_{program.replace('-', '_')}; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == [completed], done.stderr


GOOD = "version: 1\nrules:\n- {id: a, metric: loss, above: 1, severity: HIGH, action: PAUSE}\n"
BAD = "version: 1\nrules:\n- {id: a, metric: los, above: x}\n"
TESTS = """\
table: t.yaml
tests:
  - name: fires
    metrics: {loss: 0 2}
    expect: [{step: 2, action: PAUSE}]
  - name: fails
    metrics: {loss: 0 0}
    expect: [{step: 2, action: PAUSE}]
"""


def told_as_json(capsys, *words):
    status = tamiyo.main([str(word) for word in words])
    shown = capsys.readouterr()
    assert shown.err == ""
    return status, [json.loads(line) for line in shown.out.splitlines()]


def test_check_as_json(tmp_path, capsys):
    table = tmp_path / "t.yaml"
    table.write_text(GOOD)
    status, (told,) = told_as_json(capsys, "check", "--json", table)
    assert (status, told["valid"], told["mistakes"]) == (0, True, [])
    assert [rule["id"] for rule in told["rules"]] == ["a"]
    assert told["rules"][0]["when"] == "loss above 1"
    table.write_text(BAD)
    status, (told,) = told_as_json(capsys, "check", "--json", table)
    assert (status, told["valid"]) == (1, False)
    assert {mistake["line"] for mistake in told["mistakes"]} == {3}
    assert {mistake["file"] for mistake in told["mistakes"]} == {str(table)}
    assert "rules[0].metric" in {mistake["field"] for mistake in told["mistakes"]}
    table.write_text(GOOD.replace("loss, above: 1", "accuracy, above: 2"))
    status, (told,) = told_as_json(capsys, "check", "--json", table)
    assert (status, told["mistakes"][0]["line"]) == (1, 3)
    assert told["mistakes"][0]["message"].startswith("can never fire")


def test_test_as_json(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text(GOOD)
    tests = tmp_path / "t.tests.yaml"
    tests.write_text(TESTS)
    status, (told,) = told_as_json(capsys, "test", "--json", tests)
    assert (status, told["tests"], told["passed"]) == (1, 2, 1)
    (failure,) = told["failures"]
    assert (failure["test"], failure["step"]) == ("fails", 2)
    assert failure["line"] == TESTS.splitlines().index("  - name: fails") + 3
    status, (told,) = told_as_json(capsys, "test", "--json", tmp_path / "none.yaml")
    assert status == 2
    assert str(tmp_path / "none.yaml") in told["mistakes"][0]


def test_resend_as_json(tmp_path, capsys):
    torn = tmp_path / "torn.metrics.otlp"
    torn.write_bytes(b"\x00")
    status = esper_otel.main(["resend", "--json", str(torn), str(tmp_path / "empty")])
    (told, other) = map(json.loads, capsys.readouterr().out.splitlines())
    assert status == 1
    assert told["file"] == str(torn)
    assert other["problem"]
    assert {"delivered", "rejected", "kept", "cut_bytes", "problem"} <= {*told}


SECOND = 1_000_000_000
AT = 1_700_000_000 * SECOND


def decided(step, severity, rule, run="mine"):
    return Decided(
        time_unix_nano=AT + step * SECOND,
        id=f"{run}/0/{step}",
        run=run,
        rank=0,
        instance="i",
        step=step,
        observed_step=step,
        action="PAUSE",
        severity=severity,
        reason=rule,
        target_seed=None,
        seed_operation=None,
        parameters={},
        conservative=False,
        table_version="t",
        mode="advise",
        asked=True,
        decided_unix_nano=AT,
        took_ms=0.1,
        proposal=None,
        findings=[Found(rule=rule, action="PAUSE", severity=severity, text="", values={})],
        silenced=[],
    )


def changed(step, before, after, rule="spike"):
    return Changed(
        time_unix_nano=AT + step * SECOND,
        run="mine",
        rank=0,
        step=step,
        rule=rule,
        severity=Severity.HIGH,
        seed_id=None,
        before=before,
        after=after,
        since_step=0,
        values={},
        silenced_by="",
    )


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "journal"
    written = Journal(folder, 1_000_000, 2)
    written.append(
        [
            Opened(time_unix_nano=AT, pid=1, release="1"),
            TableInUse(time_unix_nano=AT, version="t", rules=[]),
            changed(1, RuleState.UNKNOWN, RuleState.INACTIVE),
            changed(2, RuleState.INACTIVE, RuleState.FIRING),
            decided(3, Severity.HIGH, "spike"),
            decided(4, Severity.WARNING, "drift"),
            decided(5, Severity.CRITICAL, "nan", run="other"),
        ]
    )
    written.close()
    return folder


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("", ["2", "3", "4", "5"]),
        ("--all", ["1", "2", "3", "4", "5"]),
        ("--json", ["1", "2", "3", "4", "5"]),
        ("--rule spike", ["2", "3"]),
        ("--rule spike --all", ["1", "2", "3"]),
        ("--severity high", ["2", "3", "5"]),
        ("--severity CRITICAL", ["5"]),
        ("--severity HIGH --run mine", ["2", "3"]),
        ("--since 2023-11-14T22:13:24Z", ["4", "5"]),
        ("--since 2023-11-14T22:13:24", ["4", "5"]),
        ("--since 1m", []),
        ("--since 100000w --rule drift", ["4"]),
    ],
)
def test_the_journal_shows_what_is_asked_for(journal, options, steps, capsys):
    assert tamiyo.main(["journal", "--journal", str(journal), *options.split()]) == 0
    shown = capsys.readouterr().out.splitlines()
    if "--json" in options:
        entries = map(json.loads, shown)
        assert [str(entry["step"]) for entry in entries if "step" in entry] == steps
        return
    lines = [line for line in shown if "mine/0/" in line or "other/0/" in line]
    assert [line.partition("/0/")[2].split()[0] for line in lines] == steps


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.44, "0.4 s"),
        (90, "90 s"),
        (150, "2 min"),
        (3 * 3600 + 61, "3 h 1 min"),
        (50 * 3600, "2 d 2 h"),
        (3599.9, "1 h 0 min"),
    ],
)
def test_durations_as_people_say_them(seconds, shown):
    assert _duration(seconds) == shown


def test_modules_run_as_the_programs_do():
    for module, program in (("esper_otel", "esper-otel"), ("esper_tamiyo.cli", "tamiyo")):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{program} {__version__}\n"
