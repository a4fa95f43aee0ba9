"""Folders: shared locations of trainer and sidecar, in any environment.

In the order of the XDG Base Directory Specification, which has paths that are not absolute
ignored. A user may have no home and no name (containers with a number for a user), a temporary
folder may be missing, and its name may be too long for a socket: then the next place is taken.
Trainer and sidecar come to the same place by the same rules.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

MAX_SOCKET_PATH = 107
"""Longest path that fits ``sun_path`` on Linux, in bytes (108 with its final NUL)."""

SOCKET_VARIABLE = "ESPER_TAMIYO_SOCKET"
"""Names the decision socket, to trainers and to every ``tamiyo`` command."""


def default_socket_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the sidecar of this user listens when nobody says where.

    ``$ESPER_TAMIYO_SOCKET``, else ``$XDG_RUNTIME_DIR/esper/tamiyo.sock``, else
    ``esper-UID/tamiyo.sock`` below the temporary folder; where one of the latter is too long
    for a socket's name, the next is taken, and in the end ``/tmp/esper-UID/tamiyo.sock``.
    """
    environ = os.environ if environ is None else environ
    return named_socket(environ) or usual_socket_path(environ)


def named_socket(environ: Mapping[str, str] | None = None) -> Path | None:
    """The decision socket that the environment names, None where it does not."""
    environ = os.environ if environ is None else environ
    named = environ.get(SOCKET_VARIABLE, "").strip()
    return Path(named) if named else None


def usual_socket_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the decision socket is when neither an option nor a variable names it."""
    environ = os.environ if environ is None else environ
    own = Path(f"esper-{os.getuid()}", "tamiyo.sock")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    wanted = [Path(runtime, "esper", "tamiyo.sock")] if os.path.isabs(runtime) else []  # noqa: PTH117
    wanted += [temporary_folder() / own, Path("/tmp") / own]
    return next((path for path in wanted if not _excess(path)), wanted[-1])


def check_socket_path(path: Path) -> None:
    """Raise ``ValueError`` when the system cannot take ``path`` as a socket's name."""
    if b"\0" in os.fsencode(path):
        raise ValueError(f"{path}: a path has no NUL")
    if _excess(path):
        raise ValueError(
            f"{path}: a Unix socket's path may have {MAX_SOCKET_PATH} bytes, this has "
            f"{len(os.fsencode(path))}"
        )


def state_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where files of ours outlive the process: ``$XDG_STATE_HOME``, else ``~/.local/state``.

    Of a user who has neither, or may not write there, ``esper-UID`` below the temporary folder.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(named):  # noqa: PTH117
        return Path(named)
    try:
        home = Path.home() / ".local" / "state"
        if home.is_absolute() and _may_be_made(home):
            return home
    except (RuntimeError, OSError):  # no home, or one that cannot be looked at
        pass
    return temporary_folder() / f"esper-{os.getuid()}"


def temporary_folder() -> Path:
    """The temporary folder of the environment; ``/tmp`` where none can be written."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return Path("/tmp")


def _excess(path: Path) -> bool:
    return len(os.fsencode(path)) > MAX_SOCKET_PATH


def _may_be_made(folder: Path) -> bool:
    """Whether ``folder`` is there for us, or can be."""
    for place in (folder, *folder.parents):
        if place.exists():
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False
