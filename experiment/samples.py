"""What the exits of a subject say about its images: those to report on, those to choose thresholds on."""

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from adaptive.calibration import TemperatureFit
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from adaptive.reading import Reading
from datasets import Split, ordered_loader
from engine import evaluate, evaluate_readings
from experiment.subject import Subject
from utils import Compute, UserError, gather, seed_everything


@dataclass(frozen=True)
class Seen:
    """What the exits say about the images of an evaluation.

    `test` are the tables to report on, read by `reading`, `own` the same images with the exits' own answers;
    `places` [N] says which of the test images they are. `calib` are tables to choose thresholds on, None
    where none are chosen, and `origin` says of which images.
    """

    reading: Reading
    test: ExitTables
    own: ExitTables
    places: Tensor
    calib: ExitTables | None
    origin: str

    def read_by(self, policy: Policy) -> ExitTables:
        """The test images as a policy reads them."""
        return self.test if policy.reading == self.reading else self.own


def see(subject: Subject) -> Seen:
    """Runs every exit on all images that the evaluation needs."""
    exits, test = subject.recipe.exits, subject.splits.test
    calibrated = exits.mode != "anytime" and subject.policy is None
    if calibrated:
        check_calibration(subject)  # before any image is read
    reading = subject.policy.reading if subject.policy else reading_of(subject)
    readings = [reading] if reading == Reading(reading.confidence) else [reading, Reading()]
    loader = ordered_loader(test, subject.recipe.runtime, subject.compute)
    read = evaluate_readings(subject.running, loader, subject.compute, readings=readings, title="test")
    whole, own = read[0], read[-1]
    places = torch.arange(len(whole))
    if not calibrated:
        return Seen(reading, whole, own, places, None, "none")
    part, calib, origin = calibrate(subject, whole, reading)
    places = reported(subject, len(whole))
    return Seen(reading, part, own.part(places), places, calib, origin)


def reading_of(subject: Subject) -> Reading:
    """How the flags have logits read; temperatures are fitted on the calibration images."""
    exits = subject.recipe.exits
    reading = Reading(exits.confidence, exits.answer)
    if not exits.temperature:
        return reading
    check_calibration(subject)
    if exits.calib == "none":
        raise UserError("--temperature true: there are no images to fit temperatures on (--calib none)")
    images = images_to_fit(subject, "--temperature true")
    fit, loader = TemperatureFit(), ordered_loader(images, subject.recipe.runtime, subject.compute)
    evaluate_readings(
        subject.running, loader, subject.compute, readings=[reading], title="temperatures", watch=fit.add
    )
    whole = TemperatureFit.merged(gather(fit, subject.compute))
    return replace(reading, temperatures=whole.temperatures())


def images_to_fit(subject: Subject, what: str) -> Dataset:
    """The images that `calibrate` chooses thresholds on, for `what` is fitted before."""
    if subject.recipe.exits.calib != "half_test":
        return calibration_images(subject)[0]
    test = subject.splits.test
    if not isinstance(test, Split):
        raise UserError(f"{what} with --calib half_test: a stream has no images by index")
    return Subset(test, halves(len(test), subject.recipe.data.seed)[0].tolist())


def tables(subject: Subject, images: Dataset, title: str, reading: Reading | None = None) -> ExitTables:
    """What every exit predicts for every image, by default as the flags say without temperatures."""
    loader = ordered_loader(images, subject.recipe.runtime, subject.compute)
    exits = subject.recipe.exits
    reading = reading or Reading(exits.confidence, exits.answer)
    return evaluate(subject.running, loader, subject.compute, reading=reading, title=title)


def check_calibration(subject: Subject) -> None:
    """Raises ValueError where held-out images are needed, or known to be held out, and are not."""
    exits = subject.recipe.exits
    if exits.calib == "held_out" and exits.assures and subject.held_out is None:
        unknown = "which images the network was trained on is not known, so none can test a guarantee"
        raise UserError(f"--calib held_out: {unknown}; use --calib half_test")
    if exits.calib == "held_out" and len(subject.splits.calib) == 0:
        other = "use --calib half_test, or train_augmented as L2W and Dyn-Perceiver do"
        raise UserError(f"no images were held out for calibration (--num_calib 0); {other}")


def halves(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two halves of `number` test images at random, as indices: to choose thresholds on, to report on."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return order[: number // 2], order[number // 2 :]


def reported(subject: Subject, number: int) -> Tensor:
    """Which of `number` test images `calibrate` reports on, as indices, in the order of its tables."""
    half_test = subject.recipe.exits.calib == "half_test"
    return halves(number, subject.recipe.data.seed)[1] if half_test else torch.arange(number)


def calibration_images(subject: Subject) -> tuple[Dataset, str]:
    """The images, of the training set, to choose thresholds on, and a description of them."""
    calib, kind = subject.splits.calib, subject.recipe.exits.calib
    origin = f"{len(calib)} images held out of the training set, evaluation transform"
    if kind == "held_out":
        unknown = " (of a checkpoint without a stored split: the network was probably trained on them)"
        return calib, origin + unknown * (subject.held_out is None)
    images = augmented_images(subject, "--calib train_augmented")
    return images, f"{len(images)} training images with training augmentation, the published procedure"


def augmented_images(subject: Subject, what: str) -> Subset:
    """Random training images with training augmentation, 101 batches at most."""
    train, seed = subject.splits.train, subject.recipe.data.seed
    if not isinstance(train, Split):
        raise UserError(f"{what} needs training images by index; a stream has none")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    seed_everything(seed, 0, subject.compute.rank)  # augmentation draws from it
    return Subset(train, order[: 101 * subject.recipe.runtime.batch_size].tolist())


def calibrate(
    subject: Subject, test: ExitTables, reading: Reading | None = None
) -> tuple[ExitTables, ExitTables, str]:
    """Tables to report on, tables to choose thresholds on, and a description of the latter's images.

    `test` are all test images, read by `reading`.
    """
    check_calibration(subject)
    kind = subject.recipe.exits.calib
    if kind == "none":
        return test, test, "no images, as they are given; expected figures are of the test images"
    if kind == "half_test":
        if len(test) < 2:
            raise UserError(f"--calib half_test: of {len(test)} test images no half can be taken")
        half, others = halves(len(test), subject.recipe.data.seed)
        return test.part(others), test.part(half), f"{len(half)} random test images, not reported on"
    images, origin = calibration_images(subject)
    if subject.compute.rank == 0:
        print(f"thresholds are chosen on {origin}")
    return test, tables(subject, images, "calibrate", reading), origin


def test_images(subject: Subject, number: int) -> tuple[Tensor, Tensor]:
    """At most `number` test images [N, 3, H, W], evenly spread, and their targets [N], on the device."""
    return _spread(subject, subject.splits.test, number)


def calib_images(subject: Subject, number: int) -> Tensor:
    """At most `number` images [N, 3, H, W] for int8: of those that thresholds are chosen on.

    A guarantee needs images that nothing has seen, the ranges of int8 neither: then training images.
    """
    check_calibration(subject)
    if subject.recipe.exits.assures:
        return _spread(subject, augmented_images(subject, "a guarantee in int8"), number)[0]
    if subject.recipe.exits.calib == "none":
        raise UserError("--precision int8: there are no images to calibrate it on (--calib none)")
    return _spread(subject, images_to_fit(subject, "--precision int8"), number)[0]


def _spread(subject: Subject, images: Dataset, number: int) -> tuple[Tensor, Tensor]:
    if isinstance(images, (Split, Subset)):  # files may be sorted by class
        number = min(number, len(images))
        images = Subset(images, torch.linspace(0, len(images) - 1, number).long().tolist())
    device = subject.compute.device
    loader = ordered_loader(images, subject.recipe.runtime, Compute(device))
    columns = zip(*islice(loader, -(-number // loader.batch_size)), strict=True)
    found, targets = (torch.cat(column)[:number].to(device) for column in columns)
    return found, targets
