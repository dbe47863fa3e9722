"""How policies are found on calibration images one by one: by exit quotas, and as users give them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adaptive.confidence import EVERYBODY, check_threshold
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.exits import Exits
from adaptive.one_number import mapped_thresholds
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.thresholds import geometric_quotas, quota_thresholds, share_quotas, within_budget
from utils import UserError


@dataclass(frozen=True)
class Rule:
    """How the thresholds [K] of a policy are found from the tables of calibration images."""

    name: str
    thresholds: Callable[[ExitTables], Tensor]


def rules_of(exits: Exits, costs: Sequence[float]) -> list[Rule]:
    """A rule for each quota of the published sweep, then for each policy that is given by hand.

    Raises ValueError for numbers that do not fit exits of these `costs` [K] (multiply-adds), and for rows
    that the sweep does not have.
    """
    num_exits = len(costs)
    for budget in exits.budget:
        within_budget(costs, costs, budget)  # at least the first exit must be affordable
    ratios = exits.ratios
    if exits.calib == "none":
        _check_uncalibrated(exits)
    row = max(exits.row, default=-1)
    if row >= len(ratios):
        raise UserError(f"--row {row}, but {exits.quota_sweep} has rows 0 to {len(ratios) - 1}")
    sweep = exits.quota_sweep
    quotas = [(f"{sweep} p={p:.4g}", geometric_quotas(p, num_exits, exits.quota_scales)) for p in ratios]
    if exits.shares:
        name = f"shares {' '.join(map(str, exits.shares))}"
        quotas.append((name, share_quotas(exits.shares, num_exits)))
    rules = [Rule(name, partial(_by_quotas, quotas=wanted)) for name, wanted in quotas]
    if exits.router_threshold:
        name = f"threshold {' '.join(map(str, exits.router_threshold))}"
        limits = _router_limits(exits, num_exits)
        rules.append(Rule(name, lambda calib: limits))
    for accuracy in exits.mapped_accuracy:
        name = f"mapped accuracy {100 * accuracy:.4g} %"
        rules.append(Rule(name, partial(_by_mapped_accuracy, accuracy=accuracy)))
    return rules


def _by_quotas(calib: ExitTables, quotas: Tensor) -> Tensor:
    return quota_thresholds(calib.confidence, quotas)


def _by_mapped_accuracy(calib: ExitTables, accuracy: float) -> Tensor:
    return mapped_thresholds(calib.confidence, calib.correct, accuracy)


def _check_uncalibrated(exits: Exits) -> None:
    other = [*exits.shares, *exits.row, *exits.goals, *exits.mapped_accuracy]
    if other or not exits.router_threshold:
        raise UserError("--calib none: give thresholds (--router_threshold) and no other goal or policy")


def _router_limits(exits: Exits, num_exits: int) -> Tensor:
    """The thresholds given by hand, [K]."""
    if len(exits.router_threshold) != num_exits - 1:
        given = f"{len(exits.router_threshold)} router thresholds for {num_exits} exits"
        raise UserError(f"{given}; give one per exit but the last")
    for value in exits.router_threshold:
        check_threshold(value, exits.confidence)
    return torch.tensor([*exits.router_threshold, EVERYBODY], dtype=torch.float64)


def policies_of(
    rules: Sequence[Rule], calib: ExitTables, costs: StageCosts | Sequence[float], reading: Reading
) -> list[Policy]:
    """The policy of every rule, with thresholds found on `calib`.

    `costs` are multiply-adds of stages, or of an image that leaves at each exit, [K].
    """
    policies = []
    for rule in rules:
        policy = Policy.by(reading, rule.thresholds(calib).tolist(), rule.name)
        policies.append(expected(policy, calib, costs))
    return policies


def expected(policy: Policy, calib: ExitTables, costs: StageCosts | Sequence[float]) -> Policy:
    """The policy with its accuracy, cost and shares on calibration images."""
    found = policy.simulate(calib, costs)
    return replace(policy, accuracy=found.accuracy, macs=found.macs, shares=tuple(found.shares))
