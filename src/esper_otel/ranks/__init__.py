"""Ranks: synchronised decisions of the processes of one run, applied at the same step."""
