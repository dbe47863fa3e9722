"""What the exits of a subject say about its images: those to report on, those to choose thresholds on."""

from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from adaptive.exit_tables import ExitTables
from datasets import Split, ordered_loader
from engine import evaluate
from experiment.subject import Subject
from utils import Compute, UserError, seed_everything


def tables(subject: Subject, images: Dataset, title: str) -> ExitTables:
    """What every exit predicts for every image."""
    loader = ordered_loader(images, subject.recipe.runtime, subject.compute)
    confidence = subject.recipe.exits.confidence
    return evaluate(subject.network, loader, subject.compute, reading=confidence, title=title)


def check_calibration(subject: Subject) -> None:
    """Raises ValueError where thresholds are to be chosen on held-out images and there are none."""
    if subject.recipe.exits.calib == "held_out" and len(subject.splits.calib) == 0:
        other = "use --calib half_test, or train_augmented as L2W and Dyn-Perceiver do"
        raise UserError(f"no images were held out for calibration (--num_calib 0); {other}")


def calibrate(subject: Subject, test: ExitTables) -> tuple[ExitTables, ExitTables, str]:
    """Tables to report on, tables to choose thresholds on, and a description of the latter's images."""
    check_calibration(subject)
    train, calib, kind = subject.splits.train, subject.splits.calib, subject.recipe.exits.calib
    if kind == "none":
        return test, test, "no images, as they are given; expected figures are of the test images"
    generator = torch.Generator().manual_seed(subject.recipe.data.seed)
    if kind == "half_test":
        order, half = torch.randperm(len(test), generator=generator), len(test) // 2
        origin = f"{half} random test images, not reported on"
        return test.part(order[half:]), test.part(order[:half]), origin
    origin = f"{len(calib)} images held out of the training set, evaluation transform"
    if kind == "train_augmented":
        if not isinstance(train, Split):
            raise UserError("--calib train_augmented needs training images by index; a stream has none")
        first = torch.randperm(len(train), generator=generator)[: 101 * subject.recipe.runtime.batch_size]
        calib = Subset(train, first.tolist())
        origin = f"{len(calib)} training images with training augmentation, the published procedure"
        seed_everything(subject.recipe.data.seed, 0, subject.compute.rank)  # augmentation draws from it
    elif subject.held_out is None:
        origin += " (of a checkpoint without a stored split: the network was probably trained on them)"
    if subject.compute.rank == 0:
        print(f"thresholds are chosen on {origin}")
    return test, tables(subject, calib, "calibrate"), origin


def test_images(subject: Subject, number: int) -> tuple[Tensor, Tensor]:
    """At most `number` test images [N, 3, H, W], evenly spread, and their targets [N], on the device."""
    test, device = subject.splits.test, subject.compute.device
    if isinstance(test, Split):  # files may be sorted by class
        number = min(number, len(test))
        test = Subset(test, torch.linspace(0, len(test) - 1, number).long().tolist())
    loader = ordered_loader(test, subject.recipe.runtime, Compute(device))
    columns = zip(*islice(loader, -(-number // loader.batch_size)), strict=True)
    images, targets = (torch.cat(column)[:number].to(device) for column in columns)
    return images, targets
