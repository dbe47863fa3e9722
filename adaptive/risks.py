"""What early exit risks on images, and how sure images make us that a risk is below a bound.

A p-value bounds the chance of images that look this good, if the risk is above the bound: it is at most delta
in no more than the share delta of draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv, xlogy
from torch import Tensor

from adaptive.confidence import NOBODY
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from utils import UserError

RISKS = {
    "drop": "how far accuracy is below the full network's",
    "harm": "how often the answer is wrong where the full network's is right",
    "disagreement": "how often the answer is not the full network's",
    "error": "how often images that leave at an early exit are answered wrongly, at the worst such exit",
    "cost": "the mean cost of an image, as a fraction of the full network's",
}
COLUMNS = "exits", "cost", "wrong", "lost", "gained", "differs"  # of outcomes, [M, N] each
UNSURE = 0.1  # the share of delta that is spent on how often answers change at all


def hoeffding_bentkus(total: ArrayLike, n: ArrayLike, bound: float, *, binary: bool) -> NDArray:
    """P-values for "the mean is above `bound`" from the `total` of n losses between 0 and 1.

    min(exp(-n h(min(R, bound), bound)), e P[Bin(n, bound) <= ceil(n R)]) with R = total / n and
    h(a, b) = a ln(a/b) + (1-a) ln((1-a)/(1-b)) (https://arxiv.org/abs/2110.01052). Without the factor e for
    losses of 0 and 1, whose total is binomial. Without losses (n = 0) it is 1.
    """
    total = np.asarray(total, dtype=float)
    n = np.asarray(n)
    if not 0 < bound < 1:
        return np.full(np.broadcast(total, n).shape, float(bound <= 0))
    mean = np.clip(total / np.maximum(n, 1), 0, bound)  # a sum of floats may be a little below 0
    divergence = xlogy(mean, mean / bound) + xlogy(1 - mean, (1 - mean) / (1 - bound))
    tail = bdtr(np.ceil(total - 1e-9), n, bound)  # a sum of floats may be a little above a whole number
    return np.minimum(np.exp(-n * divergence), tail if binary else np.minimum(np.e * tail, 1))


def difference(lost: ArrayLike, gained: ArrayLike, n: int, bound: float, delta: float) -> NDArray:
    """P-values for "P[lost] - P[gained] is above `bound`" from how many of n images are lost and gained.

    Exact up to the share `UNSURE` of `delta`. At the bound, the law of lost - gained has one unknown: how
    often either happens. Its upper confidence limit v (Clopper-Pearson) at that share is the worst case:
    as v grows, P[lost - gained <= x] changes by the step from x to x + 1 of the law for n - 1 images. For
    v <= 1/2 this is the law of a sum of independent yes-or-no draws, which rises up to its mean (Darroch).
    Elsewhere the p-value is 1. The share is added to it (Berger and Boos, 1994).
    """
    lost, gained = (np.asarray(count)[..., None] for count in (lost, gained))
    seen = lost + gained
    shift = lost - gained
    limit = np.where(seen < n, betaincinv(seen + 1, np.maximum(n - seen, 1), 1 - UNSURE * delta), 1.0)
    either = np.maximum(limit, bound)
    gains = (either - bound) / 2
    losses = (either + bound) / 2
    most = n * gains.max()
    count = np.arange(min(n, int(most + 10 * np.sqrt(most) + 20)) + 1)  # of gained images; rarely more
    below = bdtr(count, n, gains)
    chance = np.diff(below, prepend=0.0)
    left = n - count
    accepted = shift + count  # with so many gained, at most so many may be lost
    tail = bdtr(np.clip(accepted, 0, left), left, np.minimum(losses / (1 - gains), 1))
    total = (chance * np.where(accepted < 0, 0.0, tail)).sum(-1) + 1 - below[..., -1]
    proven = (limit <= 0.5) & (shift + 1 <= np.floor((n - 1) * bound))
    return np.where(proven[..., 0], np.minimum(total + UNSURE * delta, 1), 1.0)


@dataclass(frozen=True)
class Outcomes:
    """What policies do to images: M policies x N images.

    Of every image: where it leaves (`exits`), its cost as a fraction of the full network's, and whether the
    answer is `wrong`, `lost` (wrong, but the full network is right), `gained` (right, but the full network is
    wrong), or `differs` from the full network's. `used` [M, K-1] says at which early exits images may leave;
    `lowest` and `highest` are the costs possible.
    """

    policies: tuple[Policy, ...]
    exits: Tensor
    cost: Tensor
    wrong: Tensor
    lost: Tensor
    gained: Tensor
    differs: Tensor
    used: NDArray
    lowest: float
    highest: float

    @classmethod
    def of(
        cls, policies: Sequence[Policy], tables: ExitTables, costs: StageCosts | Sequence[float]
    ) -> "Outcomes":
        """The outcomes on the images of tables, read as the policies read logits.

        `costs` are those of stages, or of an image that leaves at each exit, [K], in any unit. Raises
        ValueError for policies of a single exit.
        """
        if len(policies[0].thresholds) < 2:
            raise UserError("a network with one exit: there is no early exit whose risk could be bounded")
        exits = torch.stack([policy.exit_of(tables) for policy in policies])
        full = costs.alone()[-1] if isinstance(costs, StageCosts) else costs[-1]
        leaving = torch.tensor([policy.leaving(costs) for policy in policies], dtype=torch.float64) / full
        wrong = ~tables.correct.gather(0, exits)
        right = tables.full_correct
        used = np.array([policy.thresholds[:-1] for policy in policies]) < NOBODY
        possible = leaving[torch.from_numpy(np.pad(used, ((0, 0), (0, 1)), constant_values=True))]
        return cls(
            tuple(policies),
            exits,
            leaving.gather(1, exits),
            wrong,
            wrong & right,
            ~wrong & ~right,
            tables.answers.gather(0, exits) != tables.full,
            used,
            possible.min().item(),
            possible.max().item(),
        )

    def __len__(self) -> int:
        return self.exits.shape[1]

    def rows(self, rows: Sequence[int]) -> "Outcomes":
        """The outcomes of some policies, in the order given."""
        policies = tuple(self.policies[row] for row in rows)
        chosen = {name: getattr(self, name)[list(rows)] for name in COLUMNS}
        return replace(self, policies=policies, used=self.used[list(rows)], **chosen)

    def images(self, images: Tensor) -> "Outcomes":
        """The outcomes on some images (indices, or bool [N])."""
        return replace(self, **{name: getattr(self, name)[:, images] for name in COLUMNS})

    def losses(self, risk: str) -> Tensor:
        """The loss of every image [M, N], 0 or more, whose mean is the risk; for a drop it is no less."""
        known = {"drop": self.lost, "harm": self.lost, "disagreement": self.differs, "cost": self.cost}
        return known[risk].double()

    def risk(self, name: str) -> NDArray:
        """The risk of that name on these images, [M]."""
        if name == "error":
            left, wrong = self.errors()
            return (wrong / np.maximum(left, 1)).max(1)
        loss = self.lost.double() - self.gained.double() if name == "drop" else self.losses(name)
        return loss.mean(1).numpy()

    def errors(self) -> tuple[NDArray, NDArray]:
        """How many images leave at each early exit, and how many of them are answered wrongly, [M, K-1]."""
        early = range(self.used.shape[1])
        there = [self.exits == k for k in early]
        left = np.stack([at.sum(1).numpy() for at in there], -1)
        return left, np.stack([(at & self.wrong).sum(1).numpy() for at in there], -1)


@dataclass(frozen=True)
class Tested:
    """For each of M policies: the risk on n images, and the p-value for "it is above the bound"."""

    observed: NDArray
    p_values: NDArray


def exit_p_values(outcomes: Outcomes, bound: float) -> NDArray:
    """P-values for the error among those who leave at each early exit, [M, K-1]; 0 where nobody can leave."""
    left, wrong = outcomes.errors()
    return np.where(outcomes.used, hoeffding_bentkus(wrong, left, bound, binary=True), 0.0)


def evidence(outcomes: Outcomes, risk: str, bound: float, delta: float) -> Tested:
    """What images say of every policy, to be used at confidence 1 - `delta`.

    The error is below the bound where it is so at all exits: the largest p-value counts.
    """
    n = len(outcomes)
    observed = outcomes.risk(risk)
    if risk == "error":
        return Tested(observed, exit_p_values(outcomes, bound).max(1))
    if risk == "drop":
        lost = outcomes.lost.sum(1).numpy()
        gained = outcomes.gained.sum(1).numpy()
        return Tested(observed, difference(lost, gained, n, bound, delta))
    if risk != "cost":
        return Tested(observed, hoeffding_bentkus(n * observed, n, bound, binary=True))
    span = outcomes.highest - outcomes.lowest or 1.0  # losses between 0 and 1 say most
    # A mean of equal costs may be rounded to below the lowest.
    scaled = ((observed - outcomes.lowest) / span).clip(0, 1)
    bound = (bound - outcomes.lowest) / span
    return Tested(observed, hoeffding_bentkus(n * scaled, n, bound, binary=False))
