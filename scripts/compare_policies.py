"""Compares ways to find thresholds by what they do on images that they were not found on.

    python scripts/compare_policies.py --checkpoint FILE --data_path "$DATA" [--budgets 10e6 20e6]
    python scripts/compare_policies.py --model ebjr --networks A B --data_set CIFAR10 --data_path "$DATA"
    python scripts/compare_policies.py --logits FILE

The flags of eval_dynamic.py apply. All test images, and those that were held out of training, are split into
random halves: policies are found and chosen on one half, and judged on the other. Shown is the quota
rule's accuracy, and for the others what they gain over it on the same images, in points, with the interval
that holds 95 % of the halves. The last columns are the cheapest policies expected to be as accurate as the
last exit: what they gain over that, and how many times as much the quota rule's costs. With `--logits`, that
file of logits is read where it exists, and written otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from common import read_known

import torch
from torch import Tensor

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.exits import Exits
from adaptive.intervals import spread
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.rules import Rule, policies_of, rules_of
from adaptive.search import search_front
from adaptive.thresholds import cheapest, within_budget
from experiment.logits import Logits, logits_of
from experiment.recipe import read_command
from experiment.samples import halves
from experiment.subject import EVALUATION
from utils import option, run_main

Find = Callable[[ExitTables, StageCosts, Reading], list[Policy]]


@dataclass(frozen=True)
class Flags:
    """What is compared; the flags of eval_dynamic.py apply besides."""

    logits: str = option("", "file of logits: read where it exists, written otherwise")
    halves: int = option(100, "random halves of the images", low=2)
    budgets: tuple[float, ...] = option((), "multiply-adds per image; default: six")
    mapped: int = option(60, "accuracies tried for thresholds at equal accuracy", low=2)


class Method(NamedTuple):
    """A way to find policies, how they read logits, and the tables of all images so read."""

    name: str
    find: Find
    reading: Reading
    tables: ExitTables


def by_rules(rules: Sequence[Rule]) -> Find:
    """The policy of every rule."""
    return lambda fit, costs, reading: policies_of(rules, fit, costs, reading)


def methods_of(read: Logits, flags: Flags, sweep: str) -> list[Method]:
    """The methods compared, the quota rule first."""
    plain = Reading(read.confidence)
    costs = read.costs.leaving()
    quotas = rules_of(Exits(quota_sweep=sweep), costs)
    accuracies = tuple((i + 0.5) / flags.mapped for i in range(flags.mapped))
    mapped = rules_of(Exits(mapped_accuracy=accuracies), costs)[-flags.mapped :]
    ways: list[tuple[str, Find, Reading]] = [
        ("quota rule", by_rules(quotas), plain),
        ("equal accuracy", by_rules(mapped), plain),
        ("search", search_front, plain),
        ("search, best answer", search_front, replace(plain, answer="best")),
        ("search, mean answer", search_front, replace(plain, answer="mean")),
    ]
    tables = cache(read.tables)
    return [Method(name, find, reading, tables(reading)) for name, find, reading in ways]


def chosen(policies: Sequence[Policy], budgets: Sequence[float], goal: float) -> list[Policy]:
    """The best policy expected within each budget, and the cheapest one expected to have the accuracy `goal`.

    The cheapest or the most accurate one where there is none.
    """
    accuracies = [one.accuracy for one in policies]
    costs = [one.macs for one in policies]
    rows = [within_budget(accuracies, costs, max(budget, min(costs))) for budget in budgets]
    rows.append(cheapest(accuracies, costs, min(goal, max(accuracies))))
    return [policies[row] for row in rows]


def judge(methods: Sequence[Method], costs: StageCosts, budgets: Sequence[float], rounds: int) -> Tensor:
    """Accuracy and cost on unseen halves, [rounds, methods, budgets + 1, 2].

    The last accuracy, without a budget, is less that of the last exit.
    """
    found = []
    for seed in range(rounds):
        seen, unseen = halves(len(methods[0].tables), seed)
        for method in methods:
            fit = method.tables.part(seen)
            other = method.tables.part(unseen)
            goal = fit.full_correct.double().mean().item()
            policies = method.find(fit, costs, method.reading)
            points = [policy.simulate(other, costs) for policy in chosen(policies, budgets, goal)]
            figures = [[point.accuracy, point.macs] for point in points]
            figures[-1][0] -= other.full_correct.double().mean().item()
            found.append(figures)
    return torch.tensor(found, dtype=torch.float64).view(rounds, len(methods), -1, 2)


def table_lines(names: Sequence[str], found: Tensor, budgets: Sequence[float]) -> list[str]:
    """What `judge` found as a table in Markdown."""
    heads = [*(f"{budget / 1e6:.4g} M" for budget in budgets), "over the last exit", "times fewer"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    accuracy = 100 * found[..., :-1, 0].permute(1, 2, 0)  # [methods, budgets, rounds]
    over_last = 100 * found[..., -1, 0].T
    cost = found[..., -1, 1].T
    cells = [f"{one:.2f} %" for one in accuracy[0].mean(-1).tolist()]
    paid = f"{cost[0].mean().item() / 1e6:.4g} M"
    for m, name in enumerate(names):
        if m > 0:
            cells = [spread(row).text(sign="+") for row in accuracy[m] - accuracy[0]]
            paid = spread(cost[0] / cost[m]).text()
        full = spread(over_last[m]).text(sign="+")
        lines.append(f"| {' | '.join([name, *cells, full, paid])} |")
    return lines


def default_budgets(quota: Method, costs: StageCosts) -> list[float]:
    """Six budgets between the cheapest setting of the quota rule and all exits, in equal ratios."""
    low = quota.find(quota.tables, costs, quota.reading)[0].macs
    high = max(costs.leaving())
    return [low * (high / low) ** (i / 7) for i in range(1, 7)]


def main(argv: list[str]) -> None:
    """Prints one table."""
    flags, words = read_known(Flags, argv, __doc__)
    sweep = read_command(EVALUATION, words).values.get("quota_sweep", "msdnet")
    read = logits_of(flags.logits, words)
    methods = methods_of(read, flags, sweep)
    budgets = list(flags.budgets) or default_budgets(methods[0], read.costs)
    found = judge(methods, read.costs, budgets, flags.halves)
    exits, images, _ = read.logits.shape
    print(f"{images} images, {flags.halves} random halves, {exits} exits, {read.confidence}")
    print("\n".join(table_lines([method.name for method in methods], found, budgets)))


if __name__ == "__main__":
    run_main(main)
