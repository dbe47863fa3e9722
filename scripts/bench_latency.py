"""Milliseconds for one image to leave at each exit of networks: as built, channels-last, and tuned.

    python scripts/bench_latency.py [--models rexnetv1_100 timm/efficientnet_b0 ...] [--rounds 30]
    python scripts/bench_latency.py --models reg800m_perceiver_t128:depth_factor=1/1/1/2 torchvision/resnet18

Without --models: the ReXNets of the paper beside timm's EfficientNets, with the published CPU times (arXiv
2007.00992: one image on a Xeon E5-2630 v4) next to ours. The networks have random weights. The time of an
exit includes earlier heads and what is decided there. All take turns in one run, so that a machine that
drifts slows all alike. Tuned is batch norm folded and channels-last. Ratio: the median, channels-last, over
that of the last network of timm above, or of the first one where there is none.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from common import largest_difference, print_table, read_flags

import torch
import torchvision
from torch import Tensor, nn

from adaptive.backend import tuned
from adaptive.flops import exit_costs
from adaptive.inference import run_adaptive
from adaptive.thresholds import EVERYBODY, NOBODY
from adaptive.timing import percentile, round_times
from experiment.members import parse_member
from experiment.record import describe_machine
from models import MultiExitModel, create_model, nearest, tune
from models.bases import SingleExit
from training.parallel import start_compute
from utils import Runtime, UserError, option, run_main

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
# Published top-1 of the exits on ImageNet (https://arxiv.org/abs/2306.11248).
TOP_1 = {
    "reg800m_perceiver_t128:depth_factor=1/1/1/2": ("68.62", "78.32", "79.15", "79.86"),
    "resnet50_0375_perceiver_t128:depth_factor=1/1/1/1": ("72.93", "77.52", "74.32", "77.70"),
    "mobilenetV3_0x75_perceiver_t128:depth_factor=1/1/1/3": ("53.13", "71.65", "71.89", "74.59"),
}
FORMS = ("as built", "channels-last", "tuned")
HEADS = [
    "network",
    "exit",
    "MACs, M:.1f",
    *(f"{one}:.1f" for form in FORMS for one in (f"{form} p50", "p95")),
]
HEADS += ["ratio:.2f", "published ratio", "published top-1, %"]
BURST = 4  # calls in a row; the first of them, whose caches others have filled, is not counted


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    models: tuple[str, ...] = option(tuple(PUBLISHED), "NAME:option=value, timm/NAME or torchvision/NAME")
    input_size: int = option(224, "side of the image", low=1)
    rounds: int = option(30, f"each of {BURST - 1} timed calls", low=1)


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


def network_of(text: str) -> tuple[MultiExitModel, Sequence[str]]:
    """A network with random weights, and the published top-1 of each exit."""
    name = text.removeprefix("torchvision/")
    if name != text:
        if name not in (names := torchvision.models.list_models()):
            raise UserError(f"--models {text}: {nearest(name, names)}")
        known = torchvision.models.get_model_weights(name)
        figures = [f"{one.meta['_metrics']['ImageNet-1K']['acc@1']:.2f}" for one in known]
        return OneExit(torchvision.models.get_model(name)), [" or ".join(figures)]
    member = parse_member(text)
    network = create_model(member.name, **member.options)
    return network, TOP_1.get(text, ["-"] * network.num_exits)


@torch.inference_mode()
def answer(network: MultiExitModel, image: Tensor, k: int) -> Tensor:
    """Logits [1, C] of exit k, where the image really leaves; a single exit decides nothing and just runs."""
    if network.num_exits == 1:
        return network(image)[0]
    return run_adaptive(network, image, [NOBODY] * k + [EVERYBODY] * (network.num_exits - k))[0]


Times = Mapping[tuple[str, int, str], Sequence[float]]  # of calls, by network, exit and form


def rows_of(times: Times, facts: Mapping[tuple[str, int], tuple[float, str]]) -> Iterator[tuple]:
    """The rows of the table, from milliseconds, and million multiply-adds and top-1 by network and exit."""
    last = {name: percentile(times[name, k, FORMS[1]], 0.5) for name, k in facts}  # the last exit of each
    reference = next(iter(last))
    for (name, k), (macs, top_1) in facts.items():
        if name.startswith("timm/"):
            reference = name
        published = "-"
        if name in PUBLISHED and reference in PUBLISHED:
            published = f"{PUBLISHED[name] / PUBLISHED[reference]:.2f}"
        figures = [percentile(times[name, k, form], share) for form in FORMS for share in (0.5, 0.95)]
        yield name, k, macs, *figures, figures[2] / last[reference], published, top_1


def main(argv: list[str]) -> None:
    """Prints a table."""
    flags = read_flags(Flags, argv, __doc__)
    device = start_compute(Runtime()).device
    torch.manual_seed(0)
    image = torch.randn(1, 3, flags.input_size, flags.input_size, device=device)
    layout = torch.channels_last
    calls, facts = {}, {}
    for name in flags.models:
        network, top_1 = network_of(name)
        tune(network.eval().to(device), device)
        forms = [network, deepcopy(network).to(memory_format=layout), tuned(network)]
        for k, macs in enumerate(exit_costs(network, tuple(image.shape[1:]))):
            facts[name, k] = macs / 1e6, top_1[k]
            for form, one in zip(FORMS, forms, strict=True):
                read = image if one is network else image.to(memory_format=layout)
                calls[name, k, form] = partial(answer, one, read, k)
    warm = {key: call() for key, call in calls.items()}
    differ = max(largest_difference(warm[name, k, "tuned"], warm[name, k, "as built"]) for name, k in facts)
    turns = [key for key in calls for _ in range(BURST)]
    seconds = round_times(calls, turns, rounds=flags.rounds, device=device)
    times = {key: [1e3 * one for i, one in enumerate(spent) if i % BURST] for key, spent in seconds.items()}
    print(describe_machine(device))
    print(f"batch 1, {flags.input_size} pixels, fp32, ms; tuned: logits within {differ:.0e}")
    print_table(HEADS, rows_of(times, facts))


if __name__ == "__main__":
    run_main(main)
