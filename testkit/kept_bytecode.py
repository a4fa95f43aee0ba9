"""The bytecode of a checkout, made by one process before several import it.

A fresh clone has none. Processes that begin together compile the same files at the same time,
and of a file of tests pytest's rewriting is most of it.
"""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

ROOT = Path(__file__).parent.parent
FOLDERS = "src", "sidecar", "testkit", "ops", "bench"


def keep_bytecode(config: pytest.Config, tests: Path) -> None:
    """Make what is not there, where pytest and Python look for it."""
    for folder in FOLDERS:
        compileall.compile_dir(ROOT / folder, quiet=2)
    state = config.stash[rewrite.assertstate_key]
    for file in sorted(tests.rglob("*.py")):
        if not file.name.startswith(("test_", "conftest.")):
            compileall.compile_file(file, quiet=2)
            continue
        cache = rewrite.get_cache_dir(file)
        kept = cache / (file.stem + rewrite.PYC_TAIL)
        if rewrite._read_pyc(file, kept) is None and rewrite.try_makedirs(cache):
            status, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(state, code, status, kept)
