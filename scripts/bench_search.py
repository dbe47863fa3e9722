"""Time of the search for thresholds, and what it finds beside the quota rule on samples that it has not seen.

    python scripts/bench_search.py [--exits 5] [--samples 5000 50000]

Tables are random: harder samples need later exits. Floor: the grid of five exits has 320 thousand settings,
which take some ten additions each in tables of 8 bytes, so 50 MB or 8 ms at 6 GB/s. The rest is bookkeeping
for 16 sets of exits, for all samples, and on smaller grids for four folds and three shares.
"""

from dataclasses import dataclass
from statistics import median

from common import print_table, read_flags, timed

import torch
from torch import Tensor

from adaptive.costs import StageCosts
from adaptive.grids import Front, Prices, outcomes
from adaptive.search import search
from adaptive.thresholds import MSDNET_RATIOS, geometric_quotas, quota_thresholds
from utils import option, run_main

HEADS = [
    "samples",
    "seconds:.3f",
    "slowest:.3f",
    "settings",
    "more accurate than quota, points:.2f",
    "least:.2f",
]


@dataclass(frozen=True)
class Flags:
    """The size of the tables."""

    exits: int = option(5, low=2)
    samples: tuple[int, ...] = option((5000, 50_000), "one table each", low=2)
    rounds: int = option(5, "of which the median is shown", low=1)
    unseen: int = option(50_000, "other samples, to judge on", low=1)


def random_tables(exits: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Confidence and correct [K, N] of exits of which each is better than the one before."""
    generator = torch.Generator().manual_seed(seed)
    skill = torch.linspace(0, 2, exits)[:, None]
    hard = 2 * torch.randn(samples, generator=generator)
    latent = skill - hard + torch.randn(exits, samples, generator=generator)
    correct = torch.rand(exits, samples, generator=generator) < (2 * latent).sigmoid()
    return latent.sigmoid(), correct


def quota_front(confidence: Tensor, correct: Tensor, prices: Prices) -> Front:
    """The best of the published sweep."""
    quotas = [geometric_quotas(ratio, len(confidence)) for ratio in MSDNET_RATIOS]
    limits = torch.stack([quota_thresholds(confidence, one) for one in quotas]).double()
    return Front.of([Front(limits, *outcomes(confidence, correct, limits, prices))])


def main(argv: list[str]) -> None:
    """Prints one table."""
    flags = read_flags(Flags, argv, __doc__)
    before = tuple(tuple(range(k)) for k in range(flags.exits))
    costs = StageCosts((1.0,) * flags.exits, (0.1,) * flags.exits, before, (False,) * flags.exits)
    prices = Prices(costs)
    rows = []
    others = random_tables(flags.exits, flags.unseen, 1)
    budgets = torch.linspace(1.2, costs.leaving()[-1], 8, dtype=torch.float64)[:-1]
    for samples in flags.samples:
        tables = random_tables(flags.exits, samples, 0)
        runs = [timed(lambda tables=tables: search(*tables, prices)) for _ in range(flags.rounds + 1)][1:]
        front = runs[0][0][0]
        seconds = [one for _, one in runs]
        right = []
        for found in (front, quota_front(*tables, prices)):
            right.append(outcomes(*others, found.thresholds[found.within(budgets)], prices)[0])
        gain = 100 * (right[0] - right[1])
        rows.append(
            (samples, median(seconds), max(seconds), len(front), gain.mean().item(), gain.min().item())
        )
    print(f"K = {flags.exits}, {flags.rounds} rounds, {torch.get_num_threads()} threads, seven budgets")
    print_table(HEADS, rows)


if __name__ == "__main__":
    run_main(main)
