"""The tables that come with the package are read once by a process and its forks.

Reading the default table takes a twentieth of a second of a processor, and hundreds of tests
and sidecars begin with it. Importing this is what keeps it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from esper_tamiyo.language import table_file
from esper_tamiyo.language.table_file import SHIPPED, Located, TableSource

_locate = table_file.locate
_locate_once = cache(_locate)


def locate(source: TableSource, warn: bool = True) -> Located:
    """As that of ``table_file``."""
    is_shipped = Path(source.name).parent == SHIPPED
    return (_locate_once if is_shipped else _locate)(source, warn)


table_file.locate = locate
table_file.load("default")
