"""The scribe process: journal, field reports, Tamiyo's own telemetry and health."""
