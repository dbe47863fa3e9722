"""Evidence that a stream has changed: the wealth of bets, of which new ones begin all the time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SCALE = 100  # samples after which a good part of the stakes is at work, so that early changes are found too


class Evidence:
    """Wealth that starts at 1 and grows only if a stream is not what it is said to be.

    `num_bets` kinds of bets run side by side. A bet multiplies its capital by a factor per sample whose mean
    is at most 1, whatever came before, if nothing has changed. Then the probability that the wealth ever
    reaches 1 / `level` is at most `level` (Ville's inequality), however long the stream is and however often
    one looks. A bet that runs from the start loses nearly everything before a late change, so a part of the
    wealth is kept back: after t samples the share (1 + t / 100)^-1/2 of it, and what is let go then is staked
    on all bets anew. A late change is thus found nearly as soon as an early one, and the level still holds;
    averaging over the sample from which bets run is the mixture form of Shiryaev and Roberts' procedure
    (https://arxiv.org/abs/2203.03532 names such sums "e-detectors").
    """

    def __init__(self, level: float, num_bets: int) -> None:
        self.limit = -float(np.log(level))
        self.seen = 0
        self.alarm_at: int | None = None  # samples seen at the first alarm; an alarm stays
        self.highest = 0.0  # natural logarithm of the highest wealth so far
        self.capital = np.full(num_bets, self._staked(0, 1)[0] - np.log(num_bets))  # logarithms

    def update(self, log_factors: Floats) -> Floats:
        """The logarithm of the wealth [T] after each of the next samples.

        `log_factors` [T, E] are the logarithms of all bets' factors.
        """
        count, num_bets = log_factors.shape
        if not count:
            return np.zeros(0)
        # After sample t the capital is f_t (capital before) + stake_t; divided by the product of all factors
        # so far that is a running sum, which logarithms keep in range.
        grown = log_factors.cumsum(0)
        stakes = self._staked(self.seen + 1, count) - np.log(num_bets)
        joined = np.vstack([self.capital, stakes[:, None] - grown])
        capital = grown + np.logaddexp.accumulate(joined, axis=0)[1:]
        kept = _kept(self.seen + 2 + np.arange(count))  # the first stake is made before any sample
        wealth = np.logaddexp(np.logaddexp.reduce(capital, axis=1), np.log(kept))
        if self.alarm_at is None and (wealth >= self.limit).any():
            self.alarm_at = self.seen + 1 + int((wealth >= self.limit).argmax())
        self.highest = max(self.highest, float(wealth.max()))
        self.capital = capital[-1]
        self.seen += count
        return wealth

    @property
    def p_value(self) -> float:
        """Valid at any time: at most `level` exactly if there has been an alarm."""
        return float(np.exp(-self.highest))

    @property
    def best_bet(self) -> int:
        """The bet that has most."""
        return int(self.capital.argmax())

    def state_dict(self) -> dict[str, Any]:
        """Its state in plain types."""
        capital = self.capital.tolist()
        return {"seen": self.seen, "alarm_at": self.alarm_at, "highest": self.highest, "capital": capital}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; ValueError, TypeError or KeyError where it is none of such bets."""
        capital = np.array(state["capital"], dtype=np.float64)
        if capital.shape != self.capital.shape or not np.isfinite(capital).all():
            raise ValueError(f"capital {state['capital']!r}, expected {len(self.capital)} numbers")
        alarm_at = state["alarm_at"]
        self.alarm_at = None if alarm_at is None else int(alarm_at)
        self.capital = capital
        self.seen = int(state["seen"])
        self.highest = float(state["highest"])

    @staticmethod
    def _staked(start: int, count: int) -> Floats:
        """Logarithms of what is staked after samples start .. start + count - 1."""
        kept = _kept(start + np.arange(count + 1))
        return np.log(kept[:-1] - kept[1:])


def _kept(stakes: NDArray[np.int64]) -> Floats:
    """The share of the first wealth that is left to stake after so many stakes."""
    return (1 + stakes / SCALE) ** -0.5
