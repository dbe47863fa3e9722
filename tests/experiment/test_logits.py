"""Logits are those of the network's images, calibration images first, and survive a file."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset

from adaptive.costs import StageCosts
from adaptive.flops import count
from adaptive.reading import Reading
from experiment import checkpoint
from experiment.logits import Logits, collect, load, logits_of, save
from experiment.recipe import read_command
from experiment.subject import EVALUATION, open_evaluation
from models import create_model
from utils import UserError

OPTIONS = {"nBlocks": 2, "nChannels": 4, "growthRate": 4}
DIGITS = {"data_set": "DIGITS", "seed": 0, "mean": [0.5] * 3, "std": [0.25] * 3, "input_size": 32}
COSTS = StageCosts((3, 2), (1, 1), ((), (0,)), (False, True))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """An untrained network that knows its three held-out digits, and twelve of the test images."""
    file = tmp_path_factory.mktemp("run") / "it.pth"
    torch.manual_seed(0)
    weights = create_model("msdnet", 10, **OPTIONS).state_dict()
    arch = {"name": "msdnet", "options": OPTIONS, "num_classes": 10}
    args = {**DIGITS, "num_calib": 3}
    checkpoint.save(file, {"model": weights, "arch": arch, "args": args, "calib_indices": [5, 6, 7]})
    words = ["--checkpoint", str(file), "--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
    opened = open_evaluation(read_command(EVALUATION, words))
    splits = replace(opened.splits, test=Subset(opened.splits.test, range(12)))
    return replace(opened, splits=splits)


def of_images(subject, images):
    with torch.inference_mode():
        return torch.stack(subject.network.eval()(torch.stack([image for image, _ in images])))


def test_held_out_images_come_first(subject):
    found = collect(subject)
    assert found.num_calib == 3 and found.logits.shape == (2, 15, 10) and found.logits.dtype == torch.float32
    calib, test = found.split()
    for part, images in ((calib, subject.splits.calib), (test, subject.splits.test)):
        assert part.logits.allclose(of_images(subject, images), atol=1e-5)
        assert part.targets.tolist() == [label for _, label in images]
    assert found.costs == count(subject.network, subject.shape).stages and found.confidence == "max_prob"


@pytest.mark.parametrize("change", ["half_test", "unknown", "none"])
def test_without_images_known_to_be_held_out_half_of_the_test_images_are(subject, change):
    exits = replace(subject.recipe.exits, confidence="margin", calib="half_test")
    if change == "half_test":
        other = replace(subject, recipe=replace(subject.recipe, exits=exits))
    elif change == "unknown":  # they may have been trained on
        other = replace(subject, held_out=None)
    else:
        other = replace(subject, splits=replace(subject.splits, calib=Subset(subject.splits.calib, [])))
    found = collect(other)
    assert found.num_calib == 6 and found.confidence == ("margin" if change == "half_test" else "max_prob")
    rows = of_images(subject, subject.splits.test)
    near = torch.cdist(found.logits[0], rows[0]).argmin(1)
    assert sorted(near.tolist()) == list(range(12)) != near.tolist()
    assert found.logits.allclose(rows[:, near], atol=1e-5)
    assert found.targets.tolist() == [subject.splits.test[i][1] for i in near.tolist()]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return Logits(torch.randn(2, 7, 4, generator=generator), torch.arange(7) % 4, 3, COSTS, "margin")


def test_tables_are_read_as_asked(logits):
    (calib, test), tables = logits.split(), logits.tables()
    assert tables.confidence.equal(logits.tables(Reading("margin")).confidence)
    assert not tables.confidence.equal(logits.tables(Reading()).confidence)
    parts = [part.tables().confidence for part in (calib, test)]
    assert tables.confidence.equal(torch.cat(parts, 1)) and (len(calib.targets), calib.num_calib) == (3, 3)
    assert (len(test.targets), test.num_calib) == (4, 0)


def test_a_file_is_read_instead_of_opening_an_evaluation(logits, tmp_path):
    save(tmp_path / "it.pt", logits)
    found = logits_of(str(tmp_path / "it.pt"), [])
    assert found.logits.equal(logits.logits) and found.targets.equal(logits.targets)
    assert (found.num_calib, found.costs, found.confidence) == (3, COSTS, "margin")
    with pytest.raises(UserError, match="--no_such_flag"):
        logits_of(str(tmp_path / "it.pt"), ["--no_such_flag", "1"])
    with pytest.raises(UserError, match="--checkpoint FILE"):
        logits_of(str(tmp_path / "other.pt"), [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": torch.zeros(6)}, "6 targets and 3 calibration images for logits of 7 images"),
        ({"num_calib": 8}, "7 targets and 8 calibration images"),
        ({"num_calib": "some"}, "not supported"),
        ({"logits": torch.zeros(7, 4)}, "not enough values"),
        ({"logits": [1]}, "no attribute"),
        ({"logits": torch.zeros(3, 7, 4)}, "costs of 2 stages for logits of 3 exits"),
        ({"confidence": "sureness"}, "sureness"),
        ({"costs": {"trunks": (1, 2)}}, "missing"),
        ({"costs": [1, 2]}, "mapping"),
        ({"more": 1}, "more"),
    ],
)
def test_another_file_is_refused_in_one_line(logits, tmp_path, change, said):
    path = tmp_path / "it.pt"
    save(path, logits)
    checkpoint.save(path, {**checkpoint.load(path), **change})
    with pytest.raises(UserError, match=said) as refused:
        load(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_damaged_file_is_refused(logits, tmp_path):
    path = tmp_path / "it.pt"
    save(path, logits)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated"):
        load(path)
