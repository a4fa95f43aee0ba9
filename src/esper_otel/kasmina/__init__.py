"""Kasmina: small networks that grow inside a host model. Needs torch."""

from esper_otel.kasmina.blueprints import Blueprint, blueprint, registered
from esper_otel.kasmina.garden import Garden, GardenError

__all__ = ["Blueprint", "Garden", "GardenError", "blueprint", "registered"]
