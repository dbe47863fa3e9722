"""Thresholds one exit at a time: the best for it while all others stay, exactly, from many starts.

For more exits than a grid can have. Given the other thresholds, samples sorted by an exit's confidence say by
running sums what accuracy and cost each of its thresholds gives. Rows of settings trade accuracy
for cost at different slopes, and all that they pass on their way competes for the front.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.grids import Front, Prices, edges, places
from adaptive.thresholds import EVERYBODY, NOBODY

SLOPES = 32
LEVELS = 128  # thresholds tried per exit
SWEEPS = 2
ROWS = 16  # settings that are followed together, to bound memory


@dataclass(frozen=True)
class Tables:
    """What descent reads: `confidence` [K, N], `values` [K, N] as for `grid_front`, and the prices."""

    confidence: Tensor
    values: Tensor
    prices: Prices


def descend(tables: Tables, starts: Sequence[Front]) -> Front:
    """The best settings on the way from each of the starts, at each slope from its best setting."""
    whole = Front.of(starts)
    fall = (whole.accuracy[-1] - whole.accuracy[0]) / (whole.cost[-1] - whole.cost[0]).clamp_min(1e-12)
    slopes = fall * torch.logspace(4, -7, SLOPES, base=2, dtype=torch.float64)
    rows = []
    for front in starts:
        worth = front.accuracy - slopes[:, None] * front.cost  # (SLOPES, P)
        rows.append(front.thresholds[worth.argmax(1)])
    thresholds = torch.cat(rows)
    slopes = slopes.repeat(len(starts))
    passed = [whole]
    for _ in range(SWEEPS):
        for k in reversed(range(len(tables.confidence) - 1)):
            moved = list(_move(tables, k, thresholds, slopes))
            thresholds = torch.cat([row for row, _ in moved])
            passed = [Front.of([*passed, *(front for _, front in moved)])]
    return passed[0]


def _move(tables: Tables, k: int, thresholds: Tensor, slopes: Tensor) -> Iterator[tuple[Tensor, Front]]:
    """Settings [<= ROWS, K] with the best threshold for exit k, and the front of all its thresholds there."""
    ordered, order = tables.confidence[k].sort()
    limits = edges(ordered, LEVELS)
    choices = torch.cat(
        [torch.tensor([EVERYBODY]).double(), limits.double(), torch.tensor([NOBODY]).double()]
    )
    below = torch.searchsorted(ordered, limits)  # the number of samples that go on
    for some, slope in zip(thresholds.split(ROWS), slopes.split(ROWS), strict=True):
        accuracy, cost = line(tables, k, some, order, below)
        chosen = (accuracy - slope[:, None] * cost).argmax(1)
        settings = some[:, None].repeat(1, len(choices), 1)
        settings[:, :, k] = choices
        front = Front.of([Front(settings.flatten(0, 1), accuracy.flatten(), cost.flatten())])
        yield settings[torch.arange(len(some)), chosen], front


def line(tables: Tables, k: int, thresholds: Tensor, order: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and cost, [P, E + 2], of thresholds [P, K] where only that of exit k changes.

    Everybody leaves there, then those who reach each of E thresholds, then nobody. `order` [N] sorts the
    samples by the confidence of exit k, and `below` [E] of them are below each threshold.
    """
    total = len(order)
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), below])
    rest = thresholds.clone()
    here = thresholds.clone()
    rest[:, k] = NOBODY
    here[:, k] = EVERYBODY
    exits = places(tables.confidence, rest)  # where samples leave that do not leave at k: (P, N)
    reached = exits > k
    off = tables.prices.rows(rest)
    on = tables.prices.rows(here)
    right = tables.values.gather(0, exits)

    def along(gone_on: Tensor, stay: Tensor, idle: Tensor) -> Tensor:
        gain = torch.where(reached, gone_on - stay, 0)
        sums = torch.nn.functional.pad(gain[:, order].cumsum(1), (1, 0))[:, counts]
        ends = torch.where(reached, stay, gone_on).sum(1, keepdim=True)
        return torch.cat([ends + sums, idle.sum(1, keepdim=True)], 1) / total

    accuracy = along(right, tables.values[k].expand_as(right), right)
    cost = along(on.gather(1, exits), on[:, k, None].expand_as(right), off.gather(1, exits))
    return accuracy, cost
