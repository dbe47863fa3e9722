"""Batch-1 latency of networks side by side in one run, as multiples of a reference network.

    python scripts/bench_latency.py [--models rexnetv1_100 timm/efficientnet_b0 ...] [--rounds 30]

Without --models: the ReXNets of the paper beside timm's EfficientNets, with the published CPU times (arXiv
2007.00992: one image on a Xeon E5-2630 v4) next to ours. The networks have random weights; every exit is
timed as what it takes from the image to its answer, in turn with all the others, so that a machine that
drifts slows all alike. Channels-last, batch norm as it stands.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.flops import exit_costs
from adaptive.latency import interleaved
from models import create_model
from utils import describe_machine, run_main, start_compute

# Published milliseconds on the paper's CPU; the reference of each family comes first.
PUBLISHED = {
    "timm/efficientnet_b0": 47,
    "rexnetv1_090": 45,
    "rexnetv1_100": 47,
    "rexnetv1_130": 55,
    "rexnetv1_150": 59,
    "rexnetv1_200": 69,
    "timm/tf_efficientnet_lite0": 30,
    "rexnetv1_lite_100": 31,
    "rexnetv1_lite_130": 36,
    "rexnetv1_lite_150": 39,
    "rexnetv1_lite_200": 49,
}


@torch.inference_mode()
def answer(network, image, k):
    """Runs a network up to exit k."""
    state = network.begin(image)
    for stage in range(k + 1):
        _, state = network.step(stage, state)


def main(argv):
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(PUBLISHED))
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)

    device = start_compute("auto", "none", True).device
    image = torch.randn(1, 3, args.input_size, args.input_size, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    calls, costs = {}, {}
    for name in args.models:
        network = create_model(name).eval().to(device, memory_format=torch.channels_last)
        for k, cost in enumerate(exit_costs(network, tuple(image.shape[1:]))):
            calls[name, k], costs[name, k] = partial(answer, network, image, k), cost
    interleaved(calls, rounds=3, device=device)  # warm up
    times = interleaved(calls, rounds=args.rounds, device=device)

    print(
        f"{describe_machine(device)}\nbatch 1, {args.input_size} pixels, fp32, median of {args.rounds} rounds"
    )
    print(f"{'network':34}{'exit':>5}{'M MACs':>9}{'ms':>8}{'ratio':>7}{'published ratio':>17}")
    reference = None
    for (name, k), seconds in times.items():
        # Networks are compared with the last one of timm before them, and with the first of all before any.
        reference = name if name.startswith("timm/") or reference is None else reference
        last = max(exit for other, exit in times if other == reference)
        known = name in PUBLISHED and reference in PUBLISHED
        published = f"{PUBLISHED[name] / PUBLISHED[reference]:.2f}" if known else "-"
        ratio = seconds / times[reference, last]
        print(f"{name:34}{k:5}{costs[name, k] / 1e6:9.0f}{1e3 * seconds:8.1f}{ratio:7.2f}{published:>17}")


if __name__ == "__main__":
    run_main(main)
