"""The workflows, as far as they can be checked without running them.

The JSON schema knows each key; actionlint also the expressions, the inputs of actions, the
names of runners and the order of jobs. The commands of ours that they run are there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ops.stack.programs import ACTIONLINT, ROOT, MissingError, find

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
SCHEMA = Path(sys.executable).parent / "check-jsonschema"
SCRIPTS = [
    (path.stem, name, step["run"])
    for path in WORKFLOWS
    for name, job in yaml.safe_load(path.read_text())["jobs"].items()
    for step in job["steps"]
    if "run" in step
]
WRONG = """\
on: push
jobs:
  a:
    runs-on: ubuntu-24.04
    needs: [b]
    steps:
      - run: echo ${{ matrix.python }}
"""


def checked(*command):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_they_fit_the_schema(tmp_path):
    schema = [SCHEMA, "--builtin-schema", "vendor.github-workflows"]
    done = checked(*schema, *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(WRONG.replace("runs-on", "run-on"))
    assert checked(*schema, wrong).returncode == 1


def test_actionlint_finds_no_mistake(tmp_path):
    try:
        program = find(ACTIONLINT)
    except MissingError as error:
        pytest.skip(str(error))
    done = checked(program, "-no-color", *WORKFLOWS)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(WRONG)
    done = checked(program, "-no-color", wrong)
    assert done.returncode == 1
    assert '"b"' in done.stdout, "a job that is not there"
    assert '"python"' in done.stdout, "a value that no matrix has"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: "-".join(script[:2]))
def test_a_step_runs_commands_of_ours_that_there_are(script):
    text = script[2]
    assert checked("bash", "-n", "-c", text).returncode == 0
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for module in re.findall(r"python -m (ops[\w.]*)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    for path in re.findall(r"^\.ci/\w+", text, re.MULTILINE):
        assert os.access(ROOT / path, os.X_OK)
