"""Early exit here beside the package earlyon 0.3.0: one ResNet-18, the same weights, thresholds and images.

    pip install earlyon==0.3.0
    python scripts/compare_earlyon.py "$DATA/imagenet_sample_1k"

Exits are where earlyon puts them, after layer2 and layer3, with its heads. Weights are random: speed depends
only on who leaves where. Thresholds let the given percentages of the images leave at the first two exits.
earlyon takes images one by one, or batches, which leave as a whole where the least confident image would. The
network here has the same tensors; it runs in PyTorch, as built and tuned, and exported, by deploy/runner.py.

Contestants take turns. "unlike": images that leave at another exit than in earlyon one by one, and those with
another class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import ne
from pathlib import Path
from typing import Any

from common import print_table, read_flags, timed, word

import torch
from PIL import Image
from torch import Tensor, nn

from adaptive.backend import Backend, Eager, Run, tuned
from adaptive.inference import all_logits
from adaptive.policy import Policy
from adaptive.thresholds import quota_thresholds
from adaptive.timing import percentile
from datasets import IMAGENET_STATS, View
from deploy.backends import Exported, Exports
from experiment.open import Opened
from experiment.recipe import Recipe
from experiment.record import describe_machine
from models import MultiExitModel, create_model
from models.bases import Spans
from utils import UserError, option, run_main

SIZE = 64  # of a micro-batch, and of a turn at batch 1
CLASSES = 1000
RUNNERS = "openvino fp32", "openvino bf16", "onnxruntime fp32"
HEADS = ["", "alone p50, ms:.1f", "p90, ms:.1f", "unlike", "batches, images/s:.0f", "unlike"]


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    folder: Path = word("a folder of files *.JPEG")
    images: int = option(512, "how many, in the order of their names", low=2)
    input_size: int = option(224, "their side", low=32)
    shares: tuple[float, ...] = option((40.0, 30.0), "percent that leave at the first two exits", low=0)
    runners: tuple[str, ...] = option(RUNNERS, "backends with precisions", choices=RUNNERS)


class ResNetExits(Spans):
    """ResNet-18 with the exits, the heads and the weights of earlyon's."""

    num_exits = 3

    def __init__(self, rival: Any) -> None:
        super().__init__()
        network = create_model("resnet18", CLASSES)
        network.load_state_dict(rival.backbone.state_dict())  # named as torchvision's
        *stem, layer3, layer4, classifier = network.children()
        self.spans = nn.ModuleList([nn.Sequential(*stem), layer3, layer4])
        layers = [head.classifier for head in rival.exit_heads.values()]
        self.exits = nn.ModuleList()
        for layer in (*layers, classifier):
            self.exits.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer))

    def span(self, k: int, *values: Tensor) -> Sequence[Tensor]:
        """The map that exit k and the next span read."""
        return [self.spans[k](*values)] * 2


@dataclass
class Found:
    """Classes and exits of the images so far, and the seconds of all calls."""

    classes: list[int]
    exits: list[int]
    seconds: list[float]

    def unlike(self, other: "Found") -> str:
        """How many images leave at another exit, and how many have another class."""
        exits = sum(map(ne, self.exits, other.exits))
        classes = sum(map(ne, self.classes, other.classes))
        return f"{exits}, {classes}"


def make_rival() -> Any:
    """earlyon's network, with the same random weights in every call."""
    from earlyon.models import resnet18_ee

    torch.manual_seed(0)
    return resnet18_ee(num_classes=CLASSES, pretrained=False).eval()


def rival_run(policy: Policy, layout: torch.memory_format) -> Run:
    """Early exit in earlyon, with weights and images in this layout."""
    rival = make_rival().to(memory_format=layout)
    rival.config.confidence_thresholds = [min(limit, 1.0) for limit in policy.thresholds[:-1]]

    def run(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
        logits, exits = [], []
        for part in images.contiguous(memory_format=layout).split(size):
            if size == 1:
                found = rival(part, mode="inference")
                answers = found.prediction
            else:
                found = rival.forward_inference_batched(part)
                answers = found.predictions
            logits.append(answers)
            place = found.exit_taken % 3  # its last exit is -1
            exits.append(torch.full((len(part),), place))
        return torch.cat(logits), torch.cat(exits)

    return run


def run_of(backend: Backend, policy: Policy) -> Run:
    """Early exit here, in latency order for calls of one image."""
    alone = backend.early(policy, "latency")
    pooled = backend.early(policy, "throughput")
    return lambda images, size: alone(images, 1) if size == 1 else pooled(images, size)


def policy_for(network: MultiExitModel, images: Tensor, shares: Sequence[float]) -> Policy:
    """Thresholds by which these percentages of the images leave at the first two exits."""
    if len(shares) != 2 or sum(shares) > 100:
        raise UserError(f"--shares {' '.join(map(str, shares))}: give two percentages, 100 at most together")
    confidence = all_logits(network, images).softmax(-1).amax(-1)
    quotas = torch.tensor([*shares, 100 - sum(shares)]) / 100
    limits = quota_thresholds(confidence, quotas)
    # A threshold is the confidence of an image, some 0.002, which rounding must not keep from leaving.
    return Policy.of(limits - 2e-8)


def contestants(flags: Flags) -> tuple[dict[str, Run], Tensor]:
    """All ways to run the network, earlyon first, and the images [N, 3, H, W]."""
    files = sorted(flags.folder.glob("*.JPEG"))[: flags.images]
    if len(files) < flags.images:
        raise UserError(f"--images {flags.images}: {flags.folder} has {len(files)} files *.JPEG")
    view = View().completed(flags.input_size, *IMAGENET_STATS[:2])
    network = ResNetExits(make_rival()).eval()
    arch = {"name": "resnet18", "options": {}, "num_classes": CLASSES}
    classes = tuple(map(str, range(CLASSES)))
    opened = Opened(network, arch, Recipe(), view, None, "", "", classes)
    images = opened.transform([Image.open(file) for file in files])
    policy = policy_for(network, images, flags.shares)
    runs = {
        "earlyon": rival_run(policy, torch.contiguous_format),
        "earlyon, channels-last": rival_run(policy, torch.channels_last),
        "PyTorch": run_of(Eager(network), policy),
        "PyTorch, tuned": run_of(Eager(tuned(network)), policy),
    }
    exports = Exports(opened)
    for words in flags.runners:
        runs[words] = run_of(Exported(exports, *words.split()), policy)
    return runs, images


def measure(runs: Mapping[str, Run], turns: Sequence[Tensor], size: int) -> dict[str, Found]:
    """All contestants on the images of each turn, in calls of one image or of all in micro-batches."""
    found = {name: Found([], [], []) for name in runs}
    for images in turns:
        calls = images.split(1 if size == 1 else len(images))
        for name, run in runs.items():
            one = found[name]
            run(calls[0], size)  # not timed: caches are others', and sizes of batches may be new
            for part in calls:
                (logits, exits), seconds = timed(partial(run, part, size))
                one.classes += logits.argmax(-1).tolist()
                one.exits += exits.tolist()
                one.seconds.append(seconds)
    return found


def main(argv: list[str]) -> None:
    """Prints a table."""
    flags = read_flags(Flags, argv, __doc__)
    runs, images = contestants(flags)
    alone = measure(runs, images.split(SIZE), 1)
    batches = measure(runs, [images], SIZE)
    reference = alone["earlyon"]
    rows = []
    for name, one in alone.items():
        p50 = 1e3 * percentile(one.seconds, 0.5)
        p90 = 1e3 * percentile(one.seconds, 0.9)
        batch = batches[name]
        speed = len(images) / sum(batch.seconds)
        rows.append((name, p50, p90, one.unlike(reference), speed, batch.unlike(reference)))
    left = [reference.exits.count(k) for k in range(3)]
    print(describe_machine(images.device))
    print(f"{len(images)} images of {flags.input_size} pixels, n = 1; leaving at each exit: {left}")
    print_table(HEADS, rows)


if __name__ == "__main__":
    run_main(main)
