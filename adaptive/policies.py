"""The operating points that an evaluation looks at: a published sweep of exit quotas, and those asked for by
hand."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptive.thresholds import (
    SWEEPS,
    Tables,
    cheapest,
    geometric_quotas,
    given_thresholds,
    operate,
    share_quotas,
    sweep,
    within_budget,
)


class Policies:
    """A published sweep (its rows come first), then the `shares` to leave and the `thresholds` given, if any.

    Both are one number per exit but the last. `picked` are rows to use whatever their figures. Raises
    ValueError for numbers that do not fit `num_exits`, and for rows that the sweep does not have.
    """

    def __init__(
        self,
        name: str,
        num_exits: int,
        *,
        scales: Sequence[float] = (),
        shares: Sequence[float] = (),
        thresholds: Sequence[float] = (),
        picked: Sequence[int] = (),
    ) -> None:
        ratios = SWEEPS[name]
        self.names = [f"{name} p={ratio:.4g}" for ratio in ratios]
        self.quotas = [geometric_quotas(ratio, num_exits, scales) for ratio in ratios]
        if shares:
            self.names.append(f"shares {' '.join(map(str, shares))}")
            self.quotas.append(share_quotas(shares, num_exits))
        self.fixed: list[Tensor] = []
        if thresholds:
            self.names.append(f"threshold {' '.join(map(str, thresholds))}")
            self.fixed.append(given_thresholds(thresholds, num_exits))
        self.picked = list(picked) or list(range(len(ratios), len(self.names)))
        wrong = [row for row in picked if row >= len(ratios)]
        if wrong:
            raise ValueError(f"--row {wrong[0]}, but {name} has rows 0 to {len(ratios) - 1}")

    def rows(
        self, calib: Tables, test: Tables, costs: Sequence[int], about: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """A row of `sweep` for every point, quotas met on calib, with its name and what `about` says of all
        of them."""
        rows = sweep(self.quotas, calib, test, costs)
        rows += [operate(thresholds, calib, test, costs) for thresholds in self.fixed]
        return [{"policy": name, **about, **row} for name, row in zip(self.names, rows, strict=True)]

    def choose(
        self,
        rows: list[dict[str, Any]],
        calib: Tables,
        *,
        budget: float | None = None,
        accuracy: float | None = None,
    ) -> list[int]:
        """The rows to use: those given by hand or else, judged on calib, the most accurate one within
        `budget`, or the cheapest one with this `accuracy` (a fraction; by default that of the last exit)."""
        if self.picked:
            return self.picked
        accuracies, costs = [row["calib_accuracy"] for row in rows], [row["calib_macs"] for row in rows]
        if budget is not None:
            return [within_budget(accuracies, costs, budget)]
        return [
            cheapest(
                accuracies, costs, calib.correct[-1].double().mean().item() if accuracy is None else accuracy
            )
        ]
