"""Settings that identify a run: its id, name, tags, and where it is recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from esper_otel.leyline.metrics import RUN_NAME, RUN_TAG

MOST_TAGS = 32
LONGEST = 256
"""Characters of a run's name, and of the value of a tag."""

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,63}")


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the settings that is about a run as a whole."""

    run_id: str = ""
    """Id of the run; empty: generated from the time and random bytes, the same on all ranks
    that torchrun started."""

    name: str = ""
    """Name of the run for people. Several runs may share a name."""

    tags: str = ""
    """Tags that distinguish runs, such as `team=vision,data=v2`; a comma, an equals sign or a
    percent sign within a value is percent-encoded. In Python also a dictionary."""

    arguments: bool = True
    """Whether to record the script's arguments as hyper-parameters. Arguments whose name or
    form indicates a secret are always excluded."""

    record: bool = False
    """Whether to record the run to the runs home, where `esper-otel runs` finds it."""

    runs_dir: str = ""
    """The home of recorded runs; empty: ``$XDG_DATA_HOME/esper/runs``."""

    recording_dir: str = ""
    """Directory for files with all OTLP of the run, instead of the runs home."""

    @property
    def runs_path(self) -> Path:
        """The home of recorded runs."""
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(self.runs_dir or Path(data, "esper", "runs"))

    @property
    def labels(self) -> dict[str, str]:
        """The resource attributes that name and tags become."""
        named = {RUN_NAME: self.name} if self.name else {}
        tags = parse_tags(self.tags).items()
        return {**named, **{f"{RUN_TAG}{key}": value for key, value in tags}}


def parse_tags(text: str) -> dict[str, str]:
    """The tags in ``text``; raises ``ValueError`` with the problem and the expected form."""
    found = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        key, separator, value = part.partition("=")
        key, value = unquote(key.strip()), unquote(value.strip())
        if not separator or not _KEY.fullmatch(key):
            raise ValueError(
                "expected tags like team=vision, whose names have up to 64 letters, digits "
                "and any of _ . - /"
            )
        if len(value) > LONGEST or not value.isprintable():
            raise ValueError(f"tag {key}: expected at most {LONGEST} printable characters")
        found[key] = value
    if len(found) > MOST_TAGS:
        raise ValueError(f"expected at most {MOST_TAGS} tags, got {len(found)}")
    return found


def format_tags(tags: Mapping[str, object]) -> str:
    """The text from which :func:`parse_tags` makes ``tags``."""
    return ",".join(f"{quote(str(k), '/')}={quote(str(v), ' /:')}" for k, v in tags.items())


def faults_of(settings: RunSettings) -> dict[str, str]:
    """The faults of name and tags, by setting."""
    found = {}
    if len(settings.name) > LONGEST or not settings.name.isprintable():
        found["name"] = f"expected at most {LONGEST} printable characters"
    try:
        parse_tags(settings.tags)
    except ValueError as error:
        found["tags"] = str(error)
    return found
