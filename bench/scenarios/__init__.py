"""Labelled scenarios from real trainings: what went wrong, when, and what answers it.

Recorded once with :mod:`~bench.scenarios.recorder`, replayed through the engine by
:mod:`~bench.scenarios.scoring`; ``python -m bench.scenarios`` does both. How they are made
and counted is told in ``docs/scenarios.md``.
"""
