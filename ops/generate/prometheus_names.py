"""What our metrics are called in Prometheus: the product's own translation, for what is made
from it."""

from esper_otel.leyline.metrics import label_name, prometheus_name, series_name

__all__ = ["label_name", "prometheus_name", "series_name"]
