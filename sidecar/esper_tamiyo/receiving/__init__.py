"""The receiver process (ingest): OTLP in, step records out through a pipe."""
