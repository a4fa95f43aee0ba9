"""Builds the documentation site: ``python -m ops.site [FOLDER]``, by default ``build/site``.

Strictly: a dead link, a page that the start page does not list, or anything else that Sphinx
warns of, fails the build with the lines that say so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SITE)
    folder = parser.parse_args().folder
    status = build(folder)
    if status == 0:
        print(f"{folder / 'index.html'}")
    return status


def build(folder: Path) -> int:
    """Build into ``folder``; the exit status of Sphinx, which has told what is wrong."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    command += ["-d", str(folder.with_name(f"{folder.name}.doctrees"))]
    command += ["-c", str(ROOT / "docs"), str(ROOT), str(folder)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
