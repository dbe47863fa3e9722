"""The recipes in scripts/ start what the papers trained: every example in their headers is parsed."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from experiment.checks import check
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.resume import with_global_batch
from experiment.subject import EVALUATION
from loading.split import default_num_calib
from models import create_model

ROOT = Path(__file__).resolve().parents[2]


def recipe_uses():
    """(script, command line) of every example in the headers of the recipes."""
    uses = []
    for path in sorted([*ROOT.glob("scripts/train_*.sh"), *ROOT.glob("scripts/eval_*.sh")]):
        lines = re.findall(r"^#.*\b(bash scripts/(?:train|eval)_\w+\.sh .*)$", path.read_text(), re.MULTILINE)
        assert any(path.name in line for line in lines), f"{path.name} shows no use of itself"
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
    if words[0].endswith("scripts/launch.py"):
        del words[0]
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


def trained_by(script, tmp_path, **environment):
    """The recipe that a script of scripts/ trains, given with its arguments."""
    _, _, words = started_by(f"bash scripts/{script} out", tmp_path, **environment)
    given = read_command(list(GROUPS.values()), words)
    return Recipe.of(given.values, options=given.options)


@pytest.mark.parametrize(
    ("script", "num_calib", "drop_last", "interpolation"),
    [
        ("train_l2w_cifar.sh CIFAR10 msdnet_cifar_lin5", 0, False, "bicubic"),
        ("train_l2w_imagenet.sh msdnet_imagenet_step4", 0, False, "bilinear"),
        ("train_msdnet_cifar.sh CIFAR10 msdnet_cifar_lin5", None, False, "bicubic"),
        ("train_msdnet_cifar.sh CIFAR10 msdnet_cifar_even7", 0, False, "bicubic"),
        ("train_msdnet_cifar.sh CIFAR100 ranet_cifar", 0, False, "bicubic"),
        ("train_msdnet_imagenet.sh msdnet_imagenet_step4", None, False, "bilinear"),
        ("train_msdnet_imagenet.sh ranet_imagenet", None, False, "bilinear"),
        ("train_dyn_perceiver_regnet_imagenet.sh", 0, True, "bicubic"),
        ("train_dyn_perceiver_resnet_imagenet.sh", 0, True, "bicubic"),
        ("train_dyn_perceiver_mobilenet_imagenet.sh", 0, True, "bicubic"),
    ],
)
def test_recipes_train_on_the_images_of_the_published_ones(
    script, num_calib, drop_last, interpolation, tmp_path
):
    """What is held out is said in numbers; where nothing is, how to evaluate."""
    recipe = trained_by(script, tmp_path)
    name = recipe.data.data_set
    assert (recipe.data.num_calib, recipe.data.drop_last) == (num_calib, drop_last)
    assert recipe.view.interpolation == interpolation
    if name == "IMNET":
        assert recipe.transform.train_interpolation == interpolation
    header = (ROOT / "scripts" / script.split()[0]).read_text().partition("set -euo")[0]
    if num_calib == 0:
        assert re.search(r"bash scripts/eval_\w+\.sh \S+ .*(--procedure published|--calib half_test)", header)
    else:
        total = 1_281_167 if name == "IMNET" else 50_000
        assert f" {default_num_calib(name, total):,} of the {total:,} " in header


@pytest.mark.parametrize(
    ("model", "gpus", "epochs", "batch", "decays"),
    [
        ("msdnet_imagenet_step4", 8, 90, 32, (30, 60)),
        ("ranet_imagenet_script", 8, 300, 8, tuple(range(30, 300, 30))),
        ("ranet_imagenet", 2, 300, 32, tuple(range(30, 300, 30))),
    ],
)
def test_ranet_trains_on_imagenet_by_its_own_scripts_defaults(model, gpus, epochs, batch, decays, tmp_path):
    recipe = trained_by(f"train_msdnet_imagenet.sh {model}", tmp_path, GPUS=str(gpus))
    assert (recipe.optimization.epochs, recipe.runtime.batch_size) == (epochs, batch)
    assert recipe.optimization.decay_epochs == decays and recipe.optimization.decay_rate == 0.1


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(("name", "millions"), [("regnet", 21.798), ("resnet", 20.283), ("mobilenet", 9.299)])
def test_dyn_perceiver_recipes_train_the_published_networks_on_1024_images_a_step(
    name, millions, gpus, tmp_path
):
    command = f"bash scripts/train_dyn_perceiver_{name}_imagenet.sh out"
    launcher, _, words = started_by(command, tmp_path, GPUS=str(gpus))
    given, options = read_command(list(GROUPS.values()), words)
    assert launcher == [f"--nproc_per_node={gpus}"]
    recipe = with_global_batch(Recipe.of(given), gpus, None)
    assert gpus * recipe.runtime.batch_size * recipe.optimization.update_freq == 1024
    with torch.device("meta"):
        network = create_model(given["model"], **options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == millions


def ending_of(command, folder=ROOT, **environment):
    """The exit code of a command and its lines on stderr; no packages are active."""
    end = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )
    return end.returncode, end.stderr.splitlines()


def recipes():
    """All of them, by name."""
    paths = [*ROOT.glob("scripts/train_*.sh"), *ROOT.glob("scripts/eval_*.sh")]
    return [pytest.param(path.name, id=path.stem) for path in sorted(paths)]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_without_its_arguments_packages_or_data_says_so_in_one_line(name, tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py"))
    (tmp_path / "scripts" / name).chmod(0o755)
    code, (line,) = ending_of(f"bash scripts/{name} a b c d", tmp_path, DATA="x")
    assert (
        code == 2 and line == "error: no packages here: bash scripts/install.sh makes .venv with all it needs"
    )
    torchrun = tmp_path / ".venv" / "bin" / "torchrun"
    torchrun.parent.mkdir(parents=True)
    torchrun.touch(0o755)
    code, (line,) = ending_of(f"bash scripts/{name}", tmp_path)
    assert code == 2 and re.match(rf"error: {name} takes \d arguments: ", line)
    if name.startswith("train_"):
        code, (line,) = ending_of(f"bash scripts/{name} a b c d", tmp_path)
        assert code == 2 and line.startswith("error: DATA names the folder of the data set: ")


def test_numbers_of_gpus_that_do_not_fit_are_refused(tmp_path):
    for name in ("torchrun", "python"):
        (tmp_path / name).touch(0o755)
    words = {"GPUS": "3", "DATA": "x", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    code, (line,) = ending_of("bash scripts/train_msdnet_imagenet.sh a b", **words)
    assert code == 2 and line.startswith("error: GPUS=3")
