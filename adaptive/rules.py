"""How policies are found on calibration images, and how one of them is chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adaptive.confidence import EVERYBODY, check_threshold
from adaptive.exit_tables import ExitTables
from adaptive.exits import Exits
from adaptive.policy import Policy
from adaptive.thresholds import cheapest, geometric_quotas, quota_thresholds, share_quotas, within_budget
from utils import UserError


@dataclass(frozen=True)
class Rule:
    """How the thresholds [K] of a policy are found from the confidence [K, N] of calibration images."""

    name: str
    thresholds: Callable[[Tensor], Tensor]


def rules_of(exits: Exits, costs: Sequence[float]) -> list[Rule]:
    """A rule for each quota of the published sweep, then for the shares and the thresholds given, if any.

    Raises ValueError for numbers that do not fit exits of these `costs` [K] (multiply-adds), and for rows
    that the sweep does not have.
    """
    num_exits = len(costs)
    if exits.budget is not None:
        within_budget(costs, costs, exits.budget)  # at least the first exit must be affordable
    ratios = exits.ratios
    if exits.calib == "none" and (exits.shares or exits.row or not exits.router_threshold):
        raise UserError("--calib none: give thresholds (--router_threshold), no --shares and no --row")
    row = max(exits.row, default=-1)
    if row >= len(ratios):
        raise UserError(f"--row {row}, but {exits.quota_sweep} has rows 0 to {len(ratios) - 1}")
    sweep = exits.quota_sweep
    quotas = [(f"{sweep} p={p:.4g}", geometric_quotas(p, num_exits, exits.quota_scales)) for p in ratios]
    if exits.shares:
        name = f"shares {' '.join(map(str, exits.shares))}"
        quotas.append((name, share_quotas(exits.shares, num_exits)))
    rules = [Rule(name, partial(quota_thresholds, quotas=wanted)) for name, wanted in quotas]
    if exits.router_threshold:
        if len(exits.router_threshold) != num_exits - 1:
            given = f"{len(exits.router_threshold)} router thresholds for {num_exits} exits"
            raise UserError(f"{given}; give one per exit but the last")
        for value in exits.router_threshold:
            check_threshold(value, exits.confidence)
        limits = torch.tensor([*exits.router_threshold, EVERYBODY], dtype=torch.float64)
        name = f"threshold {' '.join(map(str, exits.router_threshold))}"
        rules.append(Rule(name, lambda confidence: limits))
    return rules


def policies_of(
    rules: Sequence[Rule], calib: ExitTables, costs: Sequence[float], confidence: str
) -> list[Policy]:
    """The policy of every rule, with thresholds found on `calib`; exits cost `costs` [K] multiply-adds."""
    policies = []
    for rule in rules:
        policy = Policy(tuple(rule.thresholds(calib.confidence).tolist()), confidence, rule.name)
        found = policy.simulate(calib, costs)
        policy = replace(policy, accuracy=found.accuracy, macs=found.macs, shares=tuple(found.shares))
        policies.append(policy)
    return policies


@dataclass(frozen=True)
class Choice:
    """Indices of the policies to use, of which the first is to be deployed, and in words why."""

    rows: list[int]
    reason: str


def choose(policies: Sequence[Policy], exits: Exits, last_accuracy: float) -> Choice:
    """The policies given by hand, else the best one on the calibration images.

    The best is the most accurate one within the budget, or the cheapest with the accuracy wanted. By default
    this is `last_accuracy`, that of the last exit, or the nearest to it. Raises ValueError for a budget or an
    accuracy that none of them reaches.
    """
    by_hand = list(exits.row or range(len(exits.ratios), len(policies)))
    if by_hand:
        return Choice(by_hand, "given by hand" + (", the first of these" if len(by_hand) > 1 else ""))
    accuracies, costs = zip(*((policy.accuracy, policy.macs) for policy in policies), strict=True)
    if exits.budget is not None:
        best = within_budget(accuracies, costs, exits.budget)
        good = sum(cost <= exits.budget for cost in costs)
        reason = f"the most accurate of {good} settings within {exits.budget / 1e6:.4g} M multiply-adds"
    else:
        goal = last_accuracy if exits.accuracy is None else exits.accuracy
        good = sum(accuracy >= goal for accuracy in accuracies)
        best = cheapest(accuracies, costs, goal if good or exits.accuracy else max(accuracies))
        wanted = f"{100 * goal:.2f} %" + (", the last exit's accuracy" if exits.accuracy is None else "")
        reason = f"the cheapest of {good} settings that reach {wanted}"
        if not good:
            reason = f"the most accurate setting, since none reaches {wanted}"
    return Choice([best], f"{reason}; all {len(policies)} were judged on the calibration images")
