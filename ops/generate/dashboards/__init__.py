"""The Grafana dashboards, as code.

Panels are made from the registry and from Tamiyo's table of its own metrics, so names, units
and stages cannot part from what is sent.
"""
