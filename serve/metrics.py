"""What the service measures, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """Counters and histograms of one service, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("d2llm_requests", "Answered requests.", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "d2llm_request_seconds", "Time from the request to its answer.", ("route",), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.running = Gauge("d2llm_requests_running", "Requests that are not answered yet.", registry=registry)
        self._stages = Histogram(
            "d2llm_stage_seconds",
            "Time of each stage of a batch of searches.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self._waiting = Gauge("d2llm_queue_waiting", "Texts that wait.", ("queue",), registry=registry)
        self._waits = Histogram(
            "d2llm_queue_seconds", "Time that the first job of a batch waited.", ("queue",), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._sizes = Histogram("d2llm_batch_size", "Texts of a batch.", ("queue",), buckets=SIZES, registry=registry)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Add the duration of each stage of a batch of searches."""
        for stage, duration in seconds.items():
            self._stages.labels(stage).observe(duration)

    def batch_observer(self, queue: str) -> Callable[[int, float], None]:
        """Return a function that adds the size of a batch of this queue, and the seconds it waited."""
        sizes, waits = self._sizes.labels(queue), self._waits.labels(queue)

        def observe(size: int, seconds: float) -> None:
            sizes.observe(size)
            waits.observe(seconds)

        return observe

    def watch_queue(self, queue: str, waiting: Callable[[], float]) -> None:
        """Ask `waiting` for the length of this queue whenever the metrics are read."""
        self._waiting.labels(queue).set_function(waiting)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
