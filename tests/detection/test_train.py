"""Runs on drawn shapes: resumed ones equal unbroken ones, and what does not go together is one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.detectors import detector_of
from detection.train import Job, evaluate, fit
from experiment.checkpoint import LAST, load

pytestmark = pytest.mark.usefixtures("narrow")


def test_a_resumed_run_equals_an_unbroken_one(detection, whole, tmp_path, capsys):
    parted = replace(detection, output_dir=str(tmp_path))
    fit(replace(parted, epochs=1))
    fit(parted)
    assert "epoch 2/2: loss" in capsys.readouterr().out
    unbroken, parts = (load(folder / LAST) for folder in (whole, tmp_path))
    assert unbroken["epoch"] == parts["epoch"] == 1 and parts["step"] == 6
    assert all(torch.equal(value, parts["model"][key]) for key, value in unbroken["model"].items())
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2] and np.isfinite(log[1]["train/loss_mask"])
    with pytest.raises(ValueError, match="holds mask_rcnn_rexnet_090, not --model faster_rcnn_rexnet_090"):
        fit(replace(parted, model="faster_rcnn_rexnet_090"))
    with pytest.raises(ValueError, match="was trained with --min_size 64, not 65"):
        evaluate(replace(parted, min_size=65, eval=True))


def test_the_optimizer_goes_on_where_it_was(detection, whole, tmp_path):
    """Its entries are beside the model's."""
    content = load(whole / LAST)
    assert {"model", "optimizer", "scaler", "step", "epoch", "best"} < content.keys()
    momenta = content["optimizer"]["state"]
    job = Job(replace(detection, output_dir=str(tmp_path)))
    job.resume(job.run(), whole / LAST)
    assert job.update.step == 6 and momenta
    found = job.update.optimizer.state_dict()["state"]
    assert all(torch.equal(found[i]["momentum_buffer"], momenta[i]["momentum_buffer"]) for i in momenta)
    again = detector_of(content, "file.pth").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in job.detector.state_dict().items())


def test_a_file_without_a_detector_is_named():
    with pytest.raises(
        ValueError, match="checkpoint file.pth holds no detector of scripts/main_detection.py"
    ):
        detector_of({"model": {}}, "file.pth")


def test_a_run_is_parts_facts_and_an_epoch_of_figures(detection, whole, tmp_path):
    """What a training loop needs to know of it."""
    log = json.loads((whole / "log.txt").read_text().splitlines()[0])
    names = {"loss", "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    measures = {"AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"}
    assert log.keys() == {"epoch", "seconds", "best", *measures, *(f"train/{name}" for name in names)}
    job = Job(replace(detection, output_dir=str(tmp_path)))
    assert job.run().parts == {"model": job.detector, **job.update.parts}
    content = load(whole / LAST)
    states = {"model", "optimizer", "scaler"}
    assert content.keys() == states | job.facts().keys() | {"epoch", "record", "best", "partial"}
    assert job.facts().keys() == {"model_name", "args", "categories", "step"}
    assert content["args"] == job.facts()["args"] | {"output_dir": str(whole)}
    assert content["args"]["sampled"] == 8 and content["categories"][2] == [3, "triangle"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "mask_rcnn"}, "unknown detector 'mask_rcnn'; did you mean"),
        ({"val_split": "test"}, "cannot read .*instances_test.json: No such file"),
        ({"data_path": ""}, "name a folder in COCO's layout"),
        ({"batch_size": 9}, "6 training images are fewer than --batch_size 9"),
        ({"batch_size": 1}, "ReXNet's batch norms need 2 images or more, or --freeze_norm true"),
    ],
)
def test_bad_input_is_one_line(detection, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fit(replace(detection, output_dir=str(tmp_path / "out"), **change))
