"""How often risks exceed what was guaranteed, over random draws of calibration images, and what is saved.

    python scripts/check_guarantees.py --checkpoint runs/c10/checkpoint-best.pth --data_path "$DATA/cifar10"
    python scripts/check_guarantees.py --logits FILE [--policies quotas]

The flags of eval_dynamic.py apply. With `--logits`, that file of logits is read where it exists, and written
otherwise. All images that are not for training are one pool, whose risks are taken as the true ones. Each
round draws calibration images from it with replacement, so that they are independent, finds policies on one
half of them, by the search or by a sweep of quotas, and tests them on the other. "above" is the share of
rounds in which the risk of the policy on the whole pool exceeds the bound: with ltt it should be at most
delta. "unseen" is the same on the images that the round did not draw: their mean is that of the pool, but it
varies on its own, so it may be more. With crc the mean risk should be at most the bound. "free" is the
greediest policy whose risk on all images drawn is at most the bound: without a guarantee. Where no image may
leave early, nothing is promised: a risk of 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from common import print_table, read_known

import numpy as np
import torch
from torch import Tensor

from adaptive.choices import risk_front
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.guarantees import Demand, certified, never_early, path_rows, without_unsure_exits
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.risks import RISKS, Outcomes
from adaptive.thresholds import geometric_quotas, quota_thresholds
from experiment.logits import logits_of
from utils import option, run_main

Find = Callable[[ExitTables], list[Policy]]
RATIOS = np.geomspace(1 / 30, 30, 40).tolist()  # of quotas: from 97 % at the first exit to 97 % at the last
LEVELS = ((0.01, 0.05), (0.02, 0.1), (0.005, 0.1))  # bounds and deltas
COSTS = ((0.5, 0.05), (0.6, 0.1), (0.4, 0.1))  # ... of costs, as fractions of the full network's
HEADS = ["risk", "method", "bound, %:g", "delta:g", "above, %:.1f", "unseen, %:.1f", "mean risk, %:.3f"]
HEADS += ["never early, %:.1f", "saving:.2f", "free above, %:.1f", "free saving:.2f"]


@dataclass(frozen=True)
class Flags:
    """What is drawn; the flags of eval_dynamic.py apply besides."""

    logits: str = option("", "file of logits: read where it exists, written otherwise")
    policies: Literal["search", "quotas"] = option("search", "how policies are found")
    rounds: int = option(1000, low=1)
    draw: int = option(5000, "calibration images", low=4)
    seed: int = option(0)


@dataclass
class Tally:
    """What became of a demand in every round: risk of the policy on the pool and on images not drawn, its
    cost as a fraction, whether any image may leave early; risk and cost of the free policy."""

    risks: list[float] = field(default_factory=list)
    unseen: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    early: list[bool] = field(default_factory=list)
    free_risks: list[float] = field(default_factory=list)
    free_costs: list[float] = field(default_factory=list)

    def cells(self, demand: Demand) -> tuple:
        """The row of the table."""

        def above(risks: list[float]) -> float:
            return 100 * np.mean(np.array(risks) > demand.bound).item()

        delta = f"{demand.delta:g}" if demand.method == "ltt" else "-"
        return (
            demand.risk,
            demand.method,
            100 * demand.bound,
            delta,
            above(self.risks),
            above(self.unseen),
            100 * np.mean(self.risks),
            100 - 100 * np.mean(self.early),
            1 / np.mean(self.costs),
            above(self.free_risks),
            1 / np.mean(self.free_costs),
        )


def demands() -> list[Demand]:
    """All that is checked."""
    risks = "drop", "harm", "disagreement", "error"
    found = [Demand(risk, *level) for risk in risks for level in LEVELS]
    found += [Demand("cost", *level) for level in COSTS]
    by_crc = "harm", "disagreement", "cost"
    return found + [replace(one, method="crc") for one in found if one.risk in by_crc]


def sweep(calib: ExitTables, costs: StageCosts, reading: Reading) -> list[Policy]:
    """A policy for each of the ratios, without repetitions, whatever it costs."""
    quotas = [geometric_quotas(ratio, len(calib.confidence)) for ratio in RATIOS]
    limits = [tuple(quota_thresholds(calib.confidence, each).tolist()) for each in quotas]
    return [Policy.by(reading, one) for one in dict.fromkeys(limits)]


def finds_of(flags: Flags, costs: StageCosts, reading: Reading) -> dict[str, Find]:
    """How policies are found, by the risk that is to be low."""
    if flags.policies == "quotas":
        return dict.fromkeys(RISKS, partial(sweep, costs=costs, reading=reading))
    harmless = partial(risk_front, "harm", costs=costs, reading=reading)
    accurate = partial(risk_front, "cost", costs=costs, reading=reading)
    return dict.fromkeys(RISKS, harmless) | {"cost": accurate}


def free_policy(outcomes: Outcomes, demand: Demand) -> Policy:
    """The cheapest policy whose risk on these images is at most the bound; for a cost, the dearest."""
    cost = outcomes.cost.mean(1).numpy()
    held = outcomes.risk(demand.risk) <= demand.bound
    good = np.flatnonzero(held & (cost < 1))
    if not len(good):
        return never_early(outcomes.policies[0])
    order = cost[good].argmax() if demand.risk == "cost" else cost[good].argmin()
    return outcomes.policies[good[order]]


def promised(outcomes: Outcomes, risk: str) -> float:
    """The risk of one policy; 0 for never early, of which nothing is promised."""
    return outcomes.risk(risk).item() if outcomes.used.any() else 0.0


class Round:
    """One draw of calibration images, [n] indices into the pool: outcomes on both halves and on all."""

    def __init__(self, pool: ExitTables, costs: StageCosts, drawn: Tensor, find: Find) -> None:
        half = len(drawn) // 2
        self.pool = pool
        self.costs = costs
        self.finding = pool.part(drawn[:half])
        self.testing = pool.part(drawn[half:])
        everything = ExitTables.cat([self.finding, self.testing])
        self.found = Outcomes.of(find(self.finding), self.finding, costs)
        self.tested = Outcomes.of(self.found.policies, self.testing, costs)
        self.all = Outcomes.of(find(everything), everything, costs)
        self.unseen = torch.ones(len(pool), dtype=torch.bool)
        self.unseen[drawn] = False
        self.known: dict[Policy, tuple[Outcomes, Outcomes]] = {}

    def outcomes(self, policy: Policy) -> tuple[Outcomes, Outcomes]:
        """The outcomes of a policy on the pool, and on what was not drawn."""
        if policy not in self.known:
            outcomes = Outcomes.of([policy], self.pool, self.costs)
            self.known[policy] = outcomes, outcomes.images(self.unseen)
        return self.known[policy]

    def certain(self, demand: Demand) -> Policy | None:
        """The policy that is certified, if any is."""
        found = self.found
        tested = self.tested
        if demand.risk == "error":  # its exits depend on the demand
            policies = without_unsure_exits(found, demand)
            if not policies:
                return None
            found = Outcomes.of(policies, self.finding, self.costs)
            tested = Outcomes.of(policies, self.testing, self.costs)
        rows = path_rows(found, demand)
        passed = certified(tested.rows(rows), demand)[0] if rows else 0
        return found.policies[rows[passed - 1]] if passed else None

    def count(self, demand: Demand, tally: Tally) -> None:
        """Adds what becomes of a demand."""
        policy = self.certain(demand)
        outcomes, unseen = self.outcomes(policy or never_early(self.found.policies[0]))
        free, _ = self.outcomes(free_policy(self.all, demand))
        tally.early.append(policy is not None)
        tally.risks.append(promised(outcomes, demand.risk))
        tally.unseen.append(promised(unseen, demand.risk))
        tally.costs.append(outcomes.cost.mean().item())
        tally.free_risks.append(promised(free, demand.risk))
        tally.free_costs.append(free.cost.mean().item())


def main(argv: list[str]) -> None:
    """Prints one table."""
    flags, words = read_known(Flags, argv, __doc__)
    read = logits_of(flags.logits, words)
    images = read.tables()
    finds = finds_of(flags, read.costs, Reading(read.confidence))
    generator = torch.Generator().manual_seed(flags.seed)
    ways = list(dict.fromkeys(finds.values()))
    tallies = {demand: Tally() for demand in demands()}
    for _ in range(flags.rounds):
        drawn = torch.randint(len(images), (flags.draw,), generator=generator)
        rounds = {find: Round(images, read.costs, drawn, find) for find in ways}
        for demand, tally in tallies.items():
            rounds[finds[demand.risk]].count(demand, tally)
    right = 100 * images.full_correct.double().mean().item()
    print(f"{flags.rounds} rounds, {flags.draw} of {len(images)} images each, full network {right:.2f} %")
    print_table(HEADS, [tally.cells(demand) for demand, tally in tallies.items()])


if __name__ == "__main__":
    run_main(main)
