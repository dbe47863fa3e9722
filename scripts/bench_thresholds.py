"""Time of the quota rule over a whole sweep, vectorised against one sample at a time.

    python scripts/bench_thresholds.py [--exits 5] [--samples 50000]

Floor: per setting, each exit but the last reads its row of confidences once to select the survivors and once
to find the threshold, so about 2 * 4 * 50,000 * 4 bytes * 39 settings = 62 MB, some 10 ms at 6 GB/s;
selection (not sorting) keeps the work linear. The loop is what the published tools do: it sorts per setting
and walks samples in Python.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.thresholds import EVERYBODY, MSDNET_RATIOS, NOBODY, geometric_quotas, quota_thresholds, simulate


def loop_thresholds(confidence, quotas):
    """The published procedure, sample by sample."""
    num_exits, num_samples = confidence.shape
    left, thresholds = set(range(num_samples)), [NOBODY] * (num_exits - 1) + [EVERYBODY]
    for k in range(num_exits - 1):
        wanted = math.floor(torch.tensor(num_samples, dtype=torch.float32) * quotas[k])
        count, values = 0, confidence[k].tolist()
        for i in sorted(range(num_samples), key=values.__getitem__, reverse=True):
            if i in left:
                count += 1
                if count == wanted:
                    thresholds[k] = values[i]
                    break
        left = {i for i in left if values[i] < thresholds[k]}
    return thresholds


def loop_simulate(confidence, correct, thresholds, costs):
    """Accuracy and mean cost, sample by sample."""
    hits, cost, columns, rights = 0, 0.0, confidence.T.tolist(), correct.T.tolist()
    for values, right in zip(columns, rights, strict=True):
        k = next(k for k, value in enumerate(values) if value >= thresholds[k])
        hits += right[k]
        cost += costs[k]
    return hits / len(columns), cost / len(columns)


def main():
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exits", type=int, default=5)
    parser.add_argument("--samples", type=int, default=50_000)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(args.exits, args.samples, generator=generator)
    correct = torch.rand(args.exits, args.samples, generator=generator) < confidence
    costs = [float(k + 1) for k in range(args.exits)]
    quotas = [geometric_quotas(p, args.exits) for p in MSDNET_RATIOS]

    start = time.perf_counter()
    thresholds = [quota_thresholds(confidence, q) for q in quotas]
    rows = [simulate(confidence, correct, t, costs) for t in thresholds]
    fast = time.perf_counter() - start

    start = time.perf_counter()
    loop = [loop_thresholds(confidence, q) for q in quotas]
    loop_rows = [loop_simulate(confidence, correct, t, costs) for t in loop]
    slow = time.perf_counter() - start

    same = all(t.tolist() == t2 for t, t2 in zip(thresholds, loop, strict=True)) and all(
        (r.accuracy, round(r.cost, 9)) == (a, round(c, 9)) for r, (a, c) in zip(rows, loop_rows, strict=True)
    )
    print(f"K = {args.exits}, N = {args.samples}, {len(quotas)} settings, {torch.get_num_threads()} threads")
    print("method              seconds   ratio")
    print(f"sample by sample  {slow:9.2f}{1:8.0f}")
    print(f"vectorised        {fast:9.3f}{slow / fast:8.0f}")
    print("thresholds, accuracies and costs are " + ("identical" if same else "NOT identical"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
