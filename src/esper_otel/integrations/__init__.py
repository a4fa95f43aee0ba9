"""Instrumentation of training scripts and frameworks that do not import esper-otel."""
