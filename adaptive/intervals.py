"""95 % intervals, most by the bootstrap: a figure as it would be for other samples of the same kind."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

DRAWS = 10_000
TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, scale: float = 1, unit: str = "", sign: str = "") -> str:
        """The figure times `scale` with its unit, and the interval; `sign` as in format specifications."""

        def shown(figure: float) -> str:
            return f"{scale * figure:{sign}.2f}"

        return f"{shown(self.value)}{unit} [{shown(self.low)}, {shown(self.high)}]"

    def below(self, numerator: float) -> "Estimate":
        """`numerator` divided by the figure, which is positive."""
        return Estimate(numerator / self.value, numerator / self.high, numerator / self.low)


def spread(values: Tensor) -> Estimate:
    """The mean of one figure over rounds [R], and the interval that holds 95 % of them."""
    values = values.double()
    low, high = values.quantile(values.new_tensor(TAILS)).tolist()
    return Estimate(values.mean().item(), low, high)


def mean_estimates(values: Tensor, *, seed: int = 0) -> list[Estimate]:
    """The mean of each row of values [R, N], its samples drawn anew with replacement for the interval.

    Rows are drawn together, so that the interval of a row of differences is a paired one. Drawing samples is
    drawing how often each distinct column occurs, which a multinomial distribution says at once.
    """
    columns, counts = values.double().cpu().unique(dim=1, return_counts=True)
    shares = (counts.double() / counts.sum()).numpy()
    drawn = np.random.default_rng(seed).multinomial(counts.sum().item(), shares, size=DRAWS)
    means = drawn / values.shape[1] @ columns.numpy().T  # [DRAWS, R]
    return _estimates(values.double().mean(1).tolist(), means)


def share_estimates(counts: Sequence[int], total: int, *, seed: int = 0) -> list[Estimate]:
    """Shares of samples that have some property, `counts` of `total`: as `mean_estimates`, much faster.

    How many of the samples drawn anew have it follows a binomial distribution. Each row is drawn on its own.
    """
    shares = np.array(counts) / total
    drawn = np.random.default_rng(seed).binomial(total, shares, size=(DRAWS, len(shares)))
    return _estimates(shares.tolist(), drawn / total)


def _estimates(values: list[float], drawn: np.ndarray) -> list[Estimate]:
    """Figures with the intervals of those drawn anew, [DRAWS, R]."""
    low, high = np.quantile(drawn, TAILS, axis=0).tolist()
    return [Estimate(*figures) for figures in zip(values, low, high, strict=True)]


def median_ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Estimate:
    """The ratio of two medians over the same rounds, which are drawn anew in pairs for the interval."""
    rounds = np.array([above, below])
    picks = np.random.default_rng(seed).integers(rounds.shape[1], size=(DRAWS, rounds.shape[1]))
    top, bottom = np.median(rounds[:, picks], axis=2)
    value = np.divide(*np.median(rounds, axis=1))
    return Estimate(float(value), *np.quantile(top / bottom, TAILS).tolist())
