"""Milliseconds of every stage of a network: its trunk, its head, and an image that leaves there.

    python scripts/bench_stages.py --checkpoint FILE [--policy policy.json] [--batch 1] [--rounds 50]
    python scripts/bench_stages.py --model msdnet_cifar_lin5 [--nBlocks 5 ...]

With a checkpoint: its weights, as tuned for deployment (batch norm folded, channels-last). Without: random
weights; options of the network named by --model are flags too. Images are random: they all run every stage.
A head's time includes what decides. With `--policy`: the latency to expect of it at batch 1, for the shares
of the images that left at each exit when it was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common import check_policy_alone, network_options, policy_for, print_table, read_known

import torch

from adaptive.policy import Policy
from adaptive.stage_timing import StageTimes, latency_at, measure_stages
from adaptive.timing import Deployed
from experiment import open_network
from experiment.record import describe_machine
from models import MultiExitModel, create_model, tune
from training.parallel import start_compute
from utils import Runtime, UserError, option, run_main

HEADS = ["stage", "trunk, ms:.3f", "head, ms:.3f", "share, %:.1f", "spread, ms:.3f", "leaving, ms:.3f"]
HEADS += ["trunk, M MACs:.3f", "head, M MACs:.3f"]


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    checkpoint: str = option("", "a network's file; default: random weights")
    model: str = option("msdnet_cifar_lin5", "the network without a checkpoint")
    input_size: int | None = option(None, "default: the checkpoint's, or what the network is for", low=1)
    policy: str = option("", "a saved policy of the checkpoint")
    confidence: str | None = option(None, "by which exits decide; default: the policy's, or max_prob")
    batch: int = option(1, "images a call", low=1)
    rounds: int = option(50, "how often every stage is timed", low=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


def subject_of(flags: Flags, words: Sequence[str], device: torch.device) -> tuple[MultiExitModel, int]:
    """The network on the device, and the side of its images."""
    if flags.checkpoint:
        if words:
            raise UserError(f"unknown flag {words[0]}: a checkpoint has its own options")
        opened = open_network(flags.checkpoint, device=device)
        return opened.network, flags.input_size or opened.view.size
    options = network_options(Flags, flags.model, words)
    torch.manual_seed(0)
    model = create_model(flags.model, **options).eval().to(device)
    tune(model, device)
    return model, flags.input_size or (32 if "cifar" in flags.model else 224)


def rows_of(times: StageTimes, deployed: Deployed) -> list[tuple]:
    """A row for each stage."""
    costs = times.costs
    macs = deployed.costs
    leaving = costs.leaving()
    whole = sum(costs.trunks) + sum(costs.heads)
    columns = zip(costs.trunks, costs.heads, macs.trunks, macs.heads, times.spreads_ms, leaving, strict=True)
    rows = []
    for k, (trunk, head, trunk_macs, head_macs, spread, left) in enumerate(columns):
        share = 100 * (trunk + head) / whole
        rows.append((str(k), trunk, head, share, spread, left, trunk_macs / 1e6, head_macs / 1e6))
    return rows


def show_policy(policy: Policy, times: StageTimes) -> None:
    """Prints the latency to expect of a policy."""
    if not policy.shares:
        raise UserError(f"policy {policy.name!r} does not say which shares of the images leave at each exit")
    found = latency_at(policy, policy.shares, times)
    figures = f"mean {found.mean_ms:.3f} ms, p50 {found.p50_ms:.3f}, p95 {found.p95_ms:.3f}"
    shares = " ".join(f"{100 * share:.1f}" for share in policy.shares)
    print(f"expected of policy {policy.name!r}, by which {shares} % leave: {figures}")


def main(argv: list[str]) -> None:
    """Prints a table of stages, their sum beside the whole network, and what a policy takes."""
    flags, words = read_known(Flags, argv, __doc__)
    check_policy_alone(flags, "confidence")
    if flags.policy and flags.batch > 1:
        raise UserError(f"--batch {flags.batch}: latencies of a policy are for --batch 1")
    device = start_compute(Runtime(device=flags.device)).device
    model, side = subject_of(flags, words, device)
    policy = policy_for(flags.policy, model)
    images = torch.randn(max(flags.batch, 16), 3, side, side, device=device)
    deployed = Deployed.of(model, images, channels_last=True)
    times = measure_stages(
        deployed,
        batch=flags.batch,
        rounds=flags.rounds,
        reading=policy.reading if policy else flags.confidence or "max_prob",
        machine=describe_machine(device),
    )
    each = "" if flags.batch == 1 else f", {flags.batch} images a call"
    print(f"{times.machine}; eager, {side} pixels, milliseconds per image{each}")
    print_table(HEADS, rows_of(times, deployed))
    total = sum(times.costs.trunks) + sum(times.costs.heads)
    print(
        f"stages in sum {total:.3f} ms, the whole network {times.whole_ms:.3f} ms: {100 * times.gap:+.1f} %"
    )
    if policy:
        show_policy(policy, times)


if __name__ == "__main__":
    run_main(main)
