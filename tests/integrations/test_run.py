"""``esper-otel run`` is ``python``: the same script under both, compared."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import esper_otel
from testkit.patience import PATIENCE_S

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
CLEAN["ESPER_SUMMARY"] = "off"
ESPER = [str(Path(sys.executable).parent / "esper-otel")]


def run(command, *, cwd, env=CLEAN, **options):
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S, **options
    )


def both(arguments, *, cwd, env=CLEAN, **options):
    bare = run([sys.executable, *arguments], cwd=cwd, env=env, **options)
    ours = run([*ESPER, "run", *arguments], cwd=cwd, env=env, **options)
    return bare, ours


@pytest.fixture
def script(tmp_path):
    def write(source, name="train.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    return write


SAME = {
    "arguments": "import sys; print(sys.argv)",
    "main": "print(__name__, __file__, __spec__, __builtins__)",
    "path": "import sys; print(sys.path[0], sys.path[1:] , 'autoload' in str(sys.path))",
    "pickled main": """
        import multiprocessing, os
        def work(x): return x * x
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [1, 2, 3]))
        """,
    "environment": """
        import os
        print({k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "ESPER"))})
        """,
    "child": """
        import subprocess, sys
        code = "import sys; print('esper_otel' in sys.modules, sys.path)"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
        """,
    "stdin": "import sys; print(sys.stdin.read())",
    "exit status": "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)",
    "exit message": "raise SystemExit('no data')",
    "traceback": "def f():\n    raise KeyError('x')\nf()",
    "syntax error": "x = (",
    "os._exit": "import os; os._exit(5)",
    "atexit": "import atexit; atexit.register(print, 'bye')",
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_it_behaves_like_python(script, tmp_path, source):
    path = script(source)
    bare, ours = both([path.name, "--lr", "0.1", "-m", "x"], cwd=tmp_path, input="line\n")
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        bare.returncode,
        bare.stdout,
        bare.stderr,
    )


def test_a_module_and_a_pythonpath_work_as_ever(script, tmp_path):
    script("import sys, helper; print(__name__, sys.argv[1:], helper.x)", "package/train.py")
    script("x = 3", "elsewhere/helper.py")
    env = CLEAN | {"PYTHONPATH": str(tmp_path / "elsewhere")}
    bare, ours = both(["-m", "package.train", "a"], cwd=tmp_path, env=env)
    assert bare.stdout == "__main__ ['a'] 3\n"
    assert ours.stdout == bare.stdout


def test_a_sitecustomize_of_the_users_own_still_runs(script, tmp_path):
    script("import sys; sys.seen = [*getattr(sys, 'seen', []), 1]", "site/sitecustomize.py")
    script("import sitecustomize, sys; print(sitecustomize.__file__, sys.seen)")
    env = CLEAN | {"PYTHONPATH": str(tmp_path / "site")}
    bare, ours = both(["train.py"], cwd=tmp_path, env=env)
    assert "site/sitecustomize.py [1]" in bare.stdout
    assert ours.stdout == bare.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_end_it_as_they_end_python(script, tmp_path, number):
    # One line, without carets below it: wherever in it the signal comes, its traceback is
    # the same.
    path = script("import time\nwhile True: print('up', flush=True) or time.sleep(0.01)")
    env = CLEAN | {"PYTHONNODEBUGRANGES": "1"}
    seen = []
    for command in ([sys.executable], [*ESPER, "run"]):
        with subprocess.Popen(
            [*command, str(path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout.readline() == "up\n"
                process.send_signal(number)
                _, errors = process.communicate(timeout=PATIENCE_S)
            finally:
                process.kill()
        seen.append((process.returncode, errors))
    assert seen[0] == seen[1]


def test_a_script_that_never_imports_torch_does_not_pay_for_it(script, tmp_path):
    script("import sys; print({'torch', 'numpy', 'grpc'} & set(sys.modules))")
    assert run([*ESPER, "run", "train.py"], cwd=tmp_path).stdout == "set()\n"


MISTAKES = {
    "no script": (["run"], "expected a script"),
    "missing script": (["run", "nope.py"], "run: nope.py: no such file"),
    "no option": (["run", "-Z", "x.py"], "unrecognized arguments: -Z"),
    "option without a script": (["run", "-u"], "expected a script"),
    "option for a shell": (["run", "-u", "sh", "-c", "true"], "sh: not a Python, so -u"),
    "missing Python": (["run", "python9.9", "x.py"], "python9.9: no such program"),
    "isolated": (["run", "-I", "x.py"], "call esper_otel.start(optimizer) in the script"),
    "without site": (["run", "-uS", "x.py"], "-S makes Python start without its site module"),
    "bad socket": (["run", "--socket", "/" + "x" * 107, "-c", "1"], "may have 107 bytes"),
    "missing launcher": (["run", "nowhere/torchrun"], "run: nowhere/torchrun: no such file"),
    "module without name": (["run", "-m"], "expected a script"),
    "conflict": (["run", "--enforce", "--mode", "off", "x.py"], "exclude each other"),
    "unknown command": (["rum"], "invalid choice: 'rum'"),
    "bad mode": (["run", "--mode", "force", "x.py"], "invalid choice: 'force'"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_call_is_told_in_words(tmp_path, arguments, message):
    done = run([*ESPER, *arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_variable_that_does_not_fit_or_is_no_setting_is_told_of_once(script, tmp_path):
    script("print('ran')")
    env = CLEAN | {"ESPER_TAMIYO_DEADLINE_MS": "soon", "ESPER_SPAM": "1"}
    done = run([*ESPER, "run", "train.py"], cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.splitlines() == [
        "esper-otel: ESPER_TAMIYO_DEADLINE_MS='soon': expected a number; 5.0 is used",
        "esper-otel: ESPER_SPAM is set, but esper-otel has no such setting",
    ]


def test_a_sitecustomize_that_raises_says_so_as_ever_and_ends_nothing(script, tmp_path):
    script("raise KeyError('mine')", "site/sitecustomize.py")
    script("import sys; print('esper_otel.integrations.torch' in sys.modules)")
    env = CLEAN | {"PYTHONPATH": str(tmp_path / "site")}
    bare, ours = both(["train.py"], cwd=tmp_path, env=env)
    assert (bare.stdout, ours.stdout) == ("False\n", "True\n")
    assert "KeyError: 'mine'" in bare.stderr
    assert ours.stderr == bare.stderr * 2  # of the command, and of what takes its place


@pytest.mark.parametrize("own", [True, False], ids=["before", "behind a folder of a script"])
def test_a_python_that_has_no_esper_otel_says_so_and_runs_the_script(script, tmp_path, own):
    # As in another environment: a package of the name, with nothing in it.
    script("", "other/esper_otel/__init__.py")
    script("import os, sys; print(os.environ['PYTHONPATH'], 'sitecustomize' in sys.modules)")
    autoload = Path(esper_otel.__file__).parent / "integrations" / "autoload"
    folder = str(tmp_path / "other")
    if own:
        env = CLEAN | {"PYTHONPATH": folder}
        ours = env | {
            "PYTHONPATH": f"{autoload}{os.pathsep}{folder}",
            "ESPER_CHAINED_PYTHONPATH": folder,
        }
    else:
        env = CLEAN | {"PYTHONPATH": folder + os.pathsep}
        ours = env | {"PYTHONPATH": f"{folder}{os.pathsep}{autoload}"}
    bare = run([sys.executable, "train.py"], cwd=tmp_path, env=env)
    done = run([sys.executable, "train.py"], cwd=tmp_path, env=ours)
    assert (done.returncode, done.stdout) == (0, bare.stdout)
    assert done.stderr.startswith("esper-otel: nothing is recorded: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("pass", "the script has not imported torch; "),
        ("import sys; sys.exit(3)", ""),
        ("raise KeyError(1)", ""),
    ],
    ids=["well", "by a status", "by an error"],
)
def test_a_script_that_trains_nothing_says_so_unless_it_fails(script, tmp_path, source, told):
    script(source)
    env = {k: v for k, v in CLEAN.items() if k != "ESPER_SUMMARY"}
    done = run([*ESPER, "run", "train.py"], cwd=tmp_path, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("esper-otel:")]
    assert len(lines) == bool(told)
    assert told in "".join(lines)
    if told:
        as_json = run([*ESPER, "run", "--json", "train.py"], cwd=tmp_path, env=env)
        assert json.loads(as_json.stderr)["steps"] == 0


def test_what_is_closed_stays_closed_and_is_not_written_to(script, tmp_path):
    script("""
        import os, sys, tempfile
        print(sys.stderr, flush=True)
        file = tempfile.TemporaryFile()
        assert file.fileno() > 2
        code = "import os; os.fstat(2)"
        print(os.spawnl(os.P_WAIT, sys.executable, "python", "-c", code))
    """)
    shell = f"{ESPER[0]} run --mode off train.py 2>&-"
    env = {k: v for k, v in CLEAN.items() if k != "ESPER_SUMMARY"} | {"ESPER_SPAM": "1"}
    done = run(["sh", "-c", shell], cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (0, "None\n1\n")
