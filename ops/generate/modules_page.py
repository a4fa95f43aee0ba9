"""The page of modules: what each owns, from the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

from ops.generate.files import COMMAND, ROOT

PAGE = Path("docs/modules.md")

PACKAGES = (
    (
        ROOT / "src" / "esper_otel",
        "In the training process; it shares `leyline` with the sidecar.",
    ),
    (ROOT / "sidecar" / "esper_tamiyo", "The sidecar, which never imports torch."),
)


def files() -> dict[Path, str]:
    """The page, by its place in the repository."""
    parts = [
        f"<!-- Made by {COMMAND} from the modules' docstrings; edits here are lost. -->",
        "# Modules",
        "[ARCHITECTURE.md](../ARCHITECTURE.md) explains how they work together.",
    ]
    for top, what in PACKAGES:
        parts += [f"## {top.name}", what]
        for folder in (top, *sorted(path for path in top.iterdir() if _is_package(path))):
            rows = [
                f"| `{path.stem}` | {_owns(path)} |" for path in sorted(folder.glob("*.py"))
            ]
            title = folder.name if folder != top else "at the top"
            parts += [f"### {title}", "\n".join(["| module | owns |", "| --- | --- |", *rows])]
    return {PAGE: "\n\n".join(parts) + "\n"}


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").exists()


def _owns(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n", 1)[0].split()).replace("|", "\\|")
