"""The best thresholds for every budget, found on calibration samples and judged by cross-validation.

    for policy in search_front(calib, costs.stages, reading):
        print(policy.macs, policy.accuracy, policy.thresholds, policy.off)

Up to five exits, all thresholds on a grid are tried, beyond that those that a descent passes. The best of so
many is partly lucky. So what is maximised is a mean of whether an exit was right and of its smoothed
probability to be right; their shares are those that do best on samples that are left out in turn.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.costs import StageCosts
from adaptive.descent import Tables, descend
from adaptive.exit_tables import ExitTables
from adaptive.grids import Front, Prices, grid_front, outcomes
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.smoothing import features, fit
from adaptive.thresholds import NOBODY, exit_of

SHARES = (1.0, 0.5, 0.0)  # of the smoothed probability; the rest is whether the exit was right
FOLDS = 4
COARSE = {1: 200, 2: 40, 3: 14, 4: 8}  # for cross-validation, and to start a descent
GRID_EXITS = 5
SETS = 200  # of exits to be on, at most, before a descent
POLICIES = 100  # at most, over the range of costs
BUDGETS = 24  # at which shares are compared


@dataclass(frozen=True)
class Fold:
    """The samples left out: confidence and correct [K, M], and the front of the others for each share."""

    confidence: Tensor
    correct: Tensor
    fronts: list[Front]

    def right(self, share: int, budgets: Tensor, prices: Prices) -> Tensor:
        """How many of the samples left out are right at each budget [B], of the front of this share."""
        front = self.fronts[share]
        rows, chosen = front.within(budgets).unique(return_inverse=True)
        accuracy, _ = outcomes(self.confidence, self.correct, front.thresholds[rows], prices)
        return accuracy[chosen] * self.correct.shape[1]


def search_front(calib: ExitTables, costs: StageCosts, reading: Reading, *, seed: int = 0) -> list[Policy]:
    """The best policies by increasing cost, at most `POLICIES`, with exits switched off where that pays.

    `costs` may be in any unit; `macs` of a policy are in that unit, and like its `shares` they are those on
    all of `calib`. Its `accuracy` is cross-validated (`expected`): at the level of policies which cost as
    much, found on three quarters of the samples and judged on the others. No exit is switched off where
    later exits remember it.
    """
    prices = Prices(costs, not reading.remembers)
    front, accuracy = search(calib.confidence, calib.correct, prices, seed=seed)
    policies = []
    for limits, expected, cost in zip(front.thresholds, accuracy.tolist(), front.cost.tolist(), strict=True):
        exits = exit_of(calib.confidence, limits.to(calib.confidence.dtype))
        shares = exits.bincount(minlength=len(limits)).double() / len(exits)
        off = (limits == NOBODY).nonzero()[:, 0].tolist() if prices.switch_off else []
        known = {"accuracy": expected, "macs": cost, "shares": tuple(shares.tolist())}
        policies.append(Policy.by(reading, limits.tolist(), "search", off=tuple(off), **known))
    return policies


def search(confidence: Tensor, correct: Tensor, prices: Prices, *, seed: int = 0) -> tuple[Front, Tensor]:
    """The front for samples with `confidence` and `correct` [K, N], and its accuracy by cross-validation [P].

    The front's own accuracy is partly smoothed, and of the samples that it was found on. A single sample
    cannot be left out: it is judged as it is.
    """
    right = correct.double()
    inputs = features(confidence)  # they know no labels, so that the folds may share them
    weights = fit(inputs, correct)
    folds = _folds(confidence, correct, inputs, weights, prices, seed)
    lowest = min(prices.without(()))
    highest = max(prices.without(()))
    steps = torch.linspace(0, 1, BUDGETS, dtype=torch.float64)
    budgets = lowest + (highest - lowest) * steps**2
    scores = [
        sum(fold.right(share, budgets, prices).sum().item() for fold in folds) for share in range(len(SHARES))
    ]
    share = scores.index(max(scores))
    smooth = (weights @ inputs.mT).sigmoid()
    values = torch.lerp(right, smooth, SHARES[share])
    front = thin(find(confidence, values, prices), POLICIES)
    if not folds:
        return front, outcomes(confidence, right, front.thresholds, prices)[0]
    held_out = sum(fold.right(share, front.cost, prices) for fold in folds) / correct.shape[1]
    return front, expected(front, held_out)


def find(confidence: Tensor, values: Tensor, prices: Prices) -> Front:
    """The front for `confidence` [K, N] and `values` [K, N], float64, such as 0 and 1 for wrong and right."""
    if len(confidence) <= GRID_EXITS:
        return grid_front(confidence, values, prices)
    grid = coarse(len(confidence))
    few = {count: levels for count, levels in grid.items() if count < max(grid)}
    starts = [grid_front(confidence, values, prices, one) for one in (few, grid)]
    return descend(Tables(confidence, values, prices), starts)


def coarse(num_exits: int) -> dict[int, int]:
    """The grid for cross-validation and to start from: for sets of fewer exits where there are very many."""
    sets = [math.comb(num_exits - 1, count) for count in COARSE]
    return {c: levels for c, levels in COARSE.items() if c == 1 or sum(sets[:c]) <= SETS}


def thin(front: Front, most: int) -> Front:
    """At most that many settings: the cheapest one, and the dearest one in each step, all of one ratio."""
    heights = front.cost.clamp_min(1e-9 * front.cost[-1]).log()
    span = (heights[-1] - heights[0]).clamp_min(1e-12)
    step = ((heights - heights[0]) / span * (most - 2)).ceil()
    last = torch.cat([step[1:] != step[:-1], torch.ones(1, dtype=torch.bool)])
    return front.take(last.nonzero()[:, 0])


def expected(front: Front, held_out: Tensor) -> Tensor:
    """Accuracies [P] that rise like the front's own, at the level of those on samples left out, [P].

    By regression: single ones of the latter are noisy and often fall where cost rises.
    """
    own = front.accuracy - front.accuracy.mean()
    slope = (own * held_out).sum() / own.square().sum().clamp_min(1e-12)
    return (held_out.mean() + slope.clamp(0, 1) * own).clamp(0, 1)


def _folds(
    confidence: Tensor, correct: Tensor, inputs: Tensor, weights: Tensor, prices: Prices, seed: int
) -> list[Fold]:
    """Random folds, each with the fronts of the other samples."""
    total = correct.shape[1]
    if total < 2:
        return []
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(min(FOLDS, total))
    folds = []
    for i, out in enumerate(parts):
        kept = torch.cat([part for j, part in enumerate(parts) if j != i])
        right = correct[:, kept].double()
        known = confidence[:, kept]
        smooth = (fit(inputs[kept], right, weights) @ inputs[kept].mT).sigmoid()
        fronts = [
            grid_front(known, torch.lerp(right, smooth, share), prices, coarse(len(confidence)))
            for share in SHARES
        ]
        folds.append(Fold(confidence[:, out], correct[:, out], fronts))
    return folds
