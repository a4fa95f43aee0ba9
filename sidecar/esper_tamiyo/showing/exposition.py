"""Exposition: Tamiyo's own metrics and the newest values of each rank, as Prometheus scrapes.

Two formats, by what the scraper accepts: Prometheus' text format 0.0.4 and OpenMetrics 1.0.0,
which differ in the family of a counter and in the end. Names and labels are those that the
Collector's exporter gives the same metrics, so one dashboard reads both.

Formats: https://prometheus.io/docs/instrumenting/exposition_formats/ and
https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isinf, isnan
from typing import NamedTuple

from esper_otel.leyline.custom import EVALUATION, NAME, PREFIX, is_custom, is_evaluation
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import (
    BY_KEY,
    CUSTOM,
    RANK,
    RUN_ID,
    SEED_ID,
    label_name,
    prometheus_name,
    series_name,
)
from esper_tamiyo.journaling.messages import Distribution
from esper_tamiyo.journaling.own_metrics import OWN_METRICS, InstrumentKind, Report

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

MOST_SAMPLES = 50_000
"""Values of ranks and seeds in one answer; those beyond it are counted."""

LEFT_OUT = "tamiyo_ui_samples_left_out"

_ASKED = re.compile(r"application/openmetrics-text\s*(?:;[^,]*)?")
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    """One metric: its name, kind, what it is, and a line for each sample.

    A sample is (suffix, labels, value).
    """

    name: str
    kind: str
    meaning: str
    samples: list[tuple[str, Labels, float]]


def wants_openmetrics(accept: str) -> bool:
    """Whether a scraper that sends that ``Accept`` takes OpenMetrics."""
    return bool(_ASKED.search(accept))


def exposition(
    report: Report,
    distributions: Mapping[str, Distribution],
    ranks: Iterable[StepFrame],
    openmetrics: bool,
) -> bytes:
    """The answer to a scrape: the sidecar's own metrics, and of each rank its newest step."""
    families = [*own_families(report, distributions), *rank_families(ranks)]
    lines = [line for family in families for line in _lines(family, openmetrics)]
    if openmetrics:
        lines.append("# EOF")
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def own_families(report: Report, distributions: Mapping[str, Distribution]) -> Iterator[Family]:
    """Tamiyo's own metrics, as far as the report has them."""
    for metric in OWN_METRICS:
        kind = metric.kind
        name = series_name(metric.name, metric.unit, kind.value)
        if kind is InstrumentKind.HISTOGRAM:
            found = distributions.get(metric.distribution)
            if found is not None:
                yield Family(name, "histogram", metric.meaning, list(_histogram(found)))
            continue
        samples = [
            ("", tuple((label_name(key), told) for key, told in attributes.items()), value)
            for value, attributes in metric.read(report)
        ]
        if samples:
            yield Family(name, kind.value, metric.meaning, samples)


def rank_families(ranks: Iterable[StepFrame]) -> Iterator[Family]:
    """The newest values of each rank and of its seeds; of metrics of the registry alone, so
    that nobody outside can add a family. Values of a script's own are samples of one."""
    samples: dict[str, list[tuple[str, Labels, float]]] = {}
    count = left_out = 0
    seen: set[Labels] = set()  # names that only differ in what is escaped are one
    for frame in ranks:
        own: Labels = (
            (label_name(RUN_ID), _visible(frame.run)),
            (label_name(RANK), str(frame.rank)),
        )
        parts: list[tuple[Labels, dict[str, float]]] = [(own, frame.values)]
        parts += [
            ((*own, (label_name(SEED_ID), _visible(seed))), values)
            for seed, values in frame.seeds.items()
        ]
        for labels, values in parts:
            if count + len(values) > MOST_SAMPLES or labels in seen:
                left_out += len(values)
                continue
            seen.add(labels)
            count += len(values)
            for key, value in values.items():
                family, whose = key, labels
                if is_custom(key):
                    family, whose = CUSTOM.key, (*labels, *_custom_labels(key))
                    if whose in seen:
                        left_out += 1
                        continue
                    seen.add(whose)
                samples.setdefault(family, []).append(("", whose, value))
    for key, metric in {**BY_KEY, CUSTOM.key: CUSTOM}.items():
        if key in samples:
            yield Family(prometheus_name(metric), "gauge", metric.meaning, samples[key])
    yield Family(
        LEFT_OUT,
        "gauge",
        f"newest values of ranks that are not here, as there are more than {MOST_SAMPLES:,} "
        "or two of one name",
        [("", (), left_out)],
    )


def _custom_labels(key: str) -> Labels:
    """What tells a value of a script's own from its others: the attributes of its points."""
    name = key.removeprefix(PREFIX)
    told: Labels = ((label_name(NAME), _visible(name)),)
    return (*told, (label_name(EVALUATION), "true")) if is_evaluation(name) else told


def _histogram(found: Distribution) -> Iterator[tuple[str, Labels, float]]:
    count = 0
    for bound, here in zip([*found.bounds, float("inf")], found.counts, strict=True):
        count += here
        yield "_bucket", (("le", _number(bound)),), count
    yield "_sum", (), found.total
    yield "_count", (), count


def _lines(family: Family, openmetrics: bool) -> Iterator[str]:
    name = family.name
    # A counter's family has no _total in OpenMetrics, and its samples have.
    shown = name.removesuffix("_total") if openmetrics and family.kind == "counter" else name
    yield f"# HELP {shown} {_text(family.meaning, openmetrics)}"
    yield f"# TYPE {shown} {family.kind}"
    for suffix, labels, value in family.samples:
        told = ",".join(f'{key}="{_text(text, True)}"' for key, text in labels)
        braced = f"{{{told}}}" if told else ""
        yield f"{name}{suffix}{braced} {_number(value)}"


def _text(text: str, quotes: bool) -> str:
    """Escaped as both formats ask: backslashes, line breaks, and within labels quotes."""
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _visible(text: str) -> str:
    """Without control characters, at which a scraper may take the text to end."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _number(value: float) -> str:
    if isnan(value):
        return "NaN"
    if isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
