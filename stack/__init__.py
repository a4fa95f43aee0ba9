"""The whole stack on one machine, from binaries: Collector, Prometheus, Jaeger and Tamiyo.

``python -m stack up`` runs it, ``python -m stack build`` gets the binaries. Nothing here
is part of the package that is installed: it serves the repository, its tests and benches.
"""
