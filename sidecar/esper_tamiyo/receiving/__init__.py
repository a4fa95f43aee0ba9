"""The ingest process: OTLP in, step frames out through a pipe."""
