"""Time and peak memory of one training iteration that learns sample weights (L2W), in plain training steps.

    python scripts/bench_l2w.py [--model msdnet_cifar_lin5] [--batch_size 64] [--rounds 7]

An iteration is what one batch of random images costs, data loading aside: two optimizer steps on half the
batch each for the learned weights, one on the whole batch for plain joint training. "published" builds a
copy of the network, takes the look-ahead step in a graph of second order, and runs the training half once
more for the real step, as the published program does. "second order" is our path for networks without
forward-mode derivatives, "plain, in halves" takes two plain steps.

Floor, in passes over half a batch, a backward pass counted as two: forward, gradient, look-ahead forward
and gradient, two products per operator for the directional derivative, gradient: 1 + 2 + 3 + 2 + 2 = 10,
against 3 for plain: 3.33. Memory is the peak of a process of its own, less what it held before it made the
network.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import print_table, read_flags, warm_times

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaptive.thresholds import geometric_quotas
from experiment.record import describe_machine
from models import MultiExitModel, create_model, tune
from training.l2w import SampleWeighting, Weighting, confidence_table
from training.losses import Losses, joint_objective
from training.optim import Optimization, make_update
from training.weight_net import assign_exits, judgement, loss_table
from utils import option, run_main

FLOOR = 10 / 3
CPU = torch.device("cpu")
SGD = Optimization(
    opt="sgd",
    lr=1e-4,
    weight_decay=1e-4,
    momentum=0.9,
    filter_bias_and_bn=False,
    schedule="constant",
    warmup_epochs=0,
)
VARIANTS = ("plain", "plain, in halves", "published", "second order", "ours", "ours, not learning")
HEADS = ["iteration", "ms:.0f", "plain steps:.2f", "of published:.2f", "peak, MiB:.0f", "of plain:.2f"]


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    model: str = option("msdnet_cifar_lin5", "registered network")
    batch_size: int = option(64, low=4)
    input_size: int = option(32, "side of the images", low=1)
    rounds: int = option(7, "of which the median is shown", low=1)
    memory_of: str = option("", "print the peak memory of this variant instead", choices=("", *VARIANTS))


class Published(SampleWeighting):
    """The published program's iteration."""

    build: Callable[[], MultiExitModel]

    def _half(
        self, model: nn.Module, train: tuple, judge: tuple, learns: bool
    ) -> tuple[Tensor, list[Tensor]]:
        images, targets = train
        copied = self.build().train()
        copied.load_state_dict(model.state_dict())
        losses = loss_table(copied(images), targets)
        weights = self._weigh(losses.detach())
        exits = functional_call(
            copied, self._moved(copied, model, (weights * losses).mean(0).sum()), judge[0]
        )
        assigned = assign_exits(confidence_table(exits), self.proportions)
        self.optimizer.zero_grad()
        judgement(exits, judge[1], assigned).backward()  # also into the copy
        self.optimizer.step()
        exits = model(images)
        losses = loss_table(exits, targets)
        with torch.no_grad():
            weights = self._weigh(losses)
        return (weights * losses).mean(0).sum(), exits

    def _moved(self, copied: nn.Module, model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        """The copy's parameters after a step with the momentum of the model's, in a graph of second order."""
        named = dict(copied.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        moved = {}
        for (name, p), real, gradient in zip(named.items(), model.parameters(), gradients, strict=True):
            step = gradient + SGD.weight_decay * p
            buffer = self.update.optimizer.state[real].get("momentum_buffer")
            moved[name] = p - SGD.lr * (step if buffer is None else SGD.momentum * buffer + step)
        return moved


class Iteration:
    """One training iteration of a variant, on a network of its own."""

    def __init__(self, variant: str, flags: Flags) -> None:
        torch.manual_seed(0)
        build = partial(create_model, flags.model, 10)
        self.model = build().train()
        tune(self.model, CPU)
        self.update = make_update(self.model, SGD, steps=1)
        losses = Losses([1.0] * self.model.num_exits)
        if variant.startswith("plain"):
            self.objective = joint_objective(losses)
        else:
            kind = Published if variant == "published" else SampleWeighting
            self.objective = kind(
                Weighting(meta_interval=10**9 if variant == "ours, not learning" else 1),
                self.update,
                losses,
                proportions=geometric_quotas(0.75, self.model.num_exits),
                batches=10**9,
                epochs=1,
                forward_mode=variant != "second order",
            )
            self.objective.batch = 1  # batch 0 always learns
            if isinstance(self.objective, Published):
                self.objective.build = build
        images = torch.randn(flags.batch_size, 3, flags.input_size, flags.input_size)
        targets = torch.randint(10, (flags.batch_size,))
        parts = 2 if variant == "plain, in halves" else 1
        self.batches = list(zip(images.chunk(parts), targets.chunk(parts), strict=True))

    def __call__(self) -> None:
        for images, targets in self.batches:
            for loss, _ in self.objective(self.model, images, targets):
                self.update(loss)
        if type(self.objective) is SampleWeighting:
            self.objective.take_tables()  # as at the end of an epoch


def resident(entry: str) -> float:
    """A figure of this process in MiB: VmRSS now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) / 1024


def own_memory(flags: Flags) -> float:
    """The peak of this process above what it held before, in MiB."""
    before = resident("VmRSS")
    iteration = Iteration(flags.memory_of, flags)
    for _ in range(2):
        iteration()
    return resident("VmHWM") - before


def peak_memory(variant: str, argv: list[str]) -> float:
    """Peak of an iteration in MiB, in a process that returns freed memory to the system."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *argv, "--memory_of", variant]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str]) -> None:
    """Prints a table of the variants."""
    flags = read_flags(Flags, argv, __doc__)
    if flags.memory_of:
        print(own_memory(flags))
        return
    times = warm_times({variant: Iteration(variant, flags) for variant in VARIANTS}, flags.rounds, CPU)
    memory = {variant: peak_memory(variant, argv) for variant in VARIANTS}
    plain = times["plain"]
    print(describe_machine(CPU))
    print(f"{flags.model}, batch {flags.batch_size}, {flags.input_size} pixels, fp32")
    print(f"floor of learning weights exactly: {FLOOR:.2f} plain steps")
    rows = []
    for variant in VARIANTS:
        spent, held = times[variant], memory[variant]
        ratios = (spent / plain, spent / times["published"], held, held / memory["plain"])
        rows.append((variant, 1e3 * spent, *ratios))
    print_table(HEADS, rows)
    whole = (times["ours"] + 99 * times["ours, not learning"]) / 100
    print(f"with --meta_interval 100: {whole / plain:.2f} plain steps")


if __name__ == "__main__":
    run_main(main)
