"""Tamiyo: the sidecar that reads a run's metrics and decides. Runs alone, without torch."""

from __future__ import annotations

__all__ = ["release"]

DISTRIBUTION = "esper-otel"


def release() -> str:
    """The version of the installed package, "" where it runs without having been installed.

    Asked of the installation, as the sidecar imports no trainer.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return ""
