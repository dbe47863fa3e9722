"""Data in COCO's format: boxes, masks, mirrored images, and one line for what is wrong with a file."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detection.data import CocoImages
from models.errors import UserError

POLYGON = [[1, 1, 3, 1, 3, 4, 1, 4]]
RUN_LENGTHS = {"size": [6, 5], "counts": [7, 3, 3, 3, 14]}  # down the columns, zeros first


@pytest.fixture
def changed(shapes, tmp_path):
    """Writes the annotations of the held-out shapes after a change; returns their new folder."""

    def write(change):
        content = json.loads((shapes / "annotations/instances_val.json").read_text())
        change(content)
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
        (tmp_path / "val").symlink_to(shapes / "val")
        return tmp_path

    return write


def test_boxes_are_those_around_the_masks(shapes):
    data = CocoImages(shapes, "train", masks=True)
    assert len(data) == 6 and [name for _, name in data.categories] == ["circle", "square", "triangle"]
    for image, target in (data[i] for i in range(6)):
        assert image.shape == (3, 128, 128) and 0 <= image.min() < image.max() <= 1
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero().T
            around = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])
            assert (around - box).abs().max() < 2


def test_half_of_the_images_are_mirrored_with_their_boxes_and_masks(shapes):
    plain, flipped = (CocoImages(shapes, "train", masks=True, flip=flip) for flip in (False, True))
    (image, target), seen = plain[0], set()
    for seed in range(8):
        torch.manual_seed(seed)
        other, mirrored = flipped[0]
        torch.manual_seed(seed)
        assert torch.equal(other, image) == bool(torch.rand(()) >= 0.5)  # one draw a sample
        seen.add(torch.equal(other, image))
        if not torch.equal(other, image):
            assert torch.equal(other, image.flip(2)) and torch.equal(
                mirrored["masks"], target["masks"].flip(2)
            )
            assert torch.equal(mirrored["boxes"][:, 0], 128 - target["boxes"][:, 2])
    assert seen == {True, False}


def test_samples_are_plain_tensors(shapes):
    image, target = CocoImages(shapes, "train", masks=True)[0]
    assert {type(value) for value in (image, *target.values())} == {Tensor}
    assert {name: value.dtype for name, value in target.items()} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "image_id": torch.int64,
        "masks": torch.uint8,
    }


@pytest.mark.parametrize("segmentation", [POLYGON, RUN_LENGTHS], ids=["polygon", "run_lengths"])
def test_masks_come_from_polygons_and_run_lengths(changed, shapes, segmentation):
    square = torch.zeros(6, 5, dtype=torch.uint8)
    square[1:4, 1:3] = 1

    def change(content):
        content["images"][0] |= {"height": 6, "width": 5, "file_name": "small.png"}
        first = content["annotations"][0]
        first |= {"segmentation": segmentation, "bbox": [1, 1, 2, 3]}
        content["annotations"] = [first]

    Image.new("RGB", (5, 6)).save(shapes / "val/small.png")
    _, target = CocoImages(changed(change), "val", masks=True)[0]
    assert torch.equal(target["masks"], square[None]) and target["boxes"].tolist() == [[1, 1, 3, 4]]


def test_crowds_and_objects_without_extent_are_left_out(changed):
    def change(content):
        objects = [dict(content["annotations"][0], id=i, image_id=2) for i in range(1, 5)]
        objects[0]["iscrowd"] = 1
        objects[1]["bbox"] = [5, 5, 0, 9]
        objects[2]["bbox"] = [5, 5, 7, 9]
        for entry in objects:
            entry["category_id"] = 30
        content["annotations"] = objects
        content["categories"] = [{"id": number, "name": str(number)} for number in (90, 7, 30)]

    data = CocoImages(changed(change), "val", masks=True)
    _, target = data[1]
    assert target["labels"].tolist() == [2, 2] and target["image_id"] == 2
    assert target["boxes"][0].tolist() == [5, 5, 12, 14]
    assert target["masks"].shape == (2, 128, 128)
    _, target = data[0]  # an image may have no objects
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 128, 128)
    assert target["labels"].shape == (0,) and target["image_id"] == 1


@pytest.mark.parametrize(("key", "value"), [("category_id", 99), ("bbox", []), ("segmentation", [])])
def test_a_strange_object_is_named(changed, key, value):
    folder = changed(lambda content: content["annotations"][1].update({key: value}))
    with pytest.raises(
        ValueError, match="instances_val.json: object 2 has no known category, box or segmentation"
    ):
        CocoImages(folder, "val", masks=True)


def test_a_missing_image_is_named(changed):
    folder = changed(lambda content: content["images"][0].update(file_name="none.png"))
    with pytest.raises(ValueError, match="cannot read image .*val/none.png: .*No such file"):
        CocoImages(folder, "val")[0]


def test_pixels_are_read_as_everywhere(changed, tmp_path, monkeypatch):
    folder = changed(lambda content: content["images"][0].update(file_name=str(tmp_path / "deep.png")))
    Image.fromarray(np.full((128, 128), 30_000, np.uint16)).save(tmp_path / "deep.png")
    image, _ = CocoImages(folder, "val")[0]
    assert image.unique().tolist() == pytest.approx([30_000 / 65_535], abs=0.01)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 128 - 1)
    with pytest.raises(UserError, match="cannot read image .*deep.png: 128 x 128 pixels; accepted: at most"):
        CocoImages(folder, "val")[0]


def test_files_that_are_not_cocos_are_named(tmp_path):
    path = tmp_path / "annotations/instances_train.json"
    path.parent.mkdir()
    for text, message in (
        ("{", "not in COCO's format"),
        ("{}", "KeyError"),
        ("[]", "not in COCO's format"),
        ('{"images": [], "categories": [], "annotations": []}', "0 images"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            CocoImages(tmp_path, "train")


def test_the_package_is_asked_for(shapes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match="needs a package: pip install pycocotools"):
        CocoImages(shapes, "train")
