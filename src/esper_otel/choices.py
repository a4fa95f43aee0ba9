"""Choices: what a setting can be that is one of a few words."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """What happens to Tamiyo's decisions."""

    OFF = "off"
    """Nobody is asked."""

    ADVISE = "advise"
    """Decisions are recorded and reported, never applied."""

    ENFORCE = "enforce"
    """Decisions are applied to the run."""


class Growth(StrEnum):
    """Who lets a seed take its next step."""

    ASKED = "asked"
    """Tamiyo: an operation needs a SEED decision that is enforced."""

    AUTONOMOUS = "autonomous"
    """The garden itself, unless an enforced decision says otherwise."""


class Blending(StrEnum):
    """How a seed's output comes into the host's."""

    CONVEX = "convex"
    RESIDUAL = "residual"
    CHANNELWISE = "channelwise"
    CONFIDENCE = "confidence"


class Schedule(StrEnum):
    """How alpha goes from 0 to 1."""

    SIGMOID = "sigmoid"
    COSINE = "cosine"
    LINEAR = "linear"


class Fossils(StrEnum):
    """What trains a seed that has become part of the network."""

    JOIN = "join"
    """The host's optimizer."""

    STAY = "stay"
    """The seed's own."""


class Summaries(StrEnum):
    """What is told on standard error when a run is over."""

    TEXT = "text"
    """A few lines for a person."""

    JSON = "json"
    """One line for a machine."""

    OFF = "off"
    """Nothing."""
