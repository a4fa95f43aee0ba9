"""The journal writer (scribe): journal, outcome reports, Tamiyo's own telemetry and health."""
