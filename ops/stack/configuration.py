"""Holding a Collector's configuration against the Collector itself."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 30


def complaint(
    collector: Path, configs: Sequence[Path], environment: Mapping[str, str]
) -> str | None:
    """What the Collector finds wrong with ``configs``, in one line; None when nothing is.

    Its own words come in several lines, the cause in the last.
    """
    command = [str(collector), "validate"]
    for config in configs:
        command += ["--config", str(config)]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode == 0:
        return None
    lines = (line.strip() for line in done.stderr.splitlines())
    words = " ".join(line for line in lines if line).removeprefix("Error: ")
    return f"{', '.join(str(config) for config in configs)}: {words}"
