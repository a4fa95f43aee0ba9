"""OpenTelemetry for neural-network training, with a sidecar that decides."""

__version__ = "0.1.0"
