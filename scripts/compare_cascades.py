"""Compares cascades made of the same networks, under one budget after another and for uneven traffic.

    python scripts/compare_cascades.py --networks A B C --cascades 0,2 1,2 0,1,2 --budgets 20e6 40e6 80e6 \
        --data_set CIFAR10 --data_path "$DATA"
    python scripts/compare_cascades.py --networks A B C --cascades 0,2 1,2 --popular 0 1 2 --mixes 0.5 0.9 ...

Networks are written as for eval_dynamic.py, whose other flags apply; each runs once on every image.
Thresholds are chosen on one half of the test images among all combinations of quantiles, for the least cost
or the best accuracy there, and reported on the other half. `--popular` with `--mixes` weighs the images so
that these classes are that share of the traffic, and asks for the least cost at most `--drop` below the
accuracy of the last network. `--policy` names a saved policy of all networks in a row, to compare with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import NamedTuple

from common import read_known

import torch
from torch import Tensor

from adaptive.exit_tables import ExitTables
from adaptive.flops import count, single_costs
from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY, NOBODY, cheapest, exit_of, within_budget
from datasets import ordered_loader
from engine import evaluate
from experiment.recipe import read_command
from experiment.samples import calibrate, tables
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import UserError, option, run_main

Weigh = Callable[[ExitTables], Tensor]  # tables to the weight of every sample [N], summing to 1
Rule = Callable[[Sequence[float], Sequence[float]], int]  # accuracies and costs to the index of the best


@dataclass(frozen=True)
class Flags:
    """What is compared; the flags of eval_dynamic.py apply besides."""

    networks: tuple[str, ...] = option((), "NAME:weights=FILE ..., the cheapest first")
    cascades: tuple[str, ...] = option((), "numbers of networks, as in 0,2")
    budgets: tuple[float, ...] = option((), "multiply-adds per image")
    popular: tuple[int, ...] = option((), "the popular classes")
    mixes: tuple[float, ...] = option((), "their shares of the traffic")
    drop: float = option(0.005, "accuracy that may be lost, a fraction")
    steps: int = option(41, "quantiles tried per exit", low=2)
    policy: str = option("", "a saved policy of all networks in a row")


class Point(NamedTuple):
    """What thresholds do: accuracy (a fraction), mean multiply-adds, share that leaves at each exit."""

    accuracy: float
    macs: float
    shares: list[float]


def operate(tables: ExitTables, weights: Tensor, thresholds: Tensor, costs: Sequence[float]) -> Point:
    """What thresholds [K] do to weighted samples [N]."""
    exits = exit_of(tables.confidence, thresholds)
    right = tables.correct.gather(0, exits[None])[0]
    shares = [weights[exits == k].sum().item() for k in range(len(costs))]
    macs = sum(share * cost for share, cost in zip(shares, costs, strict=True))
    return Point(weights[right].sum().item(), macs, shares)


def candidates(confidence: Tensor, steps: int) -> list[Tensor]:
    """Threshold combinations [K]: quantiles of every exit's confidence, including nobody and everybody."""
    levels = torch.linspace(0, 1, steps, dtype=torch.float64)
    nobody = levels.new_tensor([NOBODY])
    rows = [torch.cat([row.double().quantile(levels), nobody]) for row in confidence[:-1]]
    everybody = levels.new_tensor([EVERYBODY])
    return [torch.stack(limits) for limits in product(*rows, everybody)]


def traffic(tables: ExitTables, popular: Sequence[int], share: float | None) -> Tensor:
    """The weight of every sample [N] when popular classes make up `share` (None: uniform)."""
    if share is None:
        return torch.full((len(tables),), 1 / len(tables), dtype=torch.float64)
    wanted = torch.isin(tables.targets, torch.tensor(popular))
    often = share / wanted.sum()
    rarely = (1 - share) / (~wanted).sum()
    return torch.where(wanted, often, rarely).double()


class Cascade:
    """Some of the networks in a row: their part of the common tables, and the costs of their exits."""

    def __init__(
        self, stages: list[int], halves: tuple[ExitTables, ExitTables], alone: Sequence[int], steps: int
    ) -> None:
        self.calib, self.test = (half.of_exits(stages) for half in halves)
        self.costs = list(accumulate(float(alone[i]) for i in stages))
        self.limits = candidates(self.calib.confidence, steps if len(stages) < 4 else 11)

    def choose(self, weigh: Weigh, rule: Rule) -> Point:
        """The point on the test half, for the thresholds that the rule picks on the other half."""
        weights = weigh(self.calib)
        tried = [operate(self.calib, weights, limits, self.costs) for limits in self.limits]
        best = rule([point.accuracy for point in tried], [point.macs for point in tried])
        return operate(self.test, weigh(self.test), self.limits[best], self.costs)


class Saved:
    """A saved policy of all networks in a row, whose thresholds are not chosen here.

    Reads the images as the policy does. Raises ValueError for the policy of another network.
    """

    def __init__(self, file: str, subject: Subject) -> None:
        self.policy = Policy.load(file).check(subject.opened)
        loader = ordered_loader(subject.splits.test, subject.recipe.runtime, subject.compute)
        reading = self.policy.reading
        found = evaluate(subject.network, loader, subject.compute, reading=reading, title="policy")
        self.test = calibrate(subject, found)[0]  # the same half as that of the cascades
        self.costs = self.policy.leaving(count(subject.network, subject.shape).stages)

    def point(self, weigh: Weigh) -> Point:
        """The point on the test half."""
        limits = self.test.confidence.new_tensor(self.policy.thresholds)
        return operate(self.test, weigh(self.test), limits, self.costs)


def stages_of(texts: Sequence[str], networks: int) -> dict[str, list[int]]:
    """The numbers of the networks in each cascade, as in "0,2"; ValueError where there is no such network."""
    stages = {text: [int(number) for number in text.split(",")] for text in texts}
    for text, row in stages.items():
        if not set(row) <= set(range(networks)):
            raise UserError(f"--cascades {text}: accepted: numbers from 0 to {networks - 1}")
    return stages


def show(name: str, point: Point) -> None:
    """One line for a cascade."""
    accuracy = 100 * point.accuracy
    shares = " ".join(f"{100 * share:5.1f}" for share in point.shares)
    print(f"  {name:14}{accuracy:8.2f} %{point.macs / 1e6:10.2f} M   leave at each, %: {shares}")


def show_budgets(cascades: dict[str, Cascade], budgets: Sequence[float], saved: Saved | None) -> None:
    """For every budget, what each cascade that can afford its first network gains; first, a saved policy."""
    weigh = partial(traffic, popular=(), share=None)
    if saved:
        print(f"policy {saved.policy.name!r}")
        show("saved", saved.point(weigh))
    for budget in budgets:
        print(f"at most {budget / 1e6:.1f} M per image")
        for name, one in cascades.items():
            if one.costs[0] <= budget:
                show(name, one.choose(weigh, partial(within_budget, budget=budget)))


def show_mixes(cascades: dict[str, Cascade], flags: Flags, saved: Saved | None) -> None:
    """For every mix of the traffic, what each cascade costs that stays close to its last network."""
    for mix in flags.mixes:
        weigh = partial(traffic, popular=flags.popular, share=mix)
        classes = f"{100 * mix:.0f} % of the traffic are classes {list(flags.popular)}"
        print(f"{classes}: least cost within {100 * flags.drop} points")
        if saved:
            show("saved", saved.point(weigh))
        for name, one in cascades.items():
            last = weigh(one.calib)[one.calib.correct[-1]].sum().item()
            show(name, one.choose(weigh, partial(cheapest, accuracy=last - flags.drop)))


def open_networks(flags: Flags, words: list[str]) -> Subject:
    """All networks as one cascade, on the images that the other words name."""
    given = ["--model", "ebjr", "--networks", *flags.networks, "--calib", "half_test", *words]
    subject = open_evaluation(read_command(EVALUATION, given))
    count = subject.network.num_exits
    if count != len(flags.networks):
        raise UserError(
            f"{len(flags.networks)} networks with {count} exits in all; give networks of one exit"
        )
    return subject


def main(argv: list[str]) -> None:
    """The command line."""
    flags, words = read_known(Flags, argv, __doc__)
    if bool(flags.popular) != bool(flags.mixes):
        raise UserError("--popular needs --mixes")
    if not flags.cascades:
        raise UserError("name the cascades to compare, as in --cascades 0,2 0,1,2")
    stages = stages_of(flags.cascades, len(flags.networks))
    subject = open_networks(flags, words)
    saved = Saved(flags.policy, subject) if flags.policy else None
    other, half, _ = calibrate(subject, tables(subject, subject.splits.test, "test"))
    alone = single_costs(subject.network, subject.shape)
    kind = subject.recipe.exits.confidence
    print(f"thresholds from {len(half)} test images, figures of the other {len(other)}; {kind}")
    right = other.means()["acc1"]
    for k, network in enumerate(flags.networks):
        print(f"network {k}: {100 * right[k]:.2f} %, {alone[k] / 1e6:.2f} M, {network}")
    cascades = {text: Cascade(row, (half, other), alone, flags.steps) for text, row in stages.items()}
    show_budgets(cascades, flags.budgets, saved)
    show_mixes(cascades, flags, saved)


if __name__ == "__main__":
    run_main(main)
