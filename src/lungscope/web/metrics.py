"""What `/metrics` tells Prometheus. Nothing of it names a film or a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lungscope_http_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self.analyses = Counter(
            "lungscope_analyses",
            'Films by outcome: "done", or the error\'s code.',
            ("outcome",),
            registry=self._registry,
        )
        self._stages = Histogram(
            "lungscope_stage_seconds", "Time of a stage.", ("stage",), buckets=_SECONDS, registry=self._registry
        )

    def stages(self, timings_ms: Mapping[str, float]) -> None:
        """Count one film's `RunInfo.timings_ms`."""
        for stage, milliseconds in timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Tell `value` as the gauge `name`, as it is when it is asked for."""
        Gauge(name, about, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)
