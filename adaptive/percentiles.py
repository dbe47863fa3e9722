"""Percentiles of latencies, and what a few requests prove: "early stopping" of MLPerf's inference rules.

A percentile is below a value, with confidence, where so few requests are above it as would happen by chance
in less than 1 - CONFIDENCE of all runs if it were not: a tail of the binomial distribution, with their
tolerance of 0 (https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, nbinom

Array = np.ndarray
CONFIDENCE = 0.99


def fewest(share: float) -> int:
    """The requests without which no percentile `share` (0..1) is confirmed: one of them may be above it."""
    return 2 + int(nbinom.ppf(CONFIDENCE, 2, 1 - share))


def holds(over: int, requests: int, share: float) -> bool:
    """Whether `over` of the requests above a limit confirm that the percentile `share` is below it."""
    return bool(binom.cdf(over, requests, 1 - share) < 1 - CONFIDENCE)


def percentile(ordered: Array, share: float) -> float:
    """The percentile `share` of ascending latencies, as the generator has it: that share at most is below."""
    return float(ordered[min(int(len(ordered) * share), len(ordered) - 1)])


def confirmed(ordered: Array, share: float) -> float | None:
    """What the percentile `share` of ascending latencies is below, with confidence; None for too few."""
    over = int(binom.ppf(1 - CONFIDENCE, len(ordered), 1 - share)) - 1
    return float(ordered[len(ordered) - over]) if over > 0 else None


@dataclass(frozen=True)
class Latencies:
    """Of a number of requests; what p90 and p99 are below with confidence, None where too few were sent."""

    requests: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p90_below_ms: float | None
    p99_below_ms: float | None

    @property
    def quantiles_ms(self) -> tuple[float, float, float]:
        """The percentiles 50, 90 and 99."""
        return self.p50_ms, self.p90_ms, self.p99_ms

    @classmethod
    def of(cls, latencies_ms: Array) -> "Latencies":
        """Of the latencies [Q] of all requests; infinite for one without an answer."""
        ordered = np.sort(latencies_ms)
        found = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        below = (confirmed(ordered, share) for share in (0.9, 0.99))
        return cls(len(ordered), float(ordered.mean()), *found, *below)
