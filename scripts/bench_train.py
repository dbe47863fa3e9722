"""Time of one training step: a network as it is here, and written out plainly, in the same run.

    python scripts/bench_train.py [--model reg800m_perceiver_t128] [--depth_factor 1 1 1 2] [--batch_size 16]

A step is the forward pass, the loss of all exits with distillation, the backward pass and AdamW, on random
images; no data loading. "ours" is what main_earlyExit.py does by default. "plain" is written as the
published code is: attention as two einsums with a softmax between, weights and images contiguous,
convolution and pooling one after the other, AdamW without a fused kernel. (Maps made of tokens are views,
channels-last in both.) A network that is not a Dynamic Perceiver differs in the optimizer only.

Floor: a backward pass takes about two forward passes, so a step costs 3 * multiply-adds of all exits *
batch. The share of peak sets this against a large square matrix product of the same type, timed in the same
rounds.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from common import (
    PRECISIONS,
    largest_difference,
    matrix_products,
    network_options,
    print_table,
    read_known,
    warm_times,
)

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.flops import exit_costs
from experiment.record import describe_machine
from models import MultiExitModel, attention, create_model, tune
from models.dyn_perceiver import DynPerceiver
from training.losses import Losses, ObjectiveFunction, exit_weights, joint_objective, self_distillation
from training.optim import Optimization, Update, make_update, param_groups
from training.parallel import start_compute
from utils import Compute, Runtime, UserError, option, run_main

# A rate so low that the variants keep nearly the same weights.
OPTIMIZATION = Optimization(lr=1e-6, weight_decay=0.05, schedule="constant", warmup_epochs=0)
HEADS = ["variant", "ms/step:.1f", "images/s:.2f", "share of peak:.3f"]
HEADS += ["difference from plain fp32 in eval mode:.1e"]


@dataclass(frozen=True)
class Flags:
    """What is timed; options of the network are flags too."""

    model: str = option("reg800m_perceiver_t128", "registered network")
    batch_size: int = option(16, low=1)
    input_size: int = option(224, "side of the images", low=1)
    rounds: int = option(5, "of which the median is shown", low=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    product: int = option(0, "side of the matrices; default: 2048, on a GPU 8192", low=0)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`models.attention.attend`, written out."""
    weights = torch.einsum("bhnd,bhld->bhnl", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("bhnl,bhld->bhnd", F.dropout(weights, dropout, training=dropout > 0), v)


@contextmanager
def written_plainly(wanted: bool) -> Iterator[None]:
    """If `wanted`, attention is written out and a Dynamic Perceiver keeps the images' memory format."""
    changes = [(attention, "attend", plain_attend), (DynPerceiver, "begin", lambda self, images: images)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes if wanted else ():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class Variant:
    """A copy of `model`, plain or as it is, that answers and takes training steps under `compute`."""

    def __init__(self, model: MultiExitModel, plain: bool, compute: Compute) -> None:
        self.model = copy.deepcopy(model)
        self.plain = plain
        self.compute = compute
        if plain:
            # A Dynamic Perceiver makes itself channels-last.
            self.model.to(memory_format=torch.contiguous_format)
            self.update = plain_update(self.model)
        else:
            self.update = make_update(self.model, OPTIMIZATION, steps=1)

    def turn(self, training: bool) -> None:
        """Training or evaluation mode; only ours has kernels to choose from."""
        self.model.train(training)
        if not self.plain:
            tune(self.model, self.compute.device)

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Logits [K, B, C] in evaluation mode."""
        self.turn(training=False)
        with written_plainly(self.plain), self.compute.autocast():
            return torch.stack(self.model(images)).float()

    def step(self, objective: ObjectiveFunction, images: Tensor, targets: Tensor) -> None:
        """One step of training."""
        self.turn(training=True)
        with written_plainly(self.plain), self.compute.autocast():
            for loss, _ in objective(self.model, images, targets):
                self.update(loss)


def plain_update(model: MultiExitModel) -> Update:
    """AdamW as torch has it by default."""
    rate, decay = OPTIMIZATION.lr, OPTIMIZATION.weight_decay
    optimizer = torch.optim.AdamW(param_groups(model, decay, True), rate)
    return Update(model, optimizer, lr=lambda step: rate, weight_decay=lambda step: decay)


def objective_of(model: MultiExitModel) -> ObjectiveFunction:
    """All exits, and the last one teaches the others."""
    factors = {"att": 0.5, "cnn": 1.0, "merge": 1.0} if isinstance(model, DynPerceiver) else {}
    return joint_objective(
        Losses(exit_weights(model.num_exits, **factors), distil=self_distillation(0.5, 1.0))
    )


def differences(variants: dict[str, Variant], images: Tensor) -> dict[str, float]:
    """How far each variant's logits are from those of plain fp32; ValueError if the networks differ."""
    answers = {name: variant.answers(images) for name, variant in variants.items()}
    differ = {name: largest_difference(found, answers["plain fp32"]) for name, found in answers.items()}
    same = f"{differ['ours fp32']:.1e}"
    print(f"largest difference of the logits, plain and ours in fp32, of the largest logit: {same}")
    if not differ["ours fp32"] < 1e-3:
        raise UserError("plain and ours are not the same network")
    return differ


def report(times: dict[str, float], differ: dict[str, float], macs: int, batch: int, operations: int) -> None:
    """The table, from the seconds of the variants and of matrix products, by name."""
    rows = []
    for name in differ:
        share = 2 * macs / times[name] / (operations / times[name.split()[1]])
        rows.append((name, 1e3 * times[name], batch / times[name], share, differ[name]))
    for name in PRECISIONS:
        print(f"peak {name}: {operations / times[name] / 1e9:.0f} GFLOP/s in a square matrix product")
    print()
    print_table(HEADS, rows)
    for slow, fast in (("plain fp32", "ours fp32"), ("plain bf16", "ours bf16"), ("plain fp32", "ours bf16")):
        print(f"{slow} / {fast}: {times[slow] / times[fast]:.2f}")


def main(argv: list[str]) -> None:
    """Prints a table of the variants and how they compare."""
    flags, words = read_known(Flags, argv, __doc__)
    options = network_options(Flags, flags.model, words)
    torch.manual_seed(0)
    device = start_compute(Runtime(device=flags.device)).device
    model = create_model(flags.model, 1000, **options).to(device)
    images = torch.randn(flags.batch_size, 3, flags.input_size, flags.input_size, device=device)
    targets = torch.randn(flags.batch_size, 1000, device=device).softmax(1)  # soft, as mixup leaves them
    macs = 3 * exit_costs(model, (3, *images.shape[2:]))[-1] * flags.batch_size
    print(describe_machine(device))
    name = f"{flags.model} {options or ''}".rstrip()
    print(f"{name}, batch {flags.batch_size}, {flags.input_size} pixels")
    print(f"one step: 3 x multiply-adds of all exits x batch = {macs / 1e9:.1f} G multiply-adds")
    variants = {}
    for kind in ("plain", "ours"):
        for precision, dtype in PRECISIONS.items():
            compute = Compute(device, amp=None if dtype == torch.float32 else dtype)
            variants[f"{kind} {precision}"] = Variant(model, kind == "plain", compute)
    differ = differences(variants, images)
    objective = objective_of(model)
    calls: dict[str, Any] = {
        name: partial(one.step, objective, images, targets) for name, one in variants.items()
    }
    side = flags.product or (8192 if device.type == "cuda" else 2048)
    times = warm_times({**calls, **matrix_products(side, device)}, flags.rounds, device)
    report(times, differ, macs, flags.batch_size, 2 * side**3)


if __name__ == "__main__":
    run_main(main)
