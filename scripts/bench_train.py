"""Time of one training step: a network as it is here, and the same network written out plainly, in the same
run.

    python scripts/bench_train.py [--model reg800m_perceiver_t128] [--depth_factor 1 1 1 2] [--batch_size 16]

A step is the forward pass, the loss of all exits with distillation, the backward pass and AdamW, on random
images; no data loading. "ours" is what main_earlyExit.py does by default. "plain" is written as the published
code is: attention as two einsums with a softmax between, weights and images contiguous, convolution and
pooling one after the other, AdamW without a fused kernel. (Maps made of tokens are views, channels-last in
both.) A network that is not a Dynamic Perceiver differs in the optimizer only.

Floor: a backward pass takes about two forward passes, so a step costs 3 * multiply-adds of all exits * batch.
The share of peak sets this against a large square matrix product of the same type, timed in the same rounds.
"""

import argparse
import copy
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.flops import exit_costs
from adaptive.latency import interleaved
from models import create_model
from models.dyn_perceiver import DynPerceiver
from training.losses import exit_weights, joint_objective, self_distillation
from training.optim import Update, make_optimizer, param_groups
from utils import Compute, describe_machine, start_compute

RATE, DECAY = 1e-6, 0.05  # so low a rate that the variants keep nearly the same weights


def plain_attend(q, k, v, dropout):
    """`models.attention.attend`, written out."""
    weights = torch.einsum("bhnd,bhld->bhnl", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("bhnl,bhld->bhnd", F.dropout(weights, dropout, training=dropout > 0), v)


def plain_pooled_residual(x, conv, side):
    """`models.layers.pooled_residual`, written out."""
    return F.adaptive_avg_pool2d(x + conv(x), side)


class Variant:
    """A copy of `model`, plain or as it is, that answers and takes training steps under `compute`."""

    def __init__(self, model, plain, compute):
        self.model, self.plain, self.compute = copy.deepcopy(model), plain, compute
        if plain and isinstance(model, DynPerceiver):
            self.model.begin = lambda images: images  # ours makes them, and the weights, channels-last
            self.model.to(memory_format=torch.contiguous_format)
        given = {"lr": RATE, "weight_decay": DECAY}
        if plain:
            optimizer = torch.optim.AdamW(param_groups(self.model, DECAY, True), lr=RATE)
        else:
            extra = {"opt": "adamw", "momentum": 0.9, "eps": 1e-8, "betas": None, "filter_bias_and_bn": True}
            optimizer = make_optimizer(self.model, **given, **extra)
        self.update = Update(
            self.model, optimizer, **{name: lambda step, x=x: x for name, x in given.items()}
        )

    @contextmanager
    def written_plainly(self):
        """The context in which the network runs."""
        with ExitStack() as stack:
            if self.plain:
                stack.enter_context(patch("models.attention.attend", plain_attend))
                stack.enter_context(patch("models.dyn_perceiver.pooled_residual", plain_pooled_residual))
            yield

    @torch.no_grad()
    def answers(self, images):
        """Logits [K, B, C] in evaluation mode."""
        with self.written_plainly(), self.compute.autocast():
            return torch.stack(self.model.eval()(images)).float()

    def step(self, objective, images, targets):
        """One step of training."""
        with self.written_plainly(), self.compute.autocast():
            for loss, _ in objective(self.model.train(), images, targets):
                self.update(loss)


def peak_calls(device):
    """Square matrix products, and the operations of one: {type: call}, number."""
    side = 8192 if device.type == "cuda" else 2048
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls[dtype] = partial(torch.mm, a, b)
    return calls, 2 * side**3


def main():
    """Prints a table of the variants and how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reg800m_perceiver_t128")
    parser.add_argument("--depth_factor", type=int, nargs=4, help="default: the network's")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = start_compute(args.device, "none", False).device
    options = {"depth_factor": args.depth_factor} if args.depth_factor else {}
    model = create_model(args.model, 1000, **options).to(device)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    targets = torch.randn(args.batch_size, 1000, device=device).softmax(1)  # soft, as mixup leaves them
    factors = {"att": 0.5, "cnn": 1.0, "merge": 1.0} if isinstance(model, DynPerceiver) else {}
    weights = exit_weights(model.num_exits, **factors)
    objective = joint_objective(exit_weights=weights, smoothing=0.0, distil=self_distillation(0.5, 1.0))

    macs = 3 * exit_costs(model, tuple(images.shape[1:]))[-1] * args.batch_size
    print(describe_machine(device))
    print(
        f"{args.model}{f' {options}' if options else ''}, batch {args.batch_size}, {args.input_size} pixels"
    )
    print(f"one step: 3 x multiply-adds of all exits x batch = {macs / 1e9:.1f} G multiply-adds")

    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    variants = {}
    for kind in ("plain", "ours"):
        for name, dtype in types.items():
            compute = Compute(device, amp=None if dtype == torch.float32 else dtype)
            variants[f"{kind} {name}"] = Variant(model, kind == "plain", compute)
    answers = {name: variant.answers(images) for name, variant in variants.items()}
    reference = answers["plain fp32"]
    differ = {
        name: ((a - reference).abs().max() / reference.abs().max()).item() for name, a in answers.items()
    }
    print(
        f"largest difference of the logits, plain and ours in fp32, of the largest logit: {differ['ours fp32']:.1e}"
    )
    if not differ["ours fp32"] < 1e-3:
        raise ValueError("plain and ours are not the same network")
    calls = {name: partial(v.step, objective, images, targets) for name, v in variants.items()}
    peaks, operations = peak_calls(device)
    calls |= peaks
    for call in calls.values():
        call()  # warm up
    times = interleaved(calls, rounds=args.rounds, device=device)

    for name, dtype in types.items():
        print(f"peak {name}: {operations / times[dtype] / 1e9:.0f} GFLOP/s in a square matrix product")
    print("\nvariant       ms/step   images/s   share of peak   difference from plain fp32 in eval mode")
    for name in variants:
        share = 2 * macs / times[name] / (operations / times[types[name.split()[1]]])
        print(
            f"{name:10}{1e3 * times[name]:11.1f}{args.batch_size / times[name]:11.2f}{share:16.3f}{differ[name]:18.1e}"
        )
    for slow, fast in (("plain fp32", "ours fp32"), ("plain bf16", "ours bf16"), ("plain fp32", "ours bf16")):
        print(f"{slow} / {fast}: {times[slow] / times[fast]:.2f}")


if __name__ == "__main__":
    main()
