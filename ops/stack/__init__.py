"""The whole stack on one machine, from binaries: Collector, Prometheus, Jaeger and Tamiyo.

``python -m ops.stack up`` runs it, ``python -m ops.stack build`` gets the binaries. It serves
the repository, its tests and benches.
"""
