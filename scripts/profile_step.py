"""Where the time of a training step goes, by network: its floor, and its largest operators.

    python scripts/profile_step.py [--models msdnet_cifar_lin5 ranet ...] [--batch_size 64] [--input_size 32]

A step is the forward pass, the loss of all exits, the backward pass and the optimizer, on random images.
Floor: 3 * 2 * multiply-adds of all exits * batch, at the rate of a large matrix product in the same rounds.
"outside" is the step less the time in operators: Python, autograd's bookkeeping, waiting. Shares are of the
time in operators, forward and backward together.

    python scripts/profile_step.py --models msdnet_imagenet_step4 --input_size 224 --images 1e8

estimates what it costs to train on so many images (epochs times training images) on a GPU whose matrix
product runs at `--gpu_tflops`: the floor of all steps there, and as many times that as a step takes here.
"""

from collections import Counter
from dataclasses import dataclass

from common import Steps, matrix_products, print_table, read_flags, warm_times

import torch
from torch.profiler import ProfilerActivity, profile

from adaptive.flops import exit_costs
from experiment.record import describe_machine
from models import create_model, tune
from training.optim import Optimization, make_update
from utils import option, run_main

CPU = torch.device("cpu")
FAMILIES = ("msdnet_cifar_lin5", "ranet", "reg400m_perceiver_t128", "rexnet_ee_100", "cifar_densenet_52_6")
SIDE = 2048  # of the product
# Operators by what they are, in the order in which names are tried.
KINDS = {
    "convolution": ("conv", "mkldnn"),
    "batch norm": ("batch_norm",),
    "matrix product": ("mm", "linear", "attention", "bmm"),
    "join and copy": ("cat", "copy", "narrow", "slice", "contiguous", "clone", "index"),
    "optimizer": ("_foreach", "fused", "optimizer"),
    "elementwise": ("relu", "silu", "add", "mul", "sigmoid", "threshold", "div", "sub", "gelu", "hard"),
    "pooling": ("pool",),
}


@dataclass(frozen=True)
class Flags:
    """What is profiled."""

    models: tuple[str, ...] = option(FAMILIES, "registered networks")
    batch_size: int = option(64, low=1)
    input_size: int = option(32, "side of the images", low=1)
    opt: str = option("sgd", "the optimizer, of timm")
    rounds: int = option(5, "of which the median is shown", low=1)
    images: float = option(0.0, "images of a whole training, to estimate its GPU-hours", low=0)
    gpu_tflops: float = option(156.0, "10^12 operations a second of that GPU's matrix product", low=1)


def kind_of(operator: str) -> str:
    """What an operator is, by its name."""
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def shares_of(step: Steps) -> tuple[float, dict[str, float]]:
    """Seconds in operators in one step, and the share of each kind of them, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    times = Counter()
    for event in found.key_averages():
        if event.key.startswith(("aten::", "torch_", "mkldnn")):
            times[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    total = sum(times.values())
    return total, {kind: seconds / total for kind, seconds in times.most_common()}


def main(argv: list[str]) -> None:
    """The command line."""
    flags = read_flags(Flags, argv, __doc__)
    print(f"batch {flags.batch_size}, {flags.input_size} pixels, {flags.opt}, {describe_machine(CPU)}")
    rows = []
    for name in flags.models:
        torch.manual_seed(0)
        network = create_model(name, 10).train()
        tune(network, CPU)
        macs = exit_costs(network, (3, flags.input_size, flags.input_size))[-1]
        optimization = Optimization(opt=flags.opt, lr=1e-6, schedule="constant", warmup_epochs=0)
        update = make_update(network, optimization, steps=1)
        step = Steps(network, update, flags.batch_size, flags.input_size)
        product = matrix_products(SIDE, CPU)["fp32"]
        seconds = warm_times({"step": step, "product": product}, flags.rounds, CPU)
        floor = 3 * macs * flags.batch_size / SIDE**3 * seconds["product"]
        inside, shares = shares_of(step)
        largest = ", ".join(f"{kind} {100 * share:.0f}" for kind, share in [*shares.items()][:4])
        outside = max(0.0, 1 - inside / seconds["step"])
        times = seconds["step"] / floor
        hours = 3 * 2 * macs * flags.images / (flags.gpu_tflops * 1e12) / 3600
        estimate = (hours, hours * times) if flags.images else ()
        rows.append((name, 1000 * seconds["step"], 1000 * floor, times, outside, *estimate, largest))
    heads = [
        "network",
        "ms/step:.1f",
        "floor:.1f",
        "times floor:.1f",
        "outside:.2f",
        *(["GPU-hours at the floor:.1f", "GPU-hours:.1f"] if flags.images else []),
        "largest, % of operators",
    ]
    print_table(heads, rows)


if __name__ == "__main__":
    run_main(main)
