"""What the confidence of a trained network is worth, and policies that are built on it, on held-out images.

    python scripts/measure_confidence.py --checkpoint runs/c10/checkpoint-best.pth --data_path "$DATA"
    python scripts/measure_confidence.py --logits FILE

The flags of eval_dynamic.py that name a network and its data apply. With `--logits`, that file of logits is
read where it exists, and written otherwise. Temperatures are fitted on the calibration images, on half of the
test images without any. Then test images are halved at random, again and again: thresholds come from one
half, figures from the other one. An interval holds 95 % of the halves; it is narrower than one over new
images would be, since halves share images.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from common import percents, print_table, read_known

import torch
from torch import Tensor

from adaptive.calibration import TemperatureFit
from adaptive.confidence import AGREEMENT, EVERYBODY
from adaptive.exit_tables import ExitTables
from adaptive.intervals import mean_estimates, spread
from adaptive.one_number import mapped_policies, patience_policies
from adaptive.policy import OperatingPoint, Policy
from adaptive.reading import ANSWERS, Reading
from adaptive.reliability import confidence_figures
from adaptive.thresholds import geometric_quotas, quota_thresholds
from experiment.confidence_lines import confidence_lines
from experiment.logits import Logits, logits_of
from experiment.samples import halves
from utils import option, run_main

STEPS = 14  # bisections of log p between these ends
ENDS = -5.0, 5.0


@dataclass(frozen=True)
class Flags:
    """What is measured; the flags of eval_dynamic.py apply besides."""

    logits: str = option("", "file of logits: read where it exists, written otherwise")
    halves: int = option(100, "how often the test images are halved", low=1)
    budgets: tuple[float, ...] = option(
        (0.25, 0.5, 0.75), "how far from the first exit's cost (0) to the last one's (1)", low=0, high=1
    )
    accuracies: tuple[float, ...] = option((0.8, 0.9, 0.95, 0.98), "mapped accuracies", low=0, high=1)


class Halves:
    """Test tables by reading, halved again and again; `costs` [K] of an image that leaves at each exit."""

    def __init__(self, test: Logits, readings: Iterable[Reading], number: int) -> None:
        self.costs = test.costs.leaving()
        self.tables = {one: test.tables(one) for one in readings}
        self.halves = [halves(len(test.targets), seed) for seed in range(number)]

    def calibs(self, reading: Reading) -> list[ExitTables]:
        """The halves to find policies on."""
        return [self.tables[reading].part(half) for half, _ in self.halves]

    def others(self, reading: Reading) -> list[ExitTables]:
        """The halves to judge them on."""
        return [self.tables[reading].part(half) for _, half in self.halves]

    def points(self, reading: Reading, policies: Sequence[Policy]) -> list[OperatingPoint]:
        """What one policy after the other does on the other half."""
        pairs = zip(policies, self.others(reading), strict=True)
        return [policy.simulate(table, self.costs) for policy, table in pairs]

    def by_exit(self, reading: Reading, policies: Sequence[Policy]) -> tuple[Tensor, Tensor]:
        """How many leave at each exit, and how many of these are right, on the other halves: [H, K] each."""
        left = []
        right = []
        for policy, table in zip(policies, self.others(reading), strict=True):
            exits = policy.exit_of(table)
            hits = table.correct.gather(0, exits[None])[0].double()
            left.append(exits.bincount(minlength=len(self.costs)).double())
            right.append(exits.bincount(hits, len(self.costs)))
        return torch.stack(left), torch.stack(right)

    def quota(self, reading: Reading, budgets: Sequence[float]) -> list[OperatingPoint]:
        """What the quota rule does on the other halves, with a budget (multiply-adds) for each."""
        pairs = zip(self.calibs(reading), budgets, strict=True)
        policies = [within(calib, budget, reading, self.costs) for calib, budget in pairs]
        return self.points(reading, policies)

    def over_quota(self, policies: Sequence[Policy], reading: Reading, other: Reading) -> str:
        """What policies gain over the quota rule with another reading, where both cost the same on calib."""
        pairs = zip(policies, self.calibs(reading), strict=True)
        macs = [policy.simulate(calib, self.costs).macs for policy, calib in pairs]
        return gains(self.points(reading, policies), self.quota(other, macs))


def within(calib: ExitTables, budget: float, reading: Reading, costs: Sequence[float]) -> Policy:
    """The policy of the quota rule that spends most of a budget on calibration images."""
    found = Policy.by(reading, (EVERYBODY,) * len(costs))
    low, high = ENDS
    for _ in range(STEPS):  # the larger the ratio of quotas, the later samples leave
        middle = (low + high) / 2
        quotas = geometric_quotas(math.exp(middle), len(costs))
        policy = Policy.by(reading, quota_thresholds(calib.confidence, quotas).tolist())
        if policy.simulate(calib, costs).macs > budget:
            high = middle
        else:
            low = middle
            found = policy
    return found


def gains(points: Sequence[OperatingPoint], others: Sequence[OperatingPoint]) -> str:
    """The `spread` of accuracy less that of others, in pairs, in points."""
    found = [one.accuracy - other.accuracy for one, other in zip(points, others, strict=True)]
    return spread(torch.tensor(found, dtype=torch.float64)).text(100, sign="+")


def averages(points: Sequence[OperatingPoint]) -> list[float]:
    """Mean accuracy in percent, and mean cost in millions of multiply-adds."""
    accuracy = fmean(point.accuracy for point in points)
    macs = fmean(point.macs for point in points)
    return [100 * accuracy, macs / 1e6]


def report_answers(halves: Halves, budgets: Sequence[float]) -> None:
    """Answers and temperatures: top-1 of the last exit, and of the quota rule under each budget."""
    plain = Reading()
    first = halves.costs[0]
    last = halves.costs[-1]
    totals = [first + share * (last - first) for share in budgets]
    base = [halves.quota(plain, [total] * len(halves.halves)) for total in totals]
    expected = halves.tables[plain].correct[-1].double()
    rows = []
    for reading, table in halves.tables.items():
        if reading.agreement:
            continue
        right = table.correct[-1].double()
        gain = mean_estimates((right - expected)[None])[0]
        row = [f"{reading.answer}{', temperatures' * bool(reading.temperatures)}"]
        row += [f"{100 * right.mean():.2f}", gain.text(100, sign="+")]
        for total, others in zip(totals, base, strict=True):
            points = halves.quota(reading, [total] * len(halves.halves))
            row += [f"{averages(points)[0]:.2f}", gains(points, others)]
        rows.append(row)
    heads = ["answer", "last exit, %", "difference"]
    for total in totals:
        heads += [f"at {total / 1e6:.4g} M MACs", "difference"]
    print("\nanswers, under the quota rule by max. probability")
    print_table(heads, rows)


def report_mapped(halves: Halves, accuracies: Sequence[float]) -> None:
    """Mapped accuracy: how right answers are that are given early, of maps from all and from those left."""
    plain = Reading()
    rows = []
    for wanted, everybody in product(accuracies, (False, True)):
        policies = []
        for calib in halves.calibs(plain):
            policies += mapped_policies(calib, plain, [wanted], everybody=everybody)
        left, right = halves.by_exit(plain, policies)
        early = (right.sum(0) / left.sum(0))[:-1]
        short = (right / left < wanted - 0.01)[:, :-1].double().mean()  # NaN, nobody left, is not below
        shown = percents(early.tolist(), 1).replace("nan", "-")
        shares = percents((left.sum(0) / left.sum()).tolist(), 0)
        row = [f"{100 * wanted:g} %, {'everybody' if everybody else 'those left'}", shown, shares]
        row += [100 * short.item(), *averages(halves.points(plain, policies))]
        rows.append([*row, halves.over_quota(policies, plain, plain)])
    print("\nmapped accuracy; short: exits of a half whose answers are over a point less right than wanted")
    heads = ["wanted, map of", "right at each exit but the last, %", "leave at each exit, %", "short, %:.1f"]
    print_table([*heads, "top-1, %:.2f", "MACs, M:.2f", "over the quota rule at equal cost"], rows)


def report_patience(halves: Halves, answers: Sequence[str]) -> None:
    """Patience beside the quota rule by the largest probability, with the same answers at the same cost."""
    rows = []
    for answer in answers:
        reading = Reading(AGREEMENT, answer)
        other = Reading(answer=answer)
        for policy in patience_policies(len(halves.costs), answer):
            policies = [policy] * len(halves.halves)
            figures = averages(halves.points(reading, policies))
            over = halves.over_quota(policies, reading, other)
            rows.append([f"{policy.name}, {answer}", *figures, over])
    print("\npatience")
    print_table(["policy, answer", "top-1, %:.2f", "MACs, M:.2f", "over the quota rule at equal cost"], rows)


def main(argv: list[str]) -> None:
    """Prints four tables."""
    flags, words = read_known(Flags, argv, __doc__)
    calib, test = logits_of(flags.logits, words).split()
    fit = TemperatureFit()
    fit.add(list(calib.logits), calib.targets)
    temperatures = fit.temperatures()
    readings = [Reading("max_prob", answer, given) for given in ((), temperatures) for answer in ANSWERS]
    counters = [Reading(AGREEMENT, answer) for answer in ("exit", "mean")]
    halves = Halves(test, [*readings, *counters], flags.halves)
    images = f"{len(calib.targets)} calibration images, {len(test.targets)} test images"
    print(f"{images}, {flags.halves} halves of these")
    plain = halves.tables[readings[0]]
    scaled = halves.tables[readings[len(ANSWERS)]]
    figures = confidence_figures(plain, scaled, temperatures)
    print("\n".join(confidence_lines(figures)))
    report_answers(halves, flags.budgets)
    report_mapped(halves, flags.accuracies)
    report_patience(halves, [one.answer for one in counters])


if __name__ == "__main__":
    run_main(main)
