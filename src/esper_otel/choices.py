"""Choices: settings that accept one of a few words."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """Treatment of Tamiyo's decisions."""

    OFF = "off"
    """No decision requests are sent."""

    ADVISE = "advise"
    """Decisions are recorded and reported, never applied."""

    ENFORCE = "enforce"
    """Decisions are applied to the run."""


class Growth(StrEnum):
    """Who grants a seed its next operation."""

    ASKED = "asked"
    """Tamiyo: an operation needs a SEED decision that is enforced."""

    AUTONOMOUS = "autonomous"
    """The garden itself, unless an enforced decision says otherwise."""


class Blending(StrEnum):
    """How a seed's output joins the host's."""

    CONVEX = "convex"
    RESIDUAL = "residual"
    CHANNELWISE = "channelwise"
    CONFIDENCE = "confidence"


class Schedule(StrEnum):
    """How alpha rises from 0 to 1."""

    SIGMOID = "sigmoid"
    COSINE = "cosine"
    LINEAR = "linear"


class Fossils(StrEnum):
    """The optimizer of a seed that has become part of the network."""

    JOIN = "join"
    """The host's optimizer."""

    STAY = "stay"
    """The seed's own."""


class Summaries(StrEnum):
    """The summary on standard error at the end of a run."""

    TEXT = "text"
    """A few lines for a person."""

    JSON = "json"
    """One line for a machine."""

    OFF = "off"
    """Nothing."""
