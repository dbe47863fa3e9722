"""When a sample may leave: exit quotas, the thresholds that meet them, and what these do to a set of samples.

Pure functions of tables: K exits x N samples. A sample leaves at the first exit whose confidence is at least
that exit's threshold; the last exit takes whoever is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.confidence import EVERYBODY, NOBODY
from utils import UserError

# Ratios p of the published sweeps; quota k is proportional to p^k.
MSDNET_RATIOS = [p / 20 for p in range(1, 40)]
DYN_PERCEIVER_RATIOS = [(i + 4) / 20 for i in range(17)] + [20 / (i + 4) for i in range(16, 0, -1)]
# With two exits: 99, 98 ... 1 % leave at the first. The published sweeps do not reach far, which cascades
# need.
WIDE_RATIOS = [share / (100 - share) for share in range(1, 100)]
SWEEPS = {"msdnet": MSDNET_RATIOS, "dyn_perceiver": DYN_PERCEIVER_RATIOS, "wide": WIDE_RATIOS}


@dataclass(frozen=True)
class Simulation:
    """What a set of thresholds does to a set of samples.

    `accuracy` is a fraction, `cost` the mean in the unit of the costs given, `shares` [K] the fraction that
    leaves at each exit, `exit_index` [N] where each sample leaves.
    """

    accuracy: float
    cost: float
    shares: list[float]
    exit_index: Tensor


def geometric_quotas(ratio: float, num_exits: int, scales: Sequence[float] = ()) -> Tensor:
    """Share of the samples meant to leave at each exit, [K] float32 summing to 1: q_k = p^k / sum_j p^j.

    `ratio` p below 1 favours early exits. `scales` (K - 1 numbers, or none) then multiply the quotas of exits
    0..K-2 one after the other, each time rescaling the later quotas to the total of 1 (Dyn-Perceiver: 0.85,
    1, 0.5). Computed in float32 as exp(k log p), as published (MSDNet, "budgeted batch classification").
    """
    if scales and len(scales) != num_exits - 1:
        raise UserError(
            f"{len(scales)} quota scales {list(scales)} for {num_exits} exits; give one per exit but the last"
        )
    powers = torch.exp(torch.arange(1, num_exits + 1) * torch.tensor(ratio).log())
    quotas = powers / powers.sum()
    for k, scale in enumerate(scales):
        quotas[k] *= scale
        if not 0 <= quotas[: k + 1].sum() <= 1:
            raise UserError(f"quota scales {list(scales)} let more than everybody leave at exit {k}")
        quotas[k + 1 :] *= (1 - quotas[: k + 1].sum()) / quotas[k + 1 :].sum()
    return quotas


def quota_thresholds(confidence: Tensor, quotas: Tensor) -> Tensor:
    """The papers' rule: thresholds [K] at which floor(N * quota_k) of the samples left leave at exit k.

    `confidence` [K, N], `quotas` [K]. Nobody leaves at an exit whose quota is zero or larger than what is
    left; ties leave together; the last threshold always passes. The product N * quota is taken in float32, as
    published. Raises ValueError unless there is a quota per exit.
    """
    num_exits, num_samples = confidence.shape
    if len(quotas) != num_exits:
        raise UserError(f"{len(quotas)} quotas for {num_exits} exits; give one per exit")
    wanted = (torch.tensor(num_samples, dtype=torch.float32) * quotas.float()).long().tolist()
    thresholds = confidence.new_full((num_exits,), NOBODY)
    thresholds[-1] = EVERYBODY
    active = torch.ones(num_samples, dtype=torch.bool, device=confidence.device)
    for k in range(num_exits - 1):
        left = confidence[k, active]
        if 0 < wanted[k] <= len(left):
            thresholds[k] = left.kthvalue(len(left) - wanted[k] + 1).values
            active &= confidence[k] < thresholds[k]
    return thresholds


def exit_of(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """The exit at which each sample leaves: [K, N] and [K] to int64 [N]."""
    leaves = confidence[:-1] >= thresholds[:-1, None]
    return (~leaves).long().cumprod(0).sum(0)  # how many exits it passes; some 40 times as fast as an argmax


def simulate(confidence: Tensor, correct: Tensor, thresholds: Tensor, costs: Sequence[float]) -> Simulation:
    """What `thresholds` [K] do to samples with `confidence` and `correct` [K, N], at the exits' `costs`."""
    exits = exit_of(confidence, thresholds)
    shares = torch.bincount(exits, minlength=len(thresholds)).double() / exits.numel()
    accuracy = correct.gather(0, exits[None]).double().mean().item()
    cost = (shares * torch.as_tensor(costs, dtype=torch.float64, device=shares.device)).sum().item()
    return Simulation(accuracy, cost, shares.tolist(), exits)


def share_quotas(shares: Sequence[float], num_exits: int) -> Tensor:
    """Quotas [K] from the shares meant to leave at every exit but the last; it takes the rest. ValueError."""
    if len(shares) != num_exits - 1 or sum(shares) > 1:
        raise UserError(
            f"shares {list(shares)} for {num_exits} exits; give one per exit but the last, at most 1 in all"
        )
    return torch.tensor([*shares, 1 - sum(shares)])


def within_budget(accuracies: Sequence[float], costs: Sequence[float], budget: float, limit: str = "") -> int:
    """Index of the most accurate setting whose cost is at most `budget`; the cheaper one of two equals.

    Raises ValueError if even the cheapest costs more, in which the budget is called `limit`.
    """
    affordable = [i for i, cost in enumerate(costs) if cost <= budget]
    if not affordable:
        limit = limit or f"a budget of {budget:.4g} multiply-adds"
        raise UserError(f"{limit} is below the cheapest setting's {min(costs):.4g}")
    return max(affordable, key=lambda i: (accuracies[i], -costs[i]))


def cheapest(accuracies: Sequence[float], costs: Sequence[float], accuracy: float) -> int:
    """Index of the cheapest setting with this accuracy (a fraction) or more; ValueError if none has it."""
    good = [i for i, a in enumerate(accuracies) if a >= accuracy]
    if not good:
        raise UserError(f"an accuracy of {accuracy:.4g} is above the best setting's {max(accuracies):.4g}")
    return min(good, key=lambda i: costs[i])
