"""The shared language: metrics, stages, decisions, frames, wire. Imports nothing of ours."""
