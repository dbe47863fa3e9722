"""Logits of every exit for the images of an evaluation, kept in a file: what needs no network twice."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.flops import count
from adaptive.reading import Reading
from datasets import ordered_loader
from engine import evaluate_readings
from experiment import checkpoint
from experiment.recipe import read_command
from experiment.samples import halves
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import UserError


@dataclass(frozen=True)
class Logits:
    """Logits [K, N, C] of images that the network was not trained on, float32, and their targets [N].

    The first `num_calib` images are for calibration, the others are test images. `costs` are those of the
    stages, `confidence` is the kind asked for. Raises ValueError where these do not fit together.
    """

    logits: Tensor
    targets: Tensor
    num_calib: int
    costs: StageCosts
    confidence: str = "max_prob"

    def __post_init__(self) -> None:
        Reading(self.confidence)  # which refuses what it does not know
        exits, images, _ = self.logits.shape
        if len(self.targets) != images or not 0 <= self.num_calib <= images:
            given = f"{len(self.targets)} targets and {self.num_calib} calibration images"
            raise UserError(f"{given} for logits of {images} images")
        if len(self.costs.trunks) != exits:
            raise UserError(f"costs of {len(self.costs.trunks)} stages for logits of {exits} exits")

    def tables(self, reading: Reading | None = None) -> ExitTables:
        """The tables of all images, by default with the exits' own answers and the confidence asked for."""
        return ExitTables.of(list(self.logits), self.targets, reading or Reading(self.confidence))

    def split(self) -> tuple["Logits", "Logits"]:
        """The calibration images, and the test images."""
        n = self.num_calib
        calib = replace(self, logits=self.logits[:, :n], targets=self.targets[:n])
        test = replace(self, logits=self.logits[:, n:], targets=self.targets[n:], num_calib=0)
        return calib, test


def logits_of(path: str, words: Sequence[str]) -> Logits:
    """Reads the file where it exists; else opens the evaluation that `words` name, and writes the file.

    Without a path, no file is written. Raises ValueError for words that are no flags of eval_dynamic.py.
    """
    given = read_command(EVALUATION, list(words))
    if path and Path(path).exists():
        return load(path)
    found = collect(open_evaluation(given))
    if path:
        save(path, found)
    return found


def collect(subject: Subject) -> Logits:
    """The logits of the images of an evaluation, in one process.

    Calibration images are those held out of training. With `--calib half_test`, and where none are known to
    have been held out, they are a random half of the test images.
    """
    logits, targets = _read(subject, subject.splits.test, "test")
    calib = subject.splits.calib
    if subject.recipe.exits.calib != "half_test" and subject.held_out is not None and len(calib):
        more, known = _read(subject, calib, "calib")
        logits, targets, num_calib = torch.cat([more, logits], 1), torch.cat([known, targets]), len(known)
    else:
        first, second = halves(len(targets), subject.recipe.data.seed)
        order, num_calib = torch.cat([first, second]), len(first)
        logits, targets = logits[:, order], targets[order]
    costs = count(subject.network, subject.shape).stages
    return Logits(logits, targets, num_calib, costs, subject.recipe.exits.confidence)


def _read(subject: Subject, images: Dataset, title: str) -> tuple[Tensor, Tensor]:
    """Logits [K, N, C] and targets [N] of images."""
    parts: list[tuple[Tensor, Tensor]] = []

    def keep(exits: list[Tensor], targets: Tensor) -> None:
        parts.append((torch.stack(exits).float().cpu(), targets.cpu()))

    loader = ordered_loader(images, subject.recipe.runtime, subject.compute)
    readings = [subject.recipe.exits.confidence]
    evaluate_readings(subject.network, loader, subject.compute, readings=readings, title=title, watch=keep)
    logits, targets = zip(*parts, strict=True)
    return torch.cat(logits, 1), torch.cat(targets)


def save(path: str | Path, logits: Logits) -> None:
    """Keeps logits in a file of tensors and plain types."""
    checkpoint.save(path, {**vars(logits), "costs": asdict(logits.costs)})


def load(path: str | Path) -> Logits:
    """What `save` wrote. Raises ValueError in one line for any other file."""
    content = checkpoint.load(path)
    try:
        return Logits(**{**content, "costs": StageCosts(**content["costs"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no logits that can be read: {error}") from error
