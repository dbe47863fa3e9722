"""Images per second of real early exit and of all exits, over batch sizes; or its latency at batch 1.

    python scripts/bench_runtime.py [--checkpoint FILE] [--model msdnet_cifar_lin5] [--shares 50 20 15 10 5]
    python scripts/bench_runtime.py --checkpoint FILE --policy policy.json
    python scripts/bench_runtime.py --latency [--model reg800m_perceiver_t128] [--baselines resnet18 ...]

With a checkpoint: its weights, its test images, and the policy given, or else the thresholds of the cheapest
setting that is as accurate as the last exit on calib. Without: random weights and images, and thresholds by
which the given shares (percent) of the images leave at each exit. Floor: the ideal ratio is that of
the multiply-adds. Every line is measured in the same run; policies take turns, and the median of the rounds
is shown.

With --latency: milliseconds for one image to leave at each exit after all earlier exits have been evaluated,
beside one-exit networks (registered, or torchvision's own as torchvision/NAME), both as built and tuned.
Random weights. Options of the network named by --model are flags too, such as --depth_factor 1 1 1 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from common import (
    check_policy_alone,
    largest_difference,
    network_options,
    print_table,
    read_known,
    timed,
)

import torch
import torchvision
from torch import Tensor, nn

from adaptive.flops import count, exit_costs
from adaptive.inference import fold_batch_norm, run_adaptive
from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY, NOBODY, quota_thresholds
from adaptive.timing import Deployed, early_contestants, measure, percentile, static_contestants
from experiment.evaluation import deployed_policy
from experiment.options import Given
from experiment.record import describe_machine
from experiment.samples import test_images
from experiment.subject import NAMED, open_evaluation
from models import MultiExitModel, create_model, tune
from models.bases import SingleExit
from utils import UserError, option, run_main

SIZES = (1, 8, 64, 256)
SHARES = (50, 20, 15, 10, 5)  # percent, for five exits
BASELINES = ("torchvision/regnet_y_800mf", "torchvision/regnet_y_400mf")
BURST = 4  # calls in a row at batch 1; the first of them, whose caches others have filled, is not counted
CPU = torch.device("cpu")
# Published depth_factor, and top-1 of the exits on ImageNet (https://arxiv.org/abs/2306.11248).
PUBLISHED = {
    "reg800m_perceiver_t128": ([1, 1, 1, 2], ("68.62", "78.32", "79.15", "79.86")),
    "resnet50_0375_perceiver_t128": ([1, 1, 1, 1], ("72.93", "77.52", "74.32", "77.70")),
    "mobilenetV3_0x75_perceiver_t128": ([1, 1, 1, 3], ("53.13", "71.65", "71.89", "74.59")),
}
HEADS = ["batch", "all exits:.0f", "throughput order:.0f", "ratio:.2f", "latency order:.0f", "ratio:.2f"]
HEADS += ["ideal:.2f", "exits unlike simulated"]
LATENCY_HEADS = ["network", "exit", "MACs, M:.1f", "as built p50:.1f", "p95:.1f", "tuned p50:.1f", "p95:.1f"]
LATENCY_HEADS += ["top-1, %, not measured here"]


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    checkpoint: str = option("", "a trained network")
    data_set: str = option("", "its data set, where timm fetches that")
    data_path: str = option("", "its images, unless they are DIGITS; folder or .npz file")
    eval_data_path: str = option("", "its test images, if they are elsewhere")
    policy: str = option("", "a saved policy of the checkpoint")
    model: str = option("", "default: msdnet_cifar_lin5, with --latency reg800m_perceiver_t128")
    input_size: int | None = option(None, "default: the network's, with --latency 224")
    latency: bool = option(False, "batch 1 instead of throughput")
    baselines: tuple[str, ...] = option(BASELINES, "one-exit networks for --latency")
    images: int = option(2048, low=1)
    shares: tuple[float, ...] = option((), "percent of the images for each exit; default: 50 20 15 10 5")
    rounds: int | None = option(None, "default: 3, with --latency 50", low=1)


def trained_subject(flags: Flags) -> tuple[MultiExitModel, Tensor, Policy]:
    """Network, images and policy of a checkpoint."""
    values = {"checkpoint": flags.checkpoint, "policy": flags.policy, "num_workers": 1}
    values |= {name: value for name in NAMED if (value := getattr(flags, name))}
    subject = open_evaluation(Given(values, {}))
    costs = count(subject.network, subject.shape)
    policy, seen = deployed_policy(subject, costs)
    accuracy = 100 * policy.simulate(seen.read_by(policy), costs.stages).accuracy
    print(f"{flags.checkpoint}: {policy.name}, simulated accuracy {accuracy:.2f} % on all test images")
    images, _ = test_images(subject, flags.images)
    return subject.network, images, policy


def random_subject(flags: Flags, options: dict[str, Any]) -> tuple[MultiExitModel, Tensor, Policy]:
    """A network with random weights, random images, and a policy by which the given shares of them leave."""
    torch.manual_seed(0)
    model = create_model(flags.model, num_classes=10, **options).eval()
    tune(model, CPU)
    side = flags.input_size or (224 if "imagenet" in flags.model else 32)
    images = torch.randn(flags.images, 3, side, side)
    confidence = confidence_of(model, images, Policy.of([EVERYBODY]))
    quotas = torch.tensor(flags.shares or SHARES) / 100
    return model, images, Policy.of(quota_thresholds(confidence, quotas))


@torch.inference_mode()
def confidence_of(model: MultiExitModel, images: Tensor, policy: Policy) -> Tensor:
    """Confidence of every exit in every image, [K, N], as the policy computes it."""
    return torch.cat([policy.reading.confidences(model(part)) for part in images.split(64)], dim=1)


def by_batch(deployed: Deployed, policy: Policy, rounds: int) -> Iterator[tuple]:
    """The rows of a table: all exits and early exit in both orders, by batch size."""
    contestants = {"all exits": static_contestants(deployed)["all exits"]}
    contestants |= early_contestants(deployed, policy)
    confidence = confidence_of(deployed.tuned, deployed.tuned_images, policy)
    simulated = policy.exit_of(confidence).cpu()
    for size in SIZES:
        count = min(len(deployed.images), max(256, 32 * size))
        targets = torch.zeros(count, device=deployed.images.device)
        parts = {name: replace(one, images=one.images[:count]) for name, one in contestants.items()}
        full, *early = measure(parts, targets, micro_batch=size, rounds=rounds, singles=1)
        cells = []
        for row in early:
            cells += [row.images_per_s, row.images_per_s / full.images_per_s]
        ideal = full.macs / early[0].macs
        differ = [str(int((row.exits != simulated[:count]).sum())) for row in early]
        unlike = f"{' and '.join(differ)} of {count}"
        yield size, full.images_per_s, *cells, ideal, unlike


def report_throughput(flags: Flags, options: dict[str, Any]) -> None:
    """A table for the network as it is, and one for each way to deploy it."""
    if flags.checkpoint:
        model, images, policy = trained_subject(flags)
    else:
        model, images, policy = random_subject(flags, options)
    print(describe_machine(images.device))
    for title, deployed in {
        "eager, fp32": Deployed(model, model, images, images),
        "batch norm folded, channels-last, fp32": Deployed.of(model, images, channels_last=True),
        "the same in bf16": Deployed.of(model, images, channels_last=True, dtype=torch.bfloat16),
    }.items():
        print(f"\n{title}, images/s")
        print_table(HEADS, by_batch(deployed, policy, flags.rounds or 3))


class OneExit(SingleExit):
    """Any classifier as a network with one exit."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def extract(self, images: Tensor) -> Tensor:
        """The whole network."""
        return self.network(images)

    def classify(self, features: Tensor) -> Tensor:
        """The logits already."""
        return features


def latency_subject(name: str, options: dict[str, Any]) -> tuple[MultiExitModel, list[str]]:
    """A network with random weights and the published top-1 of each exit."""
    if name.startswith("torchvision/"):
        name = name.removeprefix("torchvision/")
        known = torchvision.models.get_model_weights(name)
        figures = [one.meta["_metrics"]["ImageNet-1K"]["acc@1"] for one in known]
        reported = " or ".join(f"{figure:.2f}" for figure in figures)
        network = OneExit(torchvision.models.get_model(name))
        return network, [f"{reported} (torchvision docs, by weights)"]
    depth, reported = PUBLISHED.get(name, (None, ()))
    options = {"depth_factor": depth, **options} if depth else options
    network = create_model(name, **options)
    if options == {"depth_factor": depth}:
        return network, [f"{accuracy} (published)" for accuracy in reported]
    return network, ["-"] * network.num_exits


@torch.inference_mode()
def answer(model: MultiExitModel, image: Tensor, k: int) -> Tensor:
    """Logits of exit k, where the image really leaves; a single exit decides nothing and just runs."""
    if model.num_exits == 1:
        return model(image)[0]
    return run_adaptive(model, image, [NOBODY] * k + [EVERYBODY] * (model.num_exits - k))[0]


@dataclass(frozen=True)
class ExitLatency:
    """An exit of a network, as built and tuned: calls that answer for one image, and their times in ms."""

    network: str
    exit: int
    macs: int
    reported: str
    calls: list[Callable[[], Tensor]]
    times: list[list[float]]

    def burst(self) -> None:
        """Times a few calls of each in a row, without the first."""
        for call, times in zip(self.calls, self.times, strict=True):
            spent_ms = [1e3 * timed(call)[1] for _ in range(BURST)]
            times += spent_ms[1:]

    def cells(self) -> tuple:
        """The row of the table."""
        figures = [percentile(times, share) for times in self.times for share in (0.5, 0.95)]
        return self.network, self.exit, self.macs / 1e6, *figures, self.reported


def exits_of(name: str, options: dict[str, Any], image: Tensor) -> Iterator[ExitLatency]:
    """Every exit of a network."""
    model, reported = latency_subject(name, options)
    tune(model.eval(), CPU)
    tuned = fold_batch_norm(model).to(memory_format=torch.channels_last)
    tuned_image = image.to(memory_format=torch.channels_last)
    published = image.shape[2] == 224
    for k, macs in enumerate(exit_costs(model, tuple(image.shape[1:]))):
        calls = [partial(answer, model, image, k), partial(answer, tuned, tuned_image, k)]
        yield ExitLatency(name, k, macs, reported[k] if published else "-", calls, [[], []])


def report_latency(flags: Flags, options: dict[str, Any]) -> None:
    """One table: exits of the first network and the other networks, as built and tuned."""
    torch.manual_seed(0)
    side = flags.input_size or 224
    image = torch.randn(1, 3, side, side)
    rows = list(exits_of(flags.model, options, image))
    for name in flags.baselines:
        rows += exits_of(name, {}, image)
    differ = max(largest_difference(row.calls[1](), row.calls[0]()) for row in rows)  # warms up, too
    for _ in range(flags.rounds or 50):
        for row in rows:
            row.burst()
    print(describe_machine(CPU))
    tuning = f"tuned = batch norm folded, channels-last (logits within {differ:.0e})"
    print(f"\nbatch 1, {side} pixels, fp32, ms; {tuning}")
    print_table(LATENCY_HEADS, [row.cells() for row in rows])


def main(argv: list[str]) -> None:
    """Prints the tables of throughput, or the table of latencies."""
    flags, words = read_known(Flags, argv, __doc__)
    check_policy_alone(flags, "shares", "latency")
    if flags.policy and not flags.checkpoint:
        raise UserError(f"--policy {flags.policy}: name the network it was made for: --checkpoint FILE")
    default = "reg800m_perceiver_t128" if flags.latency else "msdnet_cifar_lin5"
    flags = replace(flags, model=flags.model or default)
    report = report_latency if flags.latency else report_throughput
    report(flags, network_options(Flags, flags.model, words))


if __name__ == "__main__":
    run_main(main)
