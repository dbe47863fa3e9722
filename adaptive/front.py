"""The policies to choose among, from the cheapest to the most expensive, with what they do to test images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.intervals import Estimate, share_estimates
from adaptive.policy import Policy

MOST = 60  # rows: a slider of as many stops can still be moved by one with the mouse


@dataclass(frozen=True)
class FrontRow:
    """A policy, the command that deploys it, and what it does to test images.

    `accuracy` is a fraction with its 95 % interval, `macs` multiply-adds per image, `shares` [K] the fraction
    that leaves at each exit. What is expected from calibration images is in the policy.
    """

    policy: Policy
    accuracy: Estimate
    macs: float
    shares: list[float]
    command: str


def front_rows(
    policies: Sequence[Policy],
    test: ExitTables,
    costs: StageCosts | Sequence[float],
    command_of: Callable[[Policy], str],
    *,
    keep: Policy | None = None,
) -> list[FrontRow]:
    """Rows by their cost on the images of `test`: at most `MOST`, evenly spaced in cost, and always `keep`.

    `test` is read as all the policies read logits; `costs` are multiply-adds of stages, or [K] of exits.
    `keep` is compared by its decisions.
    """
    points = [policy.simulate(test, costs) for policy in policies]
    points.sort(key=lambda point: point.macs)
    places = evenly_spaced([point.macs for point in points], MOST)
    picked = [
        point for i, point in enumerate(points) if i in places or (keep and decide_alike(point.policy, keep))
    ]
    right = [round(point.accuracy * len(test)) for point in picked]
    return [
        FrontRow(
            policy=point.policy,
            accuracy=accuracy,
            macs=point.macs,
            shares=point.shares,
            command=command_of(point.policy),
        )
        for point, accuracy in zip(picked, share_estimates(right, len(test)), strict=True)
    ]


def decide_alike(one: Policy, other: Policy) -> bool:
    """Whether two policies make the same decisions, whatever else is known of them."""
    return (one.reading, one.thresholds, one.off) == (other.reading, other.thresholds, other.off)


def evenly_spaced(costs: Sequence[float], count: int) -> list[int]:
    """Indices of at most `count` of the sorted costs: those nearest to evenly spaced ones, ends included."""
    if len(costs) <= count:
        return list(range(len(costs)))
    wanted = np.linspace(costs[0], costs[-1], count)
    nearest = np.abs(wanted[:, None] - np.array(costs)).argmin(1)
    return np.unique(nearest).tolist()
