"""The page of metrics: every one of the registry."""

from __future__ import annotations

from esper_otel.leyline.metrics import BY_KEY, CUSTOM, RUN_ENDED
from ops.generate.metrics_page import page


def test_the_page_names_every_metric_once_with_its_unit() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    listed = {row[1].strip("`"): row[2].strip("`") for row in rows if len(row) == 7}
    in_no_table = {"none": RUN_ENDED.unit, "custom.NAME": CUSTOM.unit}
    assert listed == {metric.key: metric.unit for metric in BY_KEY.values()} | in_no_table
