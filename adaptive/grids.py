"""All combinations of thresholds on a grid at once, and the best of them by cost.

Pure functions of tables: K exits x N samples. With exits e_0, e_1, ... on, a sample goes on from e_p if its
confidences are below the thresholds of e_0 .. e_p, which is a box. So accuracy is that of e_0, plus for every
p what the samples in a box gain from e_p to e_(p+1); cost likewise. The sums over all boxes are running
sums of a histogram: a combination of thresholds takes a few additions, however many samples there are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations

import torch
from torch import Tensor

from adaptive.costs import StageCosts
from adaptive.thresholds import EVERYBODY, NOBODY

# Quantiles that are tried per exit, by the number of exits that have thresholds: up to 83,521 combinations.
GRID = {1: 1000, 2: 120, 3: 32, 4: 16}
# Levels are denser at low confidence: late exits see only samples of which earlier ones were not certain.
LOW_END = 2.0
BUCKETS = 2048


@dataclass(frozen=True)
class Front:
    """Settings by increasing cost, each more accurate than all cheaper ones.

    `thresholds` [P, K], NOBODY at exits that are switched off; `accuracy` [P], `cost` [P].
    """

    thresholds: Tensor
    accuracy: Tensor
    cost: Tensor

    @classmethod
    def of(cls, parts: Iterable["Front"]) -> "Front":
        """The best of several sets of settings, which need not be fronts."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        whole = cls(*map(torch.cat, columns))
        return whole.take(best(whole.cost, whole.accuracy))

    def __len__(self) -> int:
        return len(self.cost)

    def take(self, rows: Tensor) -> "Front":
        """Some of the settings (int64 indices)."""
        return Front(self.thresholds[rows], self.accuracy[rows], self.cost[rows])

    def within(self, budgets: Tensor) -> Tensor:
        """Of each budget [B], the index of the best setting that is not dearer, or of the cheapest one."""
        return (torch.searchsorted(self.cost, budgets * (1 + 1e-9), right=True) - 1).clamp_min(0)


class Prices:
    """What it costs to leave at each exit, given which are switched off; without `switch_off`, none is."""

    def __init__(self, costs: StageCosts, switch_off: bool = True) -> None:
        self.exits = len(costs.trunks)
        self.switch_off = switch_off
        self._leaving = cache(costs.leaving)

    def without(self, off: Iterable[int]) -> list[float]:
        """The cost of leaving at each exit, [K], if those in `off` need not be on."""
        return self._leaving(frozenset(off) if self.switch_off else frozenset())

    def rows(self, thresholds: Tensor) -> Tensor:
        """The same for thresholds [P, K]: [P, K]; exits that nobody leaves are off."""
        idle = (thresholds == NOBODY).tolist()
        rows = [self.without(k for k, one in enumerate(row) if one) for row in idle]
        return torch.tensor(rows, dtype=torch.float64)


def outcomes(confidence: Tensor, values: Tensor, thresholds: Tensor, prices: Prices) -> tuple[Tensor, Tensor]:
    """Mean value (accuracy, for `values` [K, N] of 0 and 1) and cost of thresholds [P, K]: two of [P]."""
    accuracy = []
    cost = []
    for limits, leaving in zip(thresholds.split(16), prices.rows(thresholds).split(16), strict=True):
        exits = places(confidence, limits)
        accuracy.append(values.gather(0, exits).double().mean(1))
        cost.append(leaving.gather(1, exits).mean(1))
    return torch.cat(accuracy), torch.cat(cost)


def places(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """The exit, int64 [P, N], where samples of `confidence` [K, N] leave by thresholds [P, K]."""
    last = len(confidence) - 1
    exits = torch.full((len(thresholds), confidence.shape[1]), last)
    for k in reversed(range(last)):
        limits = thresholds[:, k, None].to(confidence.dtype)
        exits.masked_fill_(confidence[k] >= limits, k)
    return exits


def best(cost: Tensor, accuracy: Tensor) -> Tensor:
    """Indices, by cost, of the settings that are more accurate than all that cost as much or less.

    Of equal ones it is the first. Costs are sorted only where a setting beats all in cheaper intervals.
    """
    rows = torch.arange(len(cost))
    width = (cost.max() - cost.min()) / (BUCKETS - 1)
    if len(cost) > 2 * BUCKETS and width > 0:
        bucket = ((cost - cost.min()) / width).long()
        top = accuracy.new_full((BUCKETS,), -torch.inf).scatter_reduce_(0, bucket, accuracy, "amax")
        rows = (accuracy > _before(top)[bucket]).nonzero()[:, 0]
    rows = rows[accuracy[rows].sort(descending=True, stable=True).indices]
    rows = rows[cost[rows].sort(stable=True).indices]
    return rows[accuracy[rows] > _before(accuracy[rows])]


def _before(values: Tensor) -> Tensor:
    """The largest of all values before each: [P]."""
    return torch.cat([values.new_full((1,), -torch.inf), values.cummax(0).values[:-1]])


def edges(ordered: Tensor, count: int) -> Tensor:
    """At most `count` of the sorted values of an exit [N] as thresholds; all there are if so few."""
    if count < len(ordered):
        levels = torch.linspace(0, 1, count + 1, dtype=torch.float64)[:-1] ** LOW_END
        ordered = ordered[(levels * len(ordered)).long()]
    return ordered.unique_consecutive()


def cells(confidence: Tensor, limits: Tensor) -> Tensor:
    """How many of the thresholds [E] each sample [N] reaches: it goes on from the n-th if that is below n."""
    return torch.searchsorted(limits, confidence.contiguous(), right=True)


def subsets(num_exits: int, most: int) -> Iterator[tuple[int, ...]]:
    """All sets of exits to be on, small ones first: up to `most` of them, and the last one."""
    for size in range(min(num_exits - 1, most) + 1):
        for early in combinations(range(num_exits - 1), size):
            yield (*early, num_exits - 1)


def box_sums(
    cell: Sequence[Tensor], sizes: Sequence[int], values: Tensor, leaving: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Accuracy and cost of all combinations of thresholds of the exits that are on, E of them.

    `cell` [N] and `sizes` (numbers of cells) are of the exits but the last, `values` [E, N] and `leaving` [E]
    of all. Returns two tables [sizes...]; an index n stands for the n-th threshold, 0 for everybody leaves.
    """
    total = values.shape[1]
    place = torch.zeros(total, dtype=torch.int64)
    shape = []
    right = values[0].sum()
    cost = torch.tensor(leaving[0], dtype=torch.float64)  # sums of 0 and 1 are exact
    for p, size in enumerate(sizes):
        place = place * size + cell[p]
        shape = [*shape, size]
        spread = partial(torch.bincount, place, minlength=torch.Size(shape).numel())
        gained = _running(spread(values[p + 1] - values[p]).view(shape))
        gone_on = _running(spread().view(shape)) / total
        right = right[..., None] + gained
        cost = cost[..., None] + (leaving[p + 1] - leaving[p]) * gone_on
    return right / total, cost


def _running(table: Tensor) -> Tensor:
    """The sum of all cells that are smaller in every dimension."""
    sums = torch.zeros_like(table)
    for dim in range(table.ndim):
        table = table.cumsum(dim)
    sums[(slice(1, None),) * table.ndim] = table[(slice(-1),) * table.ndim]
    return sums


def grid_front(
    confidence: Tensor, values: Tensor, prices: Prices, grid: dict[int, int] | None = None
) -> Front:
    """The best of all thresholds on the grid, for all sets of exits that are on.

    `confidence` [K, N]; `values` [K, N], float64, is how probably each exit is right, or 0 and 1. `grid` says
    how many thresholds to try for sets of each size; larger sets are not tried. Where there are no fewer
    than samples, none is better.
    """
    num_exits = len(confidence)
    grid = GRID if grid is None else grid
    ordered = confidence[:-1].sort(1).values
    everybody = torch.tensor([EVERYBODY], dtype=torch.float64)

    @cache
    def levels(count: int) -> tuple[list[Tensor], list[Tensor]]:
        limits = [edges(row, count) for row in ordered]
        found = [cells(row, one) for row, one in zip(confidence, limits, strict=False)]
        return [torch.cat([everybody, one.double()]) for one in limits], found

    fronts = []
    for exits in subsets(num_exits, max(grid)):
        leaving = prices.without(set(range(num_exits)) - set(exits))
        choices, cell = levels(grid[len(exits) - 1]) if len(exits) > 1 else ([], [])
        sizes = [len(choices[k]) for k in exits[:-1]]
        accuracy, cost = box_sums(
            [cell[k] for k in exits[:-1]], sizes, values[list(exits)], [leaving[k] for k in exits]
        )
        rows = best(cost.flatten(), accuracy.flatten())
        thresholds = torch.full((len(rows), num_exits), NOBODY, dtype=torch.float64)
        thresholds[:, -1] = EVERYBODY
        left = rows
        for k, size in zip(reversed(exits[:-1]), reversed(sizes), strict=True):
            thresholds[:, k] = choices[k][left % size]
            left = left // size
        fronts.append(Front(thresholds, accuracy.flatten()[rows], cost.flatten()[rows]))
    return Front.of(fronts)
