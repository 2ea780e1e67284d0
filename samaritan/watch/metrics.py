"""Numbers for Prometheus, written by its own library where that is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MISSING = (
    "Metrics need the library prometheus-client: pip install 'samaritan[metrics]', then start anew."
)


@dataclass(frozen=True)
class Metric:
    """One name with its numbers.

    Attributes:
        name: With its unit.
        help: What it is.
        labels: Names of what tells its numbers apart.
        values: A value for each label, and the number; None where it is not known, which leaves
            it out.
        counter: Whether it only ever grows.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    values: Sequence[tuple[tuple[str, ...], float | None]]
    counter: bool = False


def exposition(metrics: Sequence[Metric]) -> tuple[bytes, str] | None:
    """The metrics as Prometheus reads them, with their media type; None without the library."""
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        from prometheus_client.registry import Collector
    except ImportError:
        return None

    class Numbers(Collector):
        def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
            for metric in metrics:
                kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
                family = kind(metric.name, metric.help, labels=metric.labels)
                for labels, value in metric.values:
                    if value is not None:
                        family.add_metric(labels, value)
                yield family

    registry = CollectorRegistry()
    registry.register(Numbers())
    return generate_latest(registry), CONTENT_TYPE_LATEST
