"""The stream: frames to OTLP, off the training thread."""
