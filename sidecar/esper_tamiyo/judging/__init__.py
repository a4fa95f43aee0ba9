"""Frames in, decisions out: rules, their state, the engine. No I/O and no clock."""
