"""Tamiyo: the sidecar that reads a run's metrics and decides. Runs alone, without torch."""
