"""Compares cascades made of the same networks, under one budget after another and for uneven traffic.

    python scripts/compare_cascades.py --networks A B C --cascades 0,2 1,2 0,1,2 --budgets 20e6 40e6 80e6 \
        --data_set CIFAR10 --data_path "$DATA"
    python scripts/compare_cascades.py --networks A B C --cascades 0,2 1,2 --popular 0 1 2 --mixes 0.5 0.7 0.9
    ...

Networks are written as for eval_dynamic.py, whose other flags apply; each runs once on every image.
Thresholds are chosen on one half of the test images among all combinations of quantiles, for the least cost
or the best accuracy there, and reported on the other half. `--popular` with `--mixes` weighs the images so
that these classes are that share of the traffic, and asks for the least cost at most `--drop` below the
accuracy of the last network.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.flops import single_costs
from adaptive.thresholds import EVERYBODY, cheapest, exit_of, within_budget
from eval_dynamic import FLAGS, Evaluation
from models import model_options, nearest
from training.flags import parse_flags
from utils import run_main


class Point(NamedTuple):
    """What a set of thresholds does: accuracy (a fraction), mean multiply-adds, share that leaves at every
    exit."""

    accuracy: float
    macs: float
    shares: list[float]


def operate(tables, weights, thresholds, costs):
    """What thresholds [K] do to weighted samples [N]."""
    exits = exit_of(tables.confidence, thresholds)
    right = tables.correct.gather(0, exits[None])[0].double()
    shares = [(weights * (exits == k)).sum().item() for k in range(len(costs))]
    return Point(
        (weights * right).sum().item(), sum(s * c for s, c in zip(shares, costs, strict=True)), shares
    )


def candidates(confidence, steps):
    """Threshold combinations [K]: quantiles of every exit's confidence, nobody and everybody among them."""
    levels = torch.linspace(0, 1, steps, dtype=torch.float64)
    rows = [[*row.double().quantile(levels).tolist(), 1e8] for row in confidence[:-1]]
    return [torch.tensor([*limits, EVERYBODY], dtype=torch.float64) for limits in product(*rows)]


def traffic(tables, popular, share):
    """The weight of every sample [N], summing to 1, when the popular classes make up `share` (None: as they
    come)."""
    if share is None:
        return torch.full((len(tables),), 1 / len(tables), dtype=torch.float64)
    wanted = torch.isin(tables.targets, torch.tensor(popular))
    return torch.where(wanted, share / wanted.sum(), (1 - share) / (~wanted).sum()).double()


class Cascade:
    """Some of the networks in a row: their tables, cut from everybody's, and what their exits cost."""

    def __init__(self, stages, halves, alone, steps):
        self.stages = stages
        self.calib, self.test = (self.of(half) for half in halves)
        self.costs = torch.tensor([alone[i] for i in stages], dtype=torch.float64).cumsum(0).tolist()
        self.limits = candidates(self.calib.confidence, steps if len(stages) < 4 else 11)

    def of(self, tables):
        """The rows of tables that belong to the cascade."""
        pick = torch.tensor(self.stages)
        parts = (
            tables.confidence,
            tables.correct,
            tables.correct5,
            tables.loss,
            tables.scores[:, pick],
            tables.targets,
        )
        return type(tables)(*(part[pick] if i < 4 else part for i, part in enumerate(parts)))

    def choose(self, weigh, rule):
        """The point on the test half of the thresholds that `rule(accuracies, costs)` picks on the other."""
        tried = [operate(self.calib, weigh(self.calib), limits, self.costs) for limits in self.limits]
        best = rule([point.accuracy for point in tried], [point.macs for point in tried])
        return operate(self.test, weigh(self.test), self.limits[best], self.costs)


def shown(name, point):
    """One line of a table."""
    shares = " ".join(f"{100 * share:5.1f}" for share in point.shares)
    return f"  {name:14}{100 * point.accuracy:8.2f} %{point.macs / 1e6:10.2f} M   leave at each, %: {shares}"


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", required=True, metavar="NAME:weights=FILE")
    parser.add_argument("--cascades", nargs="+", required=True, help="numbers of networks, as in 0,2")
    parser.add_argument("--budgets", nargs="*", type=float, default=[], help="multiply-adds per image")
    parser.add_argument("--popular", nargs="*", type=int, default=[], help="the popular classes")
    parser.add_argument("--mixes", nargs="*", type=float, default=[], help="their shares of the traffic")
    parser.add_argument("--drop", type=float, default=0.005, help="accuracy that may be lost, a fraction")
    parser.add_argument("--steps", type=int, default=41, help="quantiles tried per exit")
    args, rest = parser.parse_known_args(argv)
    words = ["--model", "ebjr", "--networks", *args.networks, "--calib", "half_test", *rest]
    evaluation = Evaluation(*parse_flags(FLAGS, words, model_options, nearest))
    stages = [[int(i) for i in text.split(",")] for text in args.cascades]
    known = range(evaluation.model.num_exits)
    wrong = [
        text for text, row in zip(args.cascades, stages, strict=True) if not row or not set(row) <= set(known)
    ]
    if wrong or bool(args.popular) != bool(args.mixes):
        raise ValueError(
            f"--cascades {wrong[0]}: accepted: numbers from 0 to {known[-1]}"
            if wrong
            else "--popular needs --mixes"
        )
    test = evaluation.tables(evaluation.splits.test, "test")
    half, other, _ = evaluation.calibrate(test)
    alone = single_costs(evaluation.model, evaluation.shape)
    print(
        f"thresholds from {len(half)} test images, figures of the other {len(other)}; {evaluation.args.confidence}"
    )
    for k in known:
        print(
            f"network {k}: {100 * other.correct[k].double().mean():.2f} %, {alone[k] / 1e6:.2f} M, {args.networks[k]}"
        )
    cascades = {
        text: Cascade(row, (half, other), alone, args.steps)
        for text, row in zip(args.cascades, stages, strict=True)
    }
    for budget in args.budgets:
        print(f"at most {budget / 1e6:.1f} M per image")
        for name, cascade in cascades.items():
            if cascade.costs[0] <= budget:
                rule = lambda accuracies, costs, b=budget: within_budget(accuracies, costs, b)  # noqa: E731
                print(shown(name, cascade.choose(lambda t: traffic(t, (), None), rule)))
    for mix in args.mixes:
        weigh = lambda tables, q=mix: traffic(tables, args.popular, q)  # noqa: E731
        print(
            f"{100 * mix:.0f} % of the traffic are classes {args.popular}: least cost within {100 * args.drop} points"
        )
        for name, cascade in cascades.items():
            last = (weigh(cascade.calib) * cascade.calib.correct[-1]).sum().item()
            rule = lambda accuracies, costs, a=last - args.drop: cheapest(accuracies, costs, a)  # noqa: E731
            print(shown(name, cascade.choose(weigh, rule)))


if __name__ == "__main__":
    run_main(main)
