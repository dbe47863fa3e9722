"""Images per second of the loader, of the training step, and of both together, in one run.

    python scripts/bench_loader.py --model msdnet_cifar_lin5 --data_set CIFAR10 --data_path DIR \\
        --opt sgd --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --device_data true

Flags are those of main_earlyExit.py, and those below. The loader alone reads, augments and hands its batches
to the device; the step alone (forward and backward pass, optimizer) runs again and again on one batch. A
loader with processes works while the step runs: the faster of the two waits. Without processes their times
add up. With --device_data true there is a row of it beside those of the loaders that read images one by one.

The variants take turns, for a few rounds, and the median is shown. What a loader needs for its first batch
(processes start) is not counted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from statistics import median

from common import print_table, read_known, timed

import torch
from torch import Tensor

from datasets import Splits, open_splits
from experiment.batches import loader_of
from experiment.checks import check
from experiment.procedures import training_recipe
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.record import describe_machine
from models import create_model, tune
from training.optim import make_update
from training.parallel import start_compute
from utils import Compute, UserError, option, run_main

HEADS = ["variant", "images/s:.0f", "of the step alone:.2f", "of the first row:.2f"]
Batches = Iterable[tuple[Tensor, Tensor]]
Work = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Flags:
    """What is timed, beside a recipe."""

    batches: int = option(20, "batches that a variant is timed on, each round", low=1)
    rounds: int = option(5, "of which the median is shown", low=1)
    workers: tuple[int, ...] = option((0, 2), "data loading processes, a row each", low=0)


def loaders_of(
    recipe: Recipe, workers: Iterable[int], splits: Splits, compute: Compute
) -> dict[str, Batches]:
    """The training loaders by name: one for each number of processes, and that on the device if asked for."""
    one_by_one = replace(recipe, transform=replace(recipe.transform, device_data=False, flip="random"))
    loaders: dict[str, Batches] = {}
    for count in workers:
        variant = replace(one_by_one, runtime=replace(recipe.runtime, num_workers=count))
        loaders[f"{count} processes"] = loader_of(variant, splits, compute, 1)
    if recipe.transform.device_data:
        loaders["on the device"] = loader_of(recipe, splits, compute, 1)
    return loaders


def step_of(recipe: Recipe, splits: Splits, compute: Compute) -> Work:
    """A training step of the recipe's network."""
    torch.manual_seed(recipe.data.seed)
    model = compute.place(create_model(recipe.network.model, splits.source.num_classes, **recipe.options))
    tune(model.train(), compute.device)
    if recipe.session.compile:
        model.compile()
    update = make_update(model, recipe.optimization, steps=10**6)
    objective = recipe.objective.function(model, "joint")

    def step(images: Tensor, targets: Tensor) -> None:
        with compute.autocast():
            for loss, _ in objective(model, images, targets):
                update(loss)

    return step


def seconds(batches: Batches, count: int, work: Work, compute: Compute) -> float:
    """How long `count` batches take, the first one not counted; the loader's processes end with it."""
    wait = torch.get_device_module(compute.device).synchronize
    feed = iter(batches)

    def read(number: int) -> None:
        for images, targets in islice(feed, number):
            work(compute.put(images), compute.put(targets))
        wait()

    read(1)
    return timed(partial(read, count))[1]


def main(argv: list[str]) -> None:
    """Prints a row for each loader, for the step, and for both together."""
    flags, words = read_known(Flags, argv, __doc__)
    recipe = training_recipe(read_command(list(GROUPS.values()), words))
    check(recipe)
    compute = start_compute(recipe.runtime)
    splits = open_splits(recipe.data, recipe.view, recipe.transform)
    loaders = loaders_of(recipe, flags.workers, splits, compute)
    short = min(len(loader) for loader in loaders.values())
    if short <= flags.batches:
        raise UserError(f"--batches {flags.batches}: an epoch has {short}, one more is needed")
    step = step_of(recipe, splits, compute)
    resident = [tuple(map(compute.put, batch)) for batch in islice(next(iter(loaders.values())), 1)]
    variants: dict[str, tuple[Batches, Work]] = {
        **{
            f"loader alone, {name}": (loader, lambda images, targets: None)
            for name, loader in loaders.items()
        },
        "step alone": (cycle(resident), step),
        **{f"both, {name}": (loader, step) for name, loader in loaders.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(flags.rounds):
        for name, (batches, work) in variants.items():
            times[name].append(seconds(batches, flags.batches, work, compute))
    print(describe_machine(compute.device))
    size, pixels = recipe.runtime.batch_size, splits.view.size
    print(f"{recipe.network.model}, {recipe.data.data_set}, batch {size}, {pixels} pixels")
    speeds = {name: flags.batches * size / median(spent) for name, spent in times.items()}
    alone, first = speeds["step alone"], next(iter(speeds.values()))
    print_table(HEADS, [(name, speed, speed / alone, speed / first) for name, speed in speeds.items()])


if __name__ == "__main__":
    run_main(main)
