"""The recipes in scripts/ start what the papers trained: every example in their headers is parsed."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from experiment.checks import check
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.subject import EVALUATION
from models import create_model

ROOT = Path(__file__).resolve().parents[2]


def recipe_uses():
    """(script, command line) of every example in the headers of the recipes."""
    uses = []
    for path in sorted([*ROOT.glob("scripts/train_*.sh"), *ROOT.glob("scripts/eval_*.sh")]):
        lines = re.findall(rf"^#.*\b(bash scripts/{path.name} .*)$", path.read_text(), re.MULTILINE)
        assert lines, f"{path.name} shows no use of itself"
        uses += [pytest.param(line, id=f"{path.stem}-{i}") for i, line in enumerate(lines)]
    return uses


def started_by(command, folder, **environment):
    """The words that a recipe hands to python or torchrun, split at the script."""
    for name in ("python", "torchrun"):
        fake = folder / name
        fake.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {shlex.quote(str(folder / 'argv'))}\n")
        fake.chmod(0o755)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "DATA": "some data"}
    subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | environment, check=True)
    words = (folder / "argv").read_text().split("\0")[:-1]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[:script], words[script], words[script + 1 :]


@pytest.mark.parametrize("command", recipe_uses())
def test_recipes_parse(command, tmp_path):
    _, script, words = started_by(command, tmp_path)
    if Path(script).name == "main_earlyExit.py":
        given = read_command(list(GROUPS.values()), words)
        recipe = Recipe.of(given.values, options=given.options)
        check(recipe)
        assert recipe.data.data_path == "some data" and recipe.runtime.output_dir
        create_model(recipe.network.model, 10, **recipe.options)
    else:
        assert Path(script).name == "eval_dynamic.py"
        given = read_command(EVALUATION, words)
        assert given.values.get("checkpoint") or len(given.options["networks"]) > 1


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(("name", "millions"), [("regnet", 21.798), ("resnet", 20.283), ("mobilenet", 9.299)])
def test_dyn_perceiver_recipes_train_the_published_networks_on_1024_images_a_step(
    name, millions, gpus, tmp_path
):
    command = f"bash scripts/train_dyn_perceiver_{name}_imagenet.sh out"
    launcher, _, words = started_by(command, tmp_path, GPUS=str(gpus))
    given, options = read_command(list(GROUPS.values()), words)
    assert launcher == [f"--nproc_per_node={gpus}"]
    assert gpus * given["batch_size"] * given["update_freq"] == 1024
    with torch.device("meta"):
        network = create_model(given["model"], **options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == millions
