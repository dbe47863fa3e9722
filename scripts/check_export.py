"""What an exported network answers in other runtimes, beside PyTorch: a row for each network and runtime.

    python scripts/check_export.py [--families msdnet cascade ...]
    python scripts/check_export.py --checkpoint FILE ... [--images FILE.npz] [--num_images N] [--policy FILE]
    python scripts/check_export.py --networks NAME:weights=FILE NAME:weights=FILE [--images FILE.npz] ...

Without files: small networks of every family, with random weights. "difference" is the largest of the logits
of all exits, relative to the largest logit. Without `--policy`, half of the images that arrive at an exit
leave there. "moved" are images that leave at another exit; of these, "ties" had a confidence nearer to a
threshold than float noise is. Images come in batches of 1, 64 and what is left.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import largest_difference, policy_for, print_table, read_flags, timed

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaptive.confidence import CONFIDENCES, NOBODY
from adaptive.inference import all_logits
from adaptive.policy import Policy
from datasets import View
from deploy.export import export
from deploy.manifest import Manifest, StageFiles
from deploy.runner import Runner
from experiment import Opened, open_network
from experiment.cascade import read_cascade
from experiment.recipe import Recipe
from loading.sources import load_npz
from models import nearest
from utils import UserError, option, run_main

HEADS = [
    "network",
    "runtime",
    "stages",
    "difference:.1e",
    "moved",
    "ties",
    "images",
    "MB:.1f",
    "export, s:.1f",
]
NOISE = 1e-5  # of a confidence
SMALL_MSDNET = {"nBlocks": 2, "nChannels": 8, "growthRate": 4}
RESIZED = ({"name": "cifar_resnet", "options": {"depth": 8}, "size": 16}, "cifar_resnet")
# Per family: a registered network, its options, the side of its images.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "msdnet": ("msdnet", SMALL_MSDNET, 32),
    "ranet": ("ranet", {"nChannels": 8, "growthRate": 4, "step": 2, "nBlocks": 1}, 32),
    "perceiver": ("reg400m_perceiver_t32", {}, 64),
    "rexnet": ("rexnet_ee_100", {"input_ch": 8, "final_ch": 32, "head_width": 16}, 64),
    "timm-cnn": ("timm_ee", {"backbone": "mobilenetv3_small_050", "exits": 3, "head_width": 16}, 64),
    "timm-vit": ("timm_ee", {"backbone": "vit_tiny_patch16_224", "exits": 2, "head_width": 16}, 224),
    "cascade": ("ebjr", {"networks": RESIZED}, 32),
    "boosted": ("boosted/msdnet", SMALL_MSDNET, 32),
    "single": ("cifar_densenet", {"depth": 10, "growthRate": 4}, 32),
}
State = dict[str, np.ndarray]
Call = Callable[[State], tuple[np.ndarray, State]]


@dataclass(frozen=True)
class Flags:
    """What is exported."""

    checkpoint: tuple[str, ...] = option((), "files of networks, instead of small ones of every family")
    families: tuple[str, ...] = option((), f"of the small networks: {', '.join(FAMILIES)}; default: all")
    networks: tuple[str, ...] = option((), "files of the networks of a cascade, NAME:weights=FILE each")
    images: str = option("", "an .npz file; default: noise")
    num_images: int = option(257, "how many images", low=2)
    policy: str = option("", "a saved policy of the one checkpoint")


def subjects(flags: Flags) -> Iterator[tuple[str, Opened]]:
    """The networks with their names."""
    for path in flags.checkpoint:
        opened = open_network(path)
        yield f"{opened.arch['name']} ({Path(path).parent.name})", opened
    if flags.networks:
        yield "cascade of files", open_network(read_cascade(flags.networks))
    files = flags.checkpoint or flags.networks
    for family in flags.families or (() if files else FAMILIES):
        if family not in FAMILIES:
            raise UserError(f"unknown family {family!r}; {nearest(family, FAMILIES)}")
        name, options, side = FAMILIES[family]
        torch.manual_seed(0)
        recipe = Recipe.of({"model": name}, options=options)
        opened = open_network(recipe, num_classes=10, view=View(side, (0.5,) * 3, (0.25,) * 3))
        opened.network.train()
        with torch.no_grad():  # statistics of batch norm that untrained networks lack
            opened.network(opened.transform(pictures("", 16)))
        opened.network.eval()
        yield family, opened


def pictures(file: str, count: int) -> list[Image.Image]:
    """The first images of a file, or noise of 32 x 32 pixels."""
    if file:
        samples = load_npz(file, 1000)
        return [samples[i][0] for i in range(min(count, len(samples)))]
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((32, 32)) for one in noise]


def program(path: Path, stage: StageFiles) -> Call:
    """A stage as PyTorch runs its file."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def call(state: State) -> tuple[np.ndarray, State]:
        given = [torch.from_numpy(state[one.name]) for one in stage.inputs]
        logits, *made = module(*given)
        after = {one.name: value.numpy() for one, value in zip(stage.outputs, made, strict=True)}
        return logits.numpy(), after

    return call


def runtimes(folder: Path, found: Manifest) -> Iterator[tuple[str, list[Call], float]]:
    """Runtimes by name: their stages, and the megabytes of the files."""
    programs = [folder / stage.pt2 for stage in found.stages]
    yield ".pt2", list(map(program, programs, found.stages)), megabytes(programs)
    graphs = [folder / stage.fp32 for stage in found.stages]
    for name in ("onnxruntime", "openvino"):
        yield name, list(Runner(folder, name).stages), megabytes(graphs)


def megabytes(paths: Sequence[Path]) -> float:
    """The size of files."""
    return sum(path.stat().st_size for path in paths) / 1e6


def answered(calls: Sequence[Call], images: Tensor) -> Tensor:
    """Logits [K, N, C] of all stages, for batches of 1, 64 and what is left."""
    parts = []
    for batch in (images[:1], *images[1:].split(64)):
        state = {"images": batch.numpy()}
        exits = []
        for call in calls:
            logits, made = call(state)
            state |= made
            exits.append(logits.copy())
        parts.append(np.stack(exits))
    return torch.from_numpy(np.concatenate(parts, 1))


def halves(logits: Tensor) -> Policy:
    """The policy by which half of the images that arrive at an exit leave there, for logits [K, N, C]."""
    confidence = CONFIDENCES["max_prob"](logits)
    stay = torch.ones(logits.shape[1], dtype=torch.bool)
    limits = []
    for row in confidence[:-1]:
        limits.append(row[stay].quantile(0.5).item() if stay.any() else 1.0)
        stay &= row < limits[-1]
    return Policy((*limits, -NOBODY))


def exits_of(policy: Policy, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where images leave by logits [K, N, C], and how near to a threshold they came until there: [N] each."""
    memory = None
    leaves = []
    margins = []
    for k, row in zip(policy.on, logits, strict=True):
        _, score, memory = policy.reading.read(k, row, memory)
        leaves.append(policy.leaves(k, score))
        margins.append((score - policy.thresholds[k]).abs())
    place = torch.stack(leaves).byte().argmax(0)
    passed = torch.arange(len(margins))[:, None] <= place
    return place, torch.stack(margins).where(passed, torch.inf).amin(0)


def rows_of(name: str, opened: Opened, flags: Flags, folder: Path) -> Iterator[tuple]:
    """A row for each runtime."""
    images = opened.transform(pictures(flags.images, flags.num_images))
    whole = all_logits(opened.network, images)
    policy = policy_for(flags.policy, opened.network) or halves(whole)
    expected = whole[policy.on]
    places, margins = exits_of(policy, expected)
    found, seconds = timed(partial(export, opened, policy, folder))
    for runtime, calls, size in runtimes(folder, found):
        logits = answered(calls, images)
        moved = exits_of(policy, logits)[0] != places
        ties = moved & (margins < NOISE)
        difference = largest_difference(logits, expected)
        counts = int(moved.sum()), int(ties.sum()), len(images)
        yield name, runtime, len(calls), difference, *counts, size, seconds


def main(argv: list[str]) -> None:
    """Exports networks to temporary folders and prints a table."""
    flags = read_flags(Flags, argv, __doc__)
    if flags.policy and len(flags.checkpoint) != 1:
        raise UserError(
            f"--policy {flags.policy}: is for one --checkpoint, {len(flags.checkpoint)} are given"
        )
    rows = []
    for name, opened in subjects(flags):
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(name, opened, flags, Path(folder))
    print(f"torch {torch.__version__}; logits and exits against PyTorch, which folds no batch norm")
    print_table(HEADS, rows)


if __name__ == "__main__":
    run_main(main)
