"""Batch-1 latency of networks side by side in one run, as multiples of a reference network.

    python scripts/bench_latency.py [--models rexnetv1_100 timm/efficientnet_b0 ...] [--rounds 30]

Without --models: the ReXNets of the paper beside timm's EfficientNets, with the published CPU times (arXiv
2007.00992: one image on a Xeon E5-2630 v4) next to ours. The networks have random weights; every exit is
timed as what it takes from the image to its answer, in turn with all the others, so that a machine that
drifts slows all alike. Channels-last, batch norm as it stands.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from common import print_table, read_flags, warm_times

import torch
from torch import Tensor

from adaptive.flops import exit_costs
from experiment.record import describe_machine
from models import MultiExitModel, create_model, tune
from utils import Runtime, option, run_main, start_compute

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
HEADS = ["network", "exit", "M MACs:.0f", "ms:.1f", "ratio:.2f", "published ratio"]


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    models: tuple[str, ...] = option(tuple(PUBLISHED), "registered networks, or timm/NAME")
    input_size: int = option(224, "side of the image", low=1)
    rounds: int = option(30, "of which the median is shown", low=1)


@torch.inference_mode()
def answer(network: MultiExitModel, image: Tensor, k: int) -> Tensor:
    """Logits [1, C] of exit k; the network runs only up to there."""
    return next(logits for j, logits in network.each_exit(image) if j == k)


def compared(times: dict[tuple[str, int], float], macs: dict[tuple[str, int], int]) -> Iterator[tuple]:
    """The rows of the table, from seconds and multiply-adds by network and exit."""
    last = {name: seconds for (name, _), seconds in times.items()}  # of each network's last exit
    reference = next(iter(last))
    for (name, k), seconds in times.items():
        # Networks are compared with the last one of timm before them, and with the first of all before any.
        if name.startswith("timm/"):
            reference = name
        published = "-"
        if name in PUBLISHED and reference in PUBLISHED:
            published = f"{PUBLISHED[name] / PUBLISHED[reference]:.2f}"
        yield name, k, macs[name, k] / 1e6, 1e3 * seconds, seconds / last[reference], published


def main(argv: list[str]) -> None:
    """Prints a table."""
    flags = read_flags(Flags, argv, __doc__)
    compute = start_compute(Runtime(channels_last=True))
    image = compute.put(torch.randn(1, 3, flags.input_size, flags.input_size))
    calls, macs = {}, {}
    for name in flags.models:
        network = create_model(name).eval().to(compute.device, memory_format=torch.channels_last)
        tune(network, compute.device)
        for k, cost in enumerate(exit_costs(network, (3, *image.shape[2:]))):
            calls[name, k] = partial(answer, network, image, k)
            macs[name, k] = cost
    times = warm_times(calls, flags.rounds, compute.device)
    print(describe_machine(compute.device))
    print(f"batch 1, {flags.input_size} pixels, fp32, median of {flags.rounds} rounds")
    print_table(HEADS, compared(times, macs))


if __name__ == "__main__":
    run_main(main)
