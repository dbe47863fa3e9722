"""Images per second of real early exit against running all exits, over batch sizes.

    python scripts/bench_runtime.py [--checkpoint FILE] [--model msdnet_cifar_lin5] [--shares 50 20 15 10 5]

With a checkpoint: its weights, its test images, and the thresholds of the cheapest setting that is as accurate as the
last exit on calib. Without: random weights and images, and thresholds by which the given shares (percent) of the
images leave at each exit. Floor: the ideal ratio is that of the multiply-adds. Every line is measured in the same run;
policies take turns, and the median of the rounds is shown.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.confidence import max_prob
from adaptive.flops import exit_costs
from adaptive.inference import fold_batch_norm
from adaptive.latency import early_policies, interleaved, static_policies
from adaptive.thresholds import exit_of, quota_thresholds
from eval_dynamic import Evaluation
from models import create_model
from utils import describe_machine

SIZES = (1, 8, 64, 256)


def trained_subject(checkpoint, count):
    """Network, images and thresholds of a checkpoint."""
    job = Evaluation({"checkpoint": checkpoint, "num_workers": 1}, {})
    calib, test, _ = job.calibrate(job.tables(job.splits.test, "test"))
    rows = job.operating_points(calib, test)
    row = rows[job.choose(rows, calib)[0]]
    images = torch.stack(
        [job.splits.test[i][0] for i in range(0, len(job.splits.test), max(1, len(job.splits.test) // count))]
    )
    print(f"{checkpoint}: {row['policy']}, simulated accuracy {100 * row['accuracy']:.2f} % on all test images")
    return job.model, images[:count], torch.tensor(row["thresholds"])


def random_subject(name, shares, count):
    """A network with random weights, random images, and thresholds at which `shares` of them leave."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).eval()
    side = 224 if "imagenet" in name else 32
    images = torch.randn(count, 3, side, side)
    with torch.inference_mode():
        confidence = torch.cat([max_prob(torch.stack(model(part))) for part in images.split(64)], dim=1)
    return model, images, quota_thresholds(confidence, torch.tensor(shares) / 100)


def report(title, model, tuned, images, tuned_images, thresholds, rounds):
    """One table: batch size by policy."""
    costs = exit_costs(model, tuple(images.shape[1:]))
    policies = static_policies(model, tuned, images, tuned_images)
    policies = {"all exits": policies["all exits"], **early_policies(tuned, tuned_images, thresholds, "max_prob")}
    print(f"\n{title}")
    print("batch   all exits   throughput order   ratio   latency order   ratio   ideal   exits unlike simulated")
    with torch.inference_mode():
        confidence = torch.cat([max_prob(torch.stack(tuned(part))) for part in tuned_images.split(64)], dim=1)
    simulated = exit_of(confidence, thresholds)
    for size in SIZES:
        count = min(len(images), max(256, 32 * size))
        ideal = costs[-1] / torch.tensor(costs, dtype=torch.float64)[simulated[:count]].mean().item()
        calls = {name: partial(p.run, p.images[:count], size) for name, p in policies.items()}
        answers = {name: call() for name, call in calls.items()}
        rates = {name: count / t for name, t in interleaved(calls, rounds=rounds, device=images.device).items()}
        differ = [int((answers[order][1] != simulated[:count]).sum()) for order in ("throughput", "latency")]
        everything, pooled, compacted = rates.values()
        line = f"{size:5}{everything:12.0f}{pooled:19.0f}{pooled / everything:8.2f}{compacted:16.0f}"
        unlike = f"{differ[0]} and {differ[1]} of {count}"
        print(f"{line}{compacted / everything:8.2f}{ideal:8.2f}{unlike:>25}")


def main():
    """Prints a table for the network as it is and one for each way to deploy it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--model", default="msdnet_cifar_lin5")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--shares", type=float, nargs="+", default=[50, 20, 15, 10, 5])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.checkpoint:
        model, images, thresholds = trained_subject(args.checkpoint, args.images)
    else:
        model, images, thresholds = random_subject(args.model, args.shares, args.images)
    print(describe_machine(images.device))
    report("eager, fp32, images/s", model, model, images, images, thresholds, args.rounds)
    layout = torch.channels_last
    folded, fast = fold_batch_norm(model).to(memory_format=layout), images.to(memory_format=layout)
    report("batch norm folded, channels-last, fp32, images/s", model, folded, images, fast, thresholds, args.rounds)
    half = fold_batch_norm(model).to(torch.bfloat16, memory_format=layout)
    half_images = images.to(torch.bfloat16, memory_format=layout)
    report("the same in bf16, images/s", model, half, images, half_images, thresholds, args.rounds)


if __name__ == "__main__":
    main()
