"""Benchmarks: programs that print a figure beside its baseline, measured in the same run."""
