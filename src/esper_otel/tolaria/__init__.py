"""Tolaria: what happened in this step."""
