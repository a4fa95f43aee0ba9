"""The alert rules of Prometheus, made from Tamiyo's table.

Tamiyo judges every step and acts. These rules are for people, and for when there is no
Tamiyo: they look at the last minute, and say what a rule of the table says as far as PromQL
can.
"""
