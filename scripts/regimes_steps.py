"""How long the rows of `compare_regimes.py` train on an image."""

import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median

import torch
from regimes_rows import Row

from datasets import Split, Splits, open_splits
from experiment.checkpoint import save
from experiment.checks import check
from experiment.classifier import Classifier
from experiment.procedures import training_recipe
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.stopping import Signals
from training.parallel import start_compute
from utils import UserError

HALF = 0.5  # of the epochs: a phase, since two epochs are timed


def check_timed(name: str, recipe: Recipe, steps: int) -> None:
    """Raises ValueError unless two epochs of so many steps are of the kinds of a run, in their proportion."""
    low = recipe.low_start
    for share in (recipe.objective.first_share, low.low_share if low.low_size else HALF):
        if share != HALF:
            raise UserError(f"row {name} has a phase of {share:g} of the epochs, accepted: {HALF}")
    interval = recipe.weighting.meta_interval if recipe.weighting.l2w else 1
    if steps % interval:
        raise UserError(f"--steps {steps}: accepted for row {name}: multiples of meta_interval {interval}")


class Timing:
    """Training steps of a row, as a run takes them, but for their learning rate."""

    def __init__(
        self, row: Row, data: Sequence[str], splits: Splits, steps: int, teacher: Path | None
    ) -> None:
        taught = ["--kd_teacher", str(teacher)] if teacher else []
        words = [*row.words, *data, *taught, "--lr", "1e-6", "--epochs", "2", "--disable_eval", "true"]
        recipe = training_recipe(read_command(list(GROUPS.values()), words))
        check(recipe)
        check_timed(row.name, recipe, steps)
        count = steps * recipe.runtime.batch_size
        train = splits.train
        if isinstance(train, Split):
            train = Split(train.base, train.indices[:count], train.transform)
        compute = start_compute(recipe.runtime)
        if compute.device.type != "cpu":
            raise UserError(f"row {row.name} is for {compute.device.type}, accepted: device: cpu")
        signals = Signals(recipe.session.requeue_code, compute)
        with redirect_stdout(StringIO()):  # what a run says when it starts
            self.classifier = Classifier(recipe, compute, signals, replace(splits, train=train))
        self.images = 2 * count

    def seconds(self) -> float:
        """Processor seconds per image, the mean of two epochs, which are a regime's two phases."""
        self.classifier.network.requires_grad_(True)  # training heads alone has frozen the rest
        start = time.process_time()
        for epoch in range(2):
            self.classifier.one_epoch(epoch)
        return (time.process_time() - start) / self.images

    def save(self, path: Path) -> None:
        """Writes the network as it is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, {"model": self.classifier.network.state_dict(), **self.classifier.facts()})


def measure(
    rows: Sequence[Row], data: Sequence[str], folder: Path, *, teachers: set[str], steps: int, rounds: int
) -> tuple[int, dict[str, float]]:
    """The number of training images, and processor seconds per image of these rows on one thread.

    They are timed in turn, for `rounds` after one that does not count, by twice so many `steps`. Networks of
    rows named in `teachers` go into the folder: untrained, they take as long as trained ones.
    """
    torch.set_num_threads(1)
    recipe = training_recipe(read_command(list(GROUPS.values()), [*rows[0].words, *data]))
    splits = open_splits(recipe.data, recipe.view, recipe.transform)
    timings: dict[str, Timing] = {}
    for row in rows:
        teacher = folder / f"{row.teacher}.pth" if row.teacher else None
        timings[row.name] = Timing(row, data, splits, steps, teacher)
        if row.name in teachers:
            timings[row.name].save(folder / f"{row.name}.pth")
    spent: dict[str, list[float]] = {name: [] for name in timings}
    for turn in range(rounds + 1):
        for name, timing in timings.items():
            seconds = timing.seconds()
            if turn:
                spent[name].append(seconds)
    return len(splits.train), {name: median(values) for name, values in spent.items()}
