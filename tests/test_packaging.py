"""What is built from the repository is whole: the wheel, and the wheel made of the sdist."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "esper_otel": ROOT / "src" / "esper_otel",
    "esper_tamiyo": ROOT / "sidecar" / "esper_tamiyo",
}

LOOKS = """
import json, sys
from importlib import metadata
import esper_otel, esper_tamiyo
from esper_otel.report import live_page
from esper_tamiyo.language.table_file import load
mine = metadata.distribution("esper-otel")
scripts = [each.name for each in mine.entry_points if each.group == "console_scripts"]
print(json.dumps({
    "from": [esper_otel.__file__, esper_tamiyo.__file__],
    "version": mine.version,
    "scripts": sorted(scripts),
    "rules": len(load("default").rules),
}))
"""


def built(kind, source, into):
    """What ``hatchling`` makes of ``source``: the path of the file."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel of the repository, and the one of its sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    sdist = built("sdist", ROOT, folder / "sdist")
    subprocess.run(["tar", "xzf", str(sdist), "-C", str(folder)], check=True)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return built("wheel", ROOT, folder / "direct"), built("wheel", unpacked, folder / "again")


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def kept(folder):
    return {
        str(path.relative_to(folder.parent))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_holds_all_files_of_both_packages_and_none_besides(wheels):
    direct, again = wheels
    assert names(direct) == kept(PACKAGES["esper_otel"]) | kept(PACKAGES["esper_tamiyo"])
    assert names(again) == names(direct)


def test_a_wheel_that_is_installed_works_without_the_repository(wheels, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path),
            str(wheels[1]),
        ],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOKS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["from"] == [str(tmp_path / name / "__init__.py") for name in PACKAGES]
    assert told["version"] == metadata.version("esper-otel")
    assert told["scripts"] == ["esper-otel", "tamiyo"]
    assert told["rules"] > 20


def test_the_metadata_says_who_what_and_for_which_python(wheels):
    with zipfile.ZipFile(wheels[0]) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    head = text.partition("\n\n")[0]
    assert "Requires-Python: >=3.11" in head
    assert "Author: " in head
    for version in ("3.11", "3.12", "3.13", "3.14"):
        assert f"Classifier: Programming Language :: Python :: {version}" in head


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = ("demo", "dev", "docs", "test", "export", "top", "zstd")
"""Extras that `make` installs, and those that it takes along."""


def pins(python):
    """Name → version of constraints.txt, for a Python on this kind of machine."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            (version,) = pin.specifier
            assert (version.operator, pin.extras, pin.url) == ("==", set(), None), line
            marker = {"python_version": python, "python_full_version": f"{python}.0"}
            if pin.marker is None or pin.marker.evaluate(marker):
                assert pin.name not in found, line
                found[pin.name] = version.version
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_version_that_is_installed_is_written_down_and_one_that_fits(python):
    pinned = pins(python)
    wanted = [
        requirement
        for each in (*PROJECT["dependencies"], *(e for name in INSTALLED for e in EXTRAS[name]))
        if (requirement := Requirement(each)).name != PROJECT["name"]
    ]
    for requirement in wanted:
        assert pinned[requirement.name.lower()] in requirement.specifier, requirement


def test_what_is_written_down_names_no_host():
    assert "://" not in (ROOT / "constraints.txt").read_text()
