"""Data in COCO's format, COCO's measures, and whole runs of the detection script."""

import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from training.checkpoint import LAST, load
from training.detection import CocoImages, mask_of, precision

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FLAGS = "--train_split train --val_split val --batch_size 2 --min_size 64 --max_size 64 --smallest_anchor 8 --proposals 8"
FLAGS += (
    " --sampled 8 --num_workers 0 --lr 0.01 --warmup_steps 2 --decay_epochs 1 --model mask_rcnn_rexnet_090"
)


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of drawn shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    for split, seed in (("train", 0), ("val", 1)):
        script("bench_detection").draw_shapes(folder, split, 6, seed)
    return folder


def run(shapes, out, *words):
    script("main_detection").main(
        [*shlex.split(FLAGS), "--data_path", str(shapes), "--output_dir", str(out), *words]
    )


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
        seen.add(torch.equal(other, image))
        if not torch.equal(other, image):
            assert torch.equal(other, image.flip(2)) and torch.equal(
                mirrored["masks"], target["masks"].flip(2)
            )
            assert torch.equal(mirrored["boxes"][:, 0], 128 - target["boxes"][:, 2])
    assert seen == {True, False}


def test_masks_come_from_polygons_and_run_lengths():
    square = torch.zeros(6, 5, dtype=torch.uint8)
    square[1:4, 1:3] = 1
    assert torch.equal(mask_of([[1, 1, 2, 1, 2, 3, 1, 3]], 5, 6), square)
    pytest.importorskip("pycocotools")
    runs = mask_of({"size": [6, 5], "counts": [7, 3, 3, 3, 14]}, 5, 6)  # down the columns, zeros first
    assert torch.equal(runs, square)


def test_what_is_drawn_is_found_perfectly_and_nothing_scores_zero(shapes):
    pytest.importorskip("pycocotools")
    data = CocoImages(shapes, "val", masks=True)
    perfect = {}
    for _, target in (data[i] for i in range(len(data))):
        scores = torch.ones(len(target["labels"]))
        found = {"boxes": target["boxes"], "labels": target["labels"], "scores": scores}
        perfect[int(target["image_id"])] = found | {"masks": target["masks"][:, None].float()}
    figures = precision(data, perfect)
    assert figures["AP"] == pytest.approx(1) and figures["mask_AP50"] == pytest.approx(1)
    assert set(precision(data, {}).values()) == {0.0}


def test_a_resumed_run_equals_an_unbroken_one(shapes, tmp_path, monkeypatch, capsys):
    run(shapes, tmp_path / "whole", "--epochs", "2")
    run(shapes, tmp_path / "parts", "--epochs", "1")
    run(shapes, tmp_path / "parts", "--epochs", "2")
    whole, parts = (load(tmp_path / name / LAST) for name in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 1 and parts["step"] == 6
    assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())
    log = [json.loads(line) for line in (tmp_path / "parts/log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1] and np.isfinite(log[1]["train/loss_mask"])
    assert "epoch 2/2: loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds mask_rcnn_rexnet_090, not --model faster_rcnn_rexnet_090"):
        run(shapes, tmp_path / "parts", "--model", "faster_rcnn_rexnet_090")
    with pytest.raises(ValueError, match="was trained with --min_size 64, not 65"):
        run(shapes, tmp_path / "parts", "--min_size", "65", "--eval", "true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model mask_rcnn", "unknown detector 'mask_rcnn'; did you mean"),
        ("--val_split test", "cannot read .*instances_test.json: No such file"),
        ("--data_path ''", "name a folder in COCO's layout"),
        ("--batch_size 9", "6 training images are fewer than --batch_size 9"),
        ("--batch_size 1", "ReXNet's batch norms need 2 images or more, or --freeze_norm true"),
        ("--eval true --train_split none", "nothing to evaluate"),
        ("--epoch 3", "unknown flag --epoch"),
    ],
)
def test_bad_input_is_one_line(shapes, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(shapes, tmp_path / "out", *shlex.split(words))


@pytest.mark.parametrize(("key", "value"), [("category_id", 99), ("bbox", []), ("segmentation", [])])
def test_a_strange_object_is_named(shapes, tmp_path, key, value):
    content = json.loads((shapes / "annotations/instances_val.json").read_text())
    content["annotations"][1][key] = value
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="instances_val.json: object 2 has no known category, box or segmentation"
    ):
        CocoImages(tmp_path, "val", masks=True)


def test_files_that_are_not_cocos_are_named(tmp_path):
    path = tmp_path / "annotations/instances_train.json"
    path.parent.mkdir()
    for text, message in (
        ("{", "not in COCO's format"),
        ("{}", "KeyError"),
        ('{"images": [], "categories": [], "annotations": []}', "0 images"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            CocoImages(tmp_path, "train")
