"""What an evaluation takes from a file and from the command line."""

import shlex

import pytest
import torch

from experiment.recipe import read_command
from experiment.subject import EVALUATION, open_evaluation

RUN = shlex.split("--num_workers 0 --device cpu")


def subject_of(path, *words):
    return open_evaluation(read_command(EVALUATION, ["--checkpoint", str(path), *RUN, *words]))


@pytest.fixture
def content(trained):
    """What the checkpoint of a trained MSDNet holds."""
    return torch.load(trained / "checkpoint-last.pth", weights_only=True)


def test_images_are_resized_as_a_checkpoint_says(content, images, tmp_path):
    assert content["args"]["interpolation"] == "bicubic"
    path = tmp_path / "x.pth"
    torch.save(content | {"args": content["args"] | {"interpolation": "bilinear"}}, path)
    data = ("--data_path", str(images))
    subject = subject_of(path, *data)
    assert subject.opened.view.interpolation == subject.splits.view.interpolation == "bilinear"
    assert subject.checkpoint()["args"]["interpolation"] == "bilinear"
    assert subject_of(path, *data, "--interpolation", "bicubic").opened.view.interpolation == "bicubic"
    del content["args"]["interpolation"]
    torch.save(content, path)
    assert subject_of(path, *data).opened.view.interpolation == "bicubic"


def test_images_of_a_published_msdnet_are_resized_as_there(content, tmp_path, on):
    path = tmp_path / "published.pth"
    torch.save({"state_dict": content["model"]}, path)
    assert subject_of(path, *on()).splits.view.interpolation == "bilinear"
    assert subject_of(path, *on("--interpolation", "bicubic")).splits.view.interpolation == "bicubic"
