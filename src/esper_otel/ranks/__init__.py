"""Ranks: what the processes of one run agree on, so that all do the same at the same step."""
