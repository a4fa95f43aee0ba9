"""Tolaria: the events and values of the current step."""
