"""Seconds of an epoch of heads on a frozen backbone, with its features in files and without.

    python scripts/bench_features.py --data_set CIFAR10 --data_path train.npz --eval_data_path test.npz

Flags are those of main_earlyExit.py, and those below. An epoch has `--images` training images. Both ways take
turns, for a few rounds; shown are medians, and the median of the rounds' ratios with the least and the
largest. The pass that computes the features is timed once. Weights are random: they cost as much as others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory

from common import print_table, read_known, timed

import torch

from datasets import Split, Splits, open_splits
from engine import train_one_epoch
from experiment.batches import loader_of
from experiment.cached import Features
from experiment.checks import check
from experiment.open import architecture
from experiment.procedures import training_recipe
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.record import describe_machine
from models import create_model
from training.optim import make_update
from training.parallel import start_compute
from training.regimes import trained_through
from utils import Compute, UserError, option, run_main

NETWORKS = (
    "timm_ee:tf_efficientnet_lite0:112",
    "timm_ee:tf_efficientnet_lite0:96",
    "vit_ee:vit_tiny_patch16_224:96",
)
HEADS = ["network", "without, s:.2f", "with, s:.3f", "ratio", "the pass, s:.2f"]
TRAINS_HEADS = (
    "--freeze_backbone true --cache_features true --mixup 0 --cutmix 0 --disable_eval true --warmup_epochs 0"
)


@dataclass(frozen=True)
class Flags:
    """What is timed, beside a recipe."""

    networks: tuple[str, ...] = option(
        NETWORKS, "MODEL:BACKBONE:PIXELS of timm_ee, whose maps are pooled, or vit_ee"
    )
    images: int = option(1000, "training images of an epoch", low=2)
    rounds: int = option(3, "of which the median is shown", low=1)


def recipe_of(name: str, words: list[str], folder: str) -> Recipe:
    """The recipe of a network of the list, with these flags, and features in the folder."""
    model, _, rest = name.partition(":")
    backbone, _, pixels = rest.partition(":")
    if model not in ("timm_ee", "vit_ee") or not pixels.isdecimal():
        raise UserError(f"--networks {name}: accepted: MODEL:BACKBONE:PIXELS with timm_ee or vit_ee")
    words = ["--model", model, "--backbone", backbone, "--input_size", pixels, "--cache_dir", folder, *words]
    if model == "timm_ee":
        words += ["--head", "pooled"]
    recipe = training_recipe(read_command(list(GROUPS.values()), [*TRAINS_HEADS.split(), *words]))
    check(recipe)
    return recipe


def first_images(splits: Splits, count: int) -> Splits:
    """The splits with so many training images alone."""
    train = splits.train
    if not isinstance(train, Split) or len(train) < count:
        raise UserError(f"--images {count}: accepted: at most {len(train)}, by index")
    first = Split(train.base, train.indices[:count], train.transform)
    return replace(splits, train=first, calib=Split(train.base, [], train.transform))


def epochs_of(recipe: Recipe, count: int, compute: Compute) -> tuple[Callable[[], object], ...]:
    """What is timed: an epoch without cached features, one with them, and the pass that computes them."""
    splits = first_images(open_splits(recipe.data, recipe.view, recipe.transform), count)
    torch.manual_seed(recipe.data.seed)
    arch = architecture(recipe.network.model, recipe.options, splits.source.num_classes, splits.view)
    network = compute.place(create_model(arch["name"], arch["num_classes"], **arch["options"]))
    features = Features(recipe, splits, network, arch, compute)
    on_images = trained_through(network, "heads", (3, splits.view.size, splits.view.size))
    update = make_update(network, recipe.optimization, steps=10**6)
    epochs = []
    for core, cached in ((on_images, None), (features.heads(on_images), features)):
        loader = loader_of(recipe, splits, compute, 1, cached)
        objective = recipe.objective.function(network, "heads")
        epochs.append(partial(train_one_epoch, core, loader, objective, update, compute))
    return (*epochs, features.compute_missing)


def main(argv: list[str]) -> None:
    """Prints a row for every network."""
    flags, words = read_known(Flags, argv, __doc__)
    rows = []
    for name in flags.networks:
        with TemporaryDirectory() as folder:
            recipe = recipe_of(name, words, folder)
            compute = start_compute(recipe.runtime)
            without, cached, compute_features = epochs_of(recipe, flags.images, compute)
            _, pass_seconds = timed(compute_features)
            times = [(timed(without)[1], timed(cached)[1]) for _ in range(flags.rounds)]
        ratios = sorted(slow / fast for slow, fast in times)
        seconds = [median(column) for column in zip(*times, strict=True)]
        shown = f"{median(ratios):.0f} [{ratios[0]:.0f}, {ratios[-1]:.0f}]"
        rows.append((name, *seconds, shown, pass_seconds))
    print(describe_machine(compute.device))
    print(f"an epoch of {flags.images} images of {recipe.data.data_set}, {flags.rounds} rounds")
    print_table(HEADS, rows)


if __name__ == "__main__":
    run_main(main)
