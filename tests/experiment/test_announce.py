"""What a run prints when it starts and when it has ended."""

import shlex
from pathlib import Path

import torch

from datasets import Data, open_splits
from experiment import announce
from experiment.announce import farewell, opening
from experiment.log import append_json
from experiment.recipe import Recipe
from models import create_model
from utils import Compute

WORDS = {"model": "boosted/msdnet", "data_set": "CIFAR10", "data_path": "my data"}


def test_a_run_starts_with_its_network_its_images_and_its_place():
    recipe = Recipe.of({"model": "cifar_resnet", "procedure": "ours"})
    network, splits = create_model("cifar_resnet", 10, depth=8), open_splits(Data(num_calib=100))
    size = sum(p.numel() for p in network.parameters())
    lines = opening(recipe, network, splits, Compute(torch.device("cpu"), None, False, 0, 2), "x.pth")
    assert lines == [
        f"cifar_resnet: 1 exits, {size / 1e6:.3f} M parameters",
        "1337 train images, 100 calib images, 360 test images",
        "2 x cpu, procedure ours, going on from x.pth",
    ]


def test_a_run_in_bf16_says_where_fp32_is_faster(monkeypatch):
    recipe = Recipe.of({"model": "cifar_resnet", "procedure": "ours"})
    network, splits = create_model("cifar_resnet", 10, depth=8), open_splits(Data(num_calib=100))
    for fast in (False, True):
        monkeypatch.setattr(announce, "has_bf16", lambda kind, fast=fast: fast)
        slow = "" if fast else ", which has no bf16 instructions: --use_amp false is faster"
        *_, place = opening(recipe, network, splits, Compute(torch.device("cpu"), torch.bfloat16))
        assert place == f"1 x cpu{slow}, procedure ours"


def test_a_finished_run_says_figures_folder_and_the_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my run").mkdir()
    recipe = Recipe.of(WORDS, {"output_dir": "my run"})
    assert farewell(recipe) == ["log and checkpoints are in my run"]
    figures = {"test/acc1/exit0": 0.5, "test/acc1/exit1": 0.75, "test_ema/acc1/exit0": 0.25}
    append_json(tmp_path / "my run" / "log.txt", {"epoch": 1, **figures})
    (tmp_path / "my run" / "checkpoint-best.pth").touch()
    *lines, command = farewell(recipe)
    assert lines[:2] == ["test top-1 by exit: 50.00 75.00 %", "test_ema top-1 by exit: 25.00 %"]
    _, python, script, *words = shlex.split(command)
    assert (tmp_path / script).is_file() and Path(script).name == "eval_dynamic.py" and "python" in python
    assert words == ["--checkpoint", "my run/checkpoint-best.pth", "--data_path", "my data"]
    none_held_out = Recipe.of(WORDS, {"output_dir": "my run", "num_calib": 0})
    assert farewell(none_held_out)[-1] == f"{command} --calib half_test"
