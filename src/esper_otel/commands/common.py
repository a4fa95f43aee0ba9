"""What several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Protocol

from esper_otel.leyline.terminal import say

if TYPE_CHECKING:
    from collections.abc import Callable


class Subcommands(Protocol):
    """Where a command is added: what ``add_subparsers`` gives."""

    add_parser: Callable[..., argparse.ArgumentParser]


def refuse(message: str) -> int:
    """Say what is wrong with a call; returns the exit status for that, 2."""
    say(f"esper-otel: {message}", file=sys.stderr)
    return 2
