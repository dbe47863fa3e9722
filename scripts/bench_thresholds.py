"""Time of the quota rule over a whole sweep, vectorised against one sample at a time.

    python scripts/bench_thresholds.py [--exits 5] [--samples 50000]

Floor: per setting, each exit but the last reads its row of confidences once to select the survivors and
once to find the threshold, so about 2 * 4 * 50,000 * 4 bytes * 39 settings = 62 MB, some 10 ms at 6 GB/s.
The loop is what the published tools do: it sorts per setting and walks samples in Python.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common import print_table, read_flags, timed

import torch
from torch import Tensor

from adaptive.thresholds import EVERYBODY, MSDNET_RATIOS, NOBODY, geometric_quotas, quota_thresholds, simulate
from utils import UserError, option, run_main

Setting = tuple[list[float], float, float]  # thresholds [K], accuracy (a fraction), mean cost


@dataclass(frozen=True)
class Flags:
    """The size of the tables."""

    exits: int = option(5, low=2)
    samples: int = option(50_000, low=1)


def vectorised(confidence: Tensor, correct: Tensor, quotas: Tensor, costs: Sequence[float]) -> Setting:
    """The rule as it is here, for `confidence` and `correct` [K, N], `quotas` and `costs` [K]."""
    thresholds = quota_thresholds(confidence, quotas)
    found = simulate(confidence, correct, thresholds, costs)
    return thresholds.tolist(), found.accuracy, round(found.cost, 9)


def one_by_one(confidence: Tensor, correct: Tensor, quotas: Tensor, costs: Sequence[float]) -> Setting:
    """The same, sample by sample."""
    thresholds = loop_thresholds(confidence, quotas)
    hits = 0
    cost = 0.0
    for values, right in zip(confidence.T.tolist(), correct.T.tolist(), strict=True):
        k = next(k for k, value in enumerate(values) if value >= thresholds[k])
        hits += right[k]
        cost += costs[k]
    total = confidence.shape[1]
    return thresholds, hits / total, round(cost / total, 9)


def loop_thresholds(confidence: Tensor, quotas: Tensor) -> list[float]:
    """The published procedure."""
    num_exits, num_samples = confidence.shape
    left = set(range(num_samples))
    thresholds = [NOBODY] * (num_exits - 1) + [EVERYBODY]
    for k in range(num_exits - 1):
        wanted = math.floor(torch.tensor(num_samples, dtype=torch.float32) * quotas[k])
        values = confidence[k].tolist()
        order = sorted(range(num_samples), key=values.__getitem__, reverse=True)
        there = [i for i in order if i in left]
        if 0 < wanted <= len(there):
            thresholds[k] = values[there[wanted - 1]]
        left = {i for i in left if values[i] < thresholds[k]}
    return thresholds


def main(argv: list[str]) -> None:
    """Prints one table."""
    flags = read_flags(Flags, argv, __doc__)
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(flags.exits, flags.samples, generator=generator)
    correct = torch.rand(flags.exits, flags.samples, generator=generator) < confidence
    costs = [float(k + 1) for k in range(flags.exits)]
    quotas = [geometric_quotas(ratio, flags.exits) for ratio in MSDNET_RATIOS]
    found, fast = timed(lambda: [vectorised(confidence, correct, q, costs) for q in quotas])
    expected, slow = timed(lambda: [one_by_one(confidence, correct, q, costs) for q in quotas])
    threads = torch.get_num_threads()
    print(f"K = {flags.exits}, N = {flags.samples}, {len(quotas)} settings, {threads} threads")
    rows = [("sample by sample", slow, 1.0), ("vectorised", fast, slow / fast)]
    print_table(["method", "seconds:.3f", "ratio:.0f"], rows)
    if found != expected:
        raise UserError("thresholds, accuracies and costs are NOT identical")
    print("thresholds, accuracies and costs are identical")


if __name__ == "__main__":
    run_main(main)
