"""Trainer and sidecar meet at one place, whatever the environment holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from esper_otel.leyline.folders import (
    check_socket_path,
    default_socket_path,
    state_folder,
    temporary_folder,
)

OWN = f"esper-{os.getuid()}"


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("ESPER_TAMIYO_SOCKET", raising=False)


LONG = "/scratch/" + "x" * 100


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/esper/tamiyo.sock"),
        ({}, "TMP/OWN/tamiyo.sock"),
        ({"XDG_RUNTIME_DIR": ""}, "TMP/OWN/tamiyo.sock"),
        ({"XDG_RUNTIME_DIR": "run"}, "TMP/OWN/tamiyo.sock"),
        ({"XDG_RUNTIME_DIR": LONG}, "TMP/OWN/tamiyo.sock"),
        (
            {"XDG_RUNTIME_DIR": "/run", "ESPER_TAMIYO_SOCKET": " /run/mine.sock "},
            "/run/mine.sock",
        ),
    ],
)
def test_where_the_socket_is(environ: dict[str, str], path: str, tmp_path: Path) -> None:
    wanted = path.replace("TMP", str(tmp_path)).replace("OWN", OWN)
    assert default_socket_path(environ) == Path(wanted)


def test_below_a_long_temporary_folder_no_socket_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", LONG)
    for environ in ({}, {"XDG_RUNTIME_DIR": LONG}):
        path = default_socket_path(environ)
        assert path == Path("/tmp", OWN, "tamiyo.sock")
        check_socket_path(path)


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_a_path_must_fit_the_systems_address(length: int, fits: bool) -> None:
    path = Path("/" + "é" * ((length - 1) // 2) + "x" * ((length - 1) % 2))
    if fits:
        check_socket_path(path)
    else:
        with pytest.raises(ValueError, match="may have 107 bytes, this has 108"):
            check_socket_path(path)


def test_a_home_that_cannot_be_written_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/dev/null/nobody")
    assert state_folder({}) == tmp_path / OWN
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder({}) == tmp_path / "home" / ".local" / "state"
    assert state_folder({"XDG_STATE_HOME": "/state"}) == Path("/state")


def test_there_is_a_temporary_folder_where_none_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert temporary_folder() == Path("/tmp")
