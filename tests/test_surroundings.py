"""What surrounds the code: workflows, hooks, changelog, citation, policy say what is so."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from esper_otel._version import __version__
from ops import release

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yaml")
}


def commands(workflow):
    """Every line that a workflow runs."""
    steps = [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]
    return "\n".join(step["run"] for step in steps if "run" in step)


def test_the_gate_runs_on_every_python_that_is_said_to_be_supported():
    classifiers = "\n".join(PROJECT["classifiers"])
    supported = re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert WORKFLOWS["gate"]["jobs"]["gate"]["strategy"]["matrix"]["python"] == supported
    assert ".ci/run" in commands("gate")


def test_a_release_is_built_checked_and_only_then_published():
    jobs = WORKFLOWS["release"]["jobs"]
    assert set(jobs["publish"]["needs"]) == {"build", "gate"}
    for told in ("python -m build", "twine check --strict", "ops.release", ".ci/run"):
        assert told in commands("release")


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_calls_targets_and_modules_that_are_there(workflow):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"\bmake ([a-z-]+)", commands(workflow))} <= {*targets}
    for module in re.findall(r"python -m (ops\.\w+)", commands(workflow)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert WORKFLOWS[workflow]["permissions"] == {"contents": "read"}


def test_hooks_run_what_the_lint_target_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    rules = (ROOT / "Makefile").read_text().split("\n\n")
    lint = "".join(rule for rule in rules if rule.startswith("lint"))
    lint = lint.replace(" --quiet --builtin-schema", "")
    for hook in hooks:
        tool, *words = hook["entry"].removeprefix(".venv/bin/").split()
        line = f"$(BIN)/{tool} {' '.join(word for word in words if word[:2] != '--')}".strip()
        assert line in lint, hook["id"]


def test_the_changelog_has_its_form():
    text = release.CHANGELOG.read_text()
    assert [*release.faults_of(text)] == []
    assert text.count("## [Unreleased]") == 1


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("## [Unreleased]\n### Added\n## [0.1.0] - 2026-01-31\n### Fixed\n", 0),
        ("## Unreleased\n", 1),
        ("## [0.1.0]\n", 1),
        ("## [0.1.0] - January\n### News\n", 2),
    ],
)
def test_what_is_not_of_the_form_is_named(text, faults):
    assert len([*release.faults_of(text)]) == faults


@pytest.mark.parametrize(
    ("tag", "changelog", "told"),
    [
        (f"v{__version__}", f"## [{__version__}] - 2026-01-31\n", ""),
        (f"v{__version__}", "## [Unreleased]\n", "expected a heading"),
        ("v9.9.9", f"## [{__version__}] - 2026-01-31\n", f"expected v{__version__}"),
    ],
)
def test_a_tag_is_released_when_version_and_changelog_agree(
    tag, changelog, told, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "CHANGELOG.md"
    path.write_text(changelog)
    monkeypatch.setattr(release, "CHANGELOG", path)
    monkeypatch.setattr("sys.argv", ["release", tag])
    assert release.main() == (1 if told else 0)
    assert told in capsys.readouterr().err


def test_the_citation_says_what_the_package_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ == PROJECT["version"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["title"].endswith(PROJECT["description"])


def test_the_security_policy_leads_to_what_is_defended():
    policy = (ROOT / "SECURITY.md").read_text()
    for page in re.findall(r"\]\(([\w/.]+)\)", policy):
        assert (ROOT / page).exists()
    assert "docs/security.md" in policy


WITHOUT_ENSUREPIP = """#!/bin/sh
case "$2" in
venv)
  mkdir -p .venv/bin; cp "$0" .venv/bin/python
  test -e ensurepip && cp "$0" .venv/bin/pip ;;
pip) test -e .venv/bin/pip ;;
esac
"""
"""Stands in for Debian's Python, which makes half an environment without python3-venv."""


def test_make_finishes_the_half_environment_of_a_python_without_venv(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3"
    python.write_text(WITHOUT_ENSUREPIP)
    python.chmod(0o755)
    command = ["make", ".venv/.ready", f"PYTHON={python}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 2
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    (tmp_path / "ensurepip").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
