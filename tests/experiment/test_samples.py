"""Which images thresholds are chosen on, and which are reported on."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from adaptive.exit_tables import ExitTables
from experiment.samples import calibrate, check_calibration, halves, reported
from utils import Compute, UserError


def subject_of(calib, seed=0):
    return SimpleNamespace(
        recipe=SimpleNamespace(exits=SimpleNamespace(calib=calib), data=SimpleNamespace(seed=seed)),
        splits=SimpleNamespace(train=[], calib=[]),
        compute=Compute(torch.device("cpu")),
    )


def numbered(count):
    """Tables in which the target of each image is its index."""
    logits = torch.randn(count, 30, generator=torch.Generator().manual_seed(count))
    return ExitTables.of([logits, logits], torch.arange(count))


@pytest.mark.parametrize("count", [10, 11])
def test_half_of_the_test_images_are_reported_on_and_known_by_index(count):
    subject, tables = subject_of("half_test", seed=3), numbered(count)
    test, calib, origin = calibrate(subject, tables)
    assert reported(subject, count).tolist() == test.targets.tolist() != sorted(test.targets.tolist())
    assert sorted([*test.targets.tolist(), *calib.targets.tolist()]) == list(range(count))
    assert len(calib) == count // 2 and origin.startswith(f"{count // 2} random test images")


def test_halves_depend_on_the_seed_alone():
    assert all(map(torch.equal, halves(30, 1), halves(30, 1)))
    assert not torch.equal(halves(30, 1)[0], halves(30, 2)[0])


def test_all_test_images_are_reported_on_otherwise():
    subject, tables = subject_of("none"), numbered(7)
    assert reported(subject, 7).tolist() == calibrate(subject, tables)[0].targets.tolist() == list(range(7))
    assert reported(subject_of("held_out"), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("assures", "held_out", "refused"), [(True, None, True), (True, [1], False), (False, None, False)]
)
def test_a_guarantee_needs_images_that_are_known_to_be_held_out(assures, held_out, refused):
    subject = subject_of("held_out")
    subject.recipe.exits.assures = assures
    subject.splits.calib = [0, 1]
    subject.held_out = held_out
    with (
        pytest.raises(ValueError, match="^--calib held_out: which images .* use --calib half_test$")
        if refused
        else nullcontext()
    ):
        check_calibration(subject)


def test_one_image_has_no_half():
    with pytest.raises(UserError, match="^--calib half_test: of 1 test images no half can be taken$"):
        calibrate(subject_of("half_test"), numbered(1))
