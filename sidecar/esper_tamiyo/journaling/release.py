"""Which release this is, asked of the installation: the sidecar imports no trainer."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "esper-otel"


def release() -> str:
    """The version, "" where the package runs without having been installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return ""
