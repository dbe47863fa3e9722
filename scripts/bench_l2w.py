"""Time and peak memory of one training iteration that learns sample weights (L2W), in plain training steps.

    python scripts/bench_l2w.py [--model msdnet_cifar_lin5] [--batch_size 64] [--rounds 7]

An iteration is what one batch of random images costs, data loading aside: two optimizer steps on half the
batch each for the learned weights, one on the whole batch for plain joint training. "published" builds a copy
of the network, takes the look-ahead step in a graph of second order, and runs the training half once more for
the real step, as the published program does. "second order" is our path for networks without forward-mode
derivatives, "plain, in halves" takes two plain steps.

Floor, in passes over half a batch, a backward pass counted as two: forward, gradient, look-ahead forward and
gradient,
two products per operator for the directional derivative, gradient: 1 + 2 + 3 + 2 + 2 = 10, against 3 for
plain: 3.33. Memory is the peak of a process of its own, less what it held before it made the network.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.latency import interleaved
from adaptive.thresholds import geometric_quotas
from models import create_model
from training.l2w import SampleWeighting, Weighting, confidence_table
from training.losses import exit_weights, joint_objective
from training.optim import Update, make_optimizer
from training.weights import assign_exits, judgement, loss_table
from utils import describe_machine, start_compute

FLOOR = 10 / 3
RATE, DECAY, MOMENTUM = 1e-4, 1e-4, 0.9
VARIANTS = ("plain", "plain, in halves", "published", "second order", "ours", "ours, not learning")


class Published(SampleWeighting):
    """The published program's iteration."""

    def _half(self, model, train, judge):
        (images, targets), copied = train, self.build().train()
        copied.load_state_dict(model.state_dict())
        losses = loss_table(copied(images), targets)
        weights = self._weigh(losses.detach())
        named = dict(copied.named_parameters())
        found = torch.autograd.grad((weights * losses).mean(0).sum(), named.values(), create_graph=True)
        moved = {}
        for (name, p), real, gradient in zip(named.items(), model.parameters(), found, strict=True):
            step = gradient + DECAY * p
            buffer = self.update.optimizer.state[real].get("momentum_buffer")
            moved[name] = p - RATE * (step if buffer is None else MOMENTUM * buffer + step)
        exits = functional_call(copied, moved, judge[0])
        assigned = assign_exits(confidence_table(exits), self.proportions)
        self.optimizer.zero_grad()
        judgement(exits, judge[1], assigned).backward()  # into the copy, too
        self.optimizer.step()
        exits = model(images)
        losses = loss_table(exits, targets)
        with torch.no_grad():
            weights = self._weigh(losses)
        return (weights * losses).mean(0).sum(), exits


class Iteration:
    """One training iteration of a variant, on a network of its own."""

    def __init__(self, variant, args, device):
        torch.manual_seed(0)
        build = partial(create_model, args.model, 10)
        self.model = build().to(device).train()
        settings = {"opt": "sgd", "lr": RATE, "weight_decay": DECAY, "momentum": MOMENTUM}
        optimizer = make_optimizer(self.model, **settings, eps=None, betas=None, filter_bias_and_bn=False)
        self.update = Update(self.model, optimizer, lr=lambda step: RATE, weight_decay=lambda step: DECAY)
        weights = exit_weights(self.model.num_exits)
        if variant.startswith("plain"):
            self.objective = joint_objective(exit_weights=weights, smoothing=0.0)
        else:
            kind = Published if variant == "published" else SampleWeighting
            self.objective = kind(
                Weighting(meta_interval=10**9 if variant == "ours, not learning" else 1),
                self.update,
                proportions=geometric_quotas(0.75, self.model.num_exits),
                batches=10**9,
                epochs=1,
                exit_weights=weights,
                forward_mode=variant != "second order",
            )
            self.objective.build = lambda: build().to(device)
            self.objective.batch = 1  # batch 0 always learns
        self.images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
        self.targets = torch.randint(10, (args.batch_size,), device=device)

        self.halves = variant == "plain, in halves"

    def __call__(self):
        if self.halves:
            for images, targets in zip(self.images.chunk(2), self.targets.chunk(2), strict=True):
                for loss, _ in self.objective(self.model, images, targets):
                    self.update(loss)
            return
        for loss, _ in self.objective(self.model, self.images, self.targets):
            self.update(loss)
        if type(self.objective) is SampleWeighting:
            self.objective.take_tables()  # as the end of an epoch does


def resident(field):
    """A figure of this process in MiB: VmRSS now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def peak_memory(variant, argv):
    """Peak of an iteration in MiB, in a process that gives back what it frees."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *argv, "--memory_of", variant]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main():
    """Prints a table of the variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="msdnet_cifar_lin5")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--input_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()

    device = start_compute("cpu", "none", False).device
    if args.memory_of:
        before = resident("VmRSS")
        iteration = Iteration(args.memory_of, args, device)
        for _ in range(2):
            iteration()
        print(resident("VmHWM") - before)
        return
    calls = {variant: Iteration(variant, args, device) for variant in VARIANTS}
    for call in calls.values():
        call()  # warm up
    times = interleaved(calls, rounds=args.rounds, device=device)
    memory = {variant: peak_memory(variant, sys.argv[1:]) for variant in VARIANTS}

    plain = times["plain"]
    print(
        f"{describe_machine(device)}\n{args.model}, batch {args.batch_size}, {args.input_size} pixels, fp32"
    )
    print(f"floor of learning weights exactly: {FLOOR:.2f} plain steps")
    print(
        f"{'iteration':20}{'ms':>8}{'plain steps':>14}{'of published':>14}{'peak, MiB':>12}{'of plain':>10}"
    )
    for variant in VARIANTS:
        t, m = times[variant], memory[variant]
        print(
            f"{variant:20}{1e3 * t:8.0f}{t / plain:14.2f}{t / times['published']:14.2f}{m:12.0f}"
            f"{m / memory['plain']:10.2f}"
        )
    whole = (times["ours"] + 99 * times["ours, not learning"]) / 100
    print(f"with --meta_interval 100: {whole / plain:.2f} plain steps")


if __name__ == "__main__":
    main()
