"""What a server tells Prometheus: counts of its own, and what its scheduler counts, when it is asked."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deploy.drift import Drift
from deploy.scheduler import Scheduler

SECONDS = tuple(digit * 10**power for power in range(-3, 1) for digit in (1.0, 2.0, 5.0))


class Metrics:
    """Requests by status, how long answers took, the process's memory and time, the scheduler, drift."""

    def __init__(self, scheduler: Scheduler, drift: Callable[[], Drift | None]) -> None:
        self.scheduler = scheduler
        self.drift = drift
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)
        self.requests = Counter("dynexit_requests", "requests by status", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "dynexit_answer_seconds", "from a request to its answer", buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the scheduler has counted, and what the test of drift has found."""
        one = self.scheduler
        answers = CounterMetricFamily(
            "dynexit_answers", "by exit, and whether the deadline cut them short", labels=["exit", "cut"]
        )
        for (exit, cut), count in one.left.copy().items():
            answers.add_metric([str(exit), str(cut).lower()], count)
        yield answers
        yield CounterMetricFamily("dynexit_late", "requests that reached no exit in time", one.late)
        yield GaugeMetricFamily("dynexit_waiting", "requests that are not answered yet", one.waiting)
        queues = GaugeMetricFamily("dynexit_queue", "requests that wait for a stage", labels=["stage"])
        for k, queue in enumerate(one.queues):
            queues.add_metric([str(k)], len(queue))
        yield queues
        calls = CounterMetricFamily(
            "dynexit_calls", "calls of a stage, by requests in the batch", labels=["stage", "batch"]
        )
        for (k, count), times in one.calls.copy().items():
            calls.add_metric([str(k), str(count)], times)
        yield calls
        if found := self.drift():
            yield CounterMetricFamily("dynexit_drift_samples", "that the test of drift saw", found.samples)
            yield GaugeMetricFamily("dynexit_drift_p_value", "of the exit mix, always valid", found.p_value)
            alarm = GaugeMetricFamily("dynexit_drift_alarm", "1 from the first alarm on", labels=["change"])
            alarm.add_metric([found.change], found.alarm)
            yield alarm
