"""Commands and checkpoint files of Dyn-Perceiver's script, as they were published."""

import argparse
import json
import os
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import eval_dynamic
import main_earlyExit
from experiment.checks import check
from experiment.options import options_of, plain
from experiment.recipe import GROUPS, Recipe, Unsupported, read_command
from models import create_model

pytestmark = pytest.mark.usefixtures("costs_once", "no_pictures")
RUN = shlex.split("--num_workers 0 --device cpu")
DYNAMIC = shlex.split("--mode dynamic --quota_sweep dyn_perceiver --quota_scales 0.85 1 0.5")

# Every flag of that script with its default or, where that is None or cannot run there, a value that can.
FLAGS = """
--batch_size 64 --update_freq 1 --classifier_type cnn --dropout 0 --num_latent_channels 16 --num_SA_heads 1 2 4 8
--spatial_reduction true --with_x2z True --with_dwc True --with_kd False --layer_scale_init_value 1e-6
--model_ema_decay 0.9999 --model_ema_eval False --opt_eps 1e-8 --clip_grad 1.0 --weight_decay 0.05 --lr 4e-3
--min_lr 1e-6 --loss_cnn_factor 0.25 --loss_merge_factor 0.5 --aa rand-m9-mstd0.5-inc1 --train_interpolation bicubic
--reprob 0.25 --remode pixel --recount 1 --mixup 0.8 --cutmix 1.0 --mixup_prob 1.0 --mixup_switch_prob 0.5
--model_key model|module|state_dict_ema --data_path /cluster/ImageNet --nb_classes 1000 --data_set IMNET --log_dir logs
--seed 0 --auto_resume True --save_ckpt_freq 1 --save_ckpt_num 3 --eval False --disable_eval False --pin_mem True
--local_rank -1 --dist_url env:// --enable_wandb False --project convnext --wandb_ckpt False --epochs 300
--model mobilenetV3_0x5_perceiver_t128 --drop_path 0 --input_size 32 --SA_widening_factor 1 --depth_factor 1 1 1 1
--with_last_CA False --with_z2x True --with_isc True --T_kd 4.0 --alpha_kd 0.5 --model_ema False
--model_ema_force_cpu False --opt adamw --opt_betas 0.9 0.999 --momentum 0.9 --weight_decay_end 0.05 --layer_decay 1.0
--warmup_epochs 20 --warmup_steps -1 --loss_att_factor 0.25 --color_jitter 0.4 --smoothing 0.1 --crop_pct 0.875
--resplit False --cutmix_minmax 0.2 0.8 --mixup_mode batch --finetune= --head_init_scale 1.0 --model_prefix=
--eval_data_path /cluster/ImageNet/val --imagenet_default_mean_and_std True --output_dir= --device cuda --resume=
--save_ckpt True --start_epoch 0 --dist_eval True --num_workers 10 --world_size 1 --dist_on_itp False --use_amp False
--cka False --visualize False
"""
RECIPE = """
--SA_widening_factor 4 --spatial_reduction true --with_last_CA true --with_x2z true --with_dwc true --with_z2x true
--with_isc true --with_kd true --T_kd 1 --alpha_kd 0.5 --loss_cnn_factor 1.0 --loss_att_factor 0.5
--loss_merge_factor 1.0 --model_ema true --model_ema_eval true --batch_size 128 --warmup_epochs 20 --weight_decay 0.05
"""


def parse(*words):
    return read_command(list(GROUPS.values()), [*shlex.split(FLAGS), *words])


def write_images(root, classes, **counts):
    """Folders `train` and `val` with so many images of 40 x 32 pixels in each class: links to one noise per
    class."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        pixels = rng.integers(0, 120, (32, 40, 3)) + 120 * i // len(classes)
        for part, count in counts.items():
            (root / part / name).mkdir(parents=True)
            first = root / part / name / "0.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(first)
            for k in range(1, count):
                os.link(first, first.with_name(f"{k}.jpg"))
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """21 + 12 images in three classes."""
    return write_images(tmp_path_factory.mktemp("images"), ("ant", "bee", "cat"), train=7, val=4)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """One image for training and one for the test in each of a thousand classes."""
    names = [f"n{i:04d}" for i in range(1000)]
    return write_images(tmp_path_factory.mktemp("thousand"), names, train=1, val=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file as that script wrote it after epoch 3 (counted from 0)."""
    torch.manual_seed(0)
    given, options = parse()
    flags = {**given, **options, "drop_path": 0.1, "num_SA_heads": None}
    network = create_model(given["model"], 1000, **options)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    named = list(network.named_parameters())
    plain = [p.ndim > 1 and not name.endswith(".bias") for name, p in named]
    groups = [
        {"params": [p for (_, p), d in zip(named, plain, strict=True) if d == decays], "weight_decay": rate}
        for decays, rate in ((True, 0.05), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([group | {"lr_scale": 1.0} for group in groups], lr=1e-3)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = tmp_path_factory.mktemp("published") / "checkpoint-3.pth"
    content = {
        "model": weights,
        "model_ema": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "epoch": 3,
        "args": argparse.Namespace(**flags, rank=0, gpu=0, distributed=True, dist_backend="nccl"),
    }
    torch.save(content, path)
    return path


def changed(checkpoint, path, **entries):
    """A copy with other entries; those that are None are left out."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, weights_only=True) | entries
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def read_json(path):
    return json.loads(path.read_text())


def evaluate(checkpoint, out, *words):
    eval_dynamic.main(["--checkpoint", str(checkpoint), "--output_dir", str(out), *RUN, *map(str, words)])


# The command line


def test_every_published_flag_is_known():
    given, options = parse()
    words = re.findall(r"--(\w+)", FLAGS)
    assert len(words) == len(set(words)) == 90 and {*given, *options} == set(words)
    recipe = Recipe.of(given)
    check(recipe)
    assert recipe.data.data_set == "IMNET" and recipe.mixing.cutmix_minmax == (0.2, 0.8)
    with torch.device("meta"):
        create_model(recipe.network.model, 1000, **options)


@pytest.mark.parametrize("name", plain(Unsupported()))
def test_a_published_flag_that_does_nothing_is_refused_with_a_reason(name):
    accepted = getattr(Unsupported(), name)
    reason = next(option.about for option in options_of(Unsupported) if option.name == name)
    other = {bool: str(not accepted), float: "0.5", str: "latent"}[type(accepted)]
    given, _ = parse(f"--{name}", other)
    with pytest.raises(ValueError, match=rf"^--{name} \S+ is not supported: {re.escape(reason)}$"):
        check(Recipe.of(given))


# The recipes: trained, gone on with, evaluated


@pytest.mark.parametrize(
    "flags",
    [
        "--model reg800m_perceiver_t128 --depth_factor 1 1 1 2 --lr 1e-3 --epochs 300",
        "--model resnet50_0375_perceiver_t128 --depth_factor 1 1 1 1 --lr 6e-4 --epochs 300",
    ],
)
def test_published_recipes_train(images, tmp_path, in_processes, read_log, flags):
    """Those of the other backbones in two processes too, without what the next test looks at."""
    words = f"{flags} {RECIPE} --data_path {images} --output_dir {tmp_path} --batch_size 4 --input_size 32"
    words += " --epochs 1 --save_ckpt_num 0 --disable_eval true"
    in_processes(2, main_earlyExit.main, [*shlex.split(words), *RUN])
    (line,) = read_log(tmp_path)
    assert line["epoch"] == 1 and all(np.isfinite(value) for value in line.values())
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert content["arch"]["options"]["input_size"] == 32 and content["step"] == 19 // (2 * 4)
    assert {float(state["step"]) for state in content["optimizer"]["state"].values()} == {2.0}


def test_a_published_recipe_in_two_processes(images, tmp_path, capfd, in_processes, read_log):
    out = tmp_path / "out"
    flags = "--model mobilenetV3_0x75_perceiver_t128 --depth_factor 1 1 1 3 --lr 1e-3 --epochs 600"
    words = shlex.split(
        f"{flags} {RECIPE} --data_path {images} --output_dir {out} --batch_size 4 --input_size 32"
    )
    for more in ("--epochs 1 --disable_eval true", "--epochs 2"):
        in_processes(2, main_earlyExit.main, [*words, *RUN, "--save_ckpt_num", "0", *more.split()])
    printed = capfd.readouterr().out
    assert printed.count(f"going on from {out / 'checkpoint-last.pth'}") == printed.count("epoch 2/2") == 1
    lines, steps = read_log(out), 19 // (2 * 4)  # 2 images are held out
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert {
        f"{part}/acc1/exit{k}" for part in ("calib", "calib_ema", "test", "test_ema") for k in range(4)
    } <= {*lines[1]}
    content = torch.load(out / "checkpoint-last.pth", weights_only=True)
    assert content["step"] == 2 * steps and content["arch"]["options"]["input_size"] == 32
    assert {float(state["step"]) for state in content["optimizer"]["state"].values()} == {2.0 * steps}

    ours = ["--procedure", "ours", "--data_path", str(images)]
    main_earlyExit.main(["--eval", "true", "--output_dir", str(out), *ours, *DYNAMIC, *RUN])
    exits, rows = read_json(out / "anytime.json"), read_json(out / "dynamic.json")
    # In shards of two processes or in one, the average gives every test image the same answer.
    assert [row["acc1"] for row in exits] == pytest.approx(
        [lines[1][f"test_ema/acc1/exit{k}"] for k in range(4)]
    )
    assert len(rows) == 33 and "2 images held out of the training set" in (out / "report.html").read_text()
    capfd.readouterr()
    main_earlyExit.main([*words, *RUN, "--eval", "true", "--mode", "dynamic"])  # the command that trained it
    exits, rows = read_json(out / "anytime.json"), read_json(out / "dynamic.json")
    assert [row["acc1"] for row in exits] == pytest.approx([lines[1][f"test/acc1/exit{k}"] for k in range(4)])
    assert len(rows) == 33 and all(sum(row["shares"]) == pytest.approx(1) for row in rows)
    text = [line.split("\t") for line in (out / "dynamic.txt").read_text().splitlines()]
    assert [float(cost) for _, cost in text] == pytest.approx([row["macs"] / 1e9 for row in rows], abs=1e-9)
    assert read_json(out / "record.json")["provenance"]["procedure"] == "published"
    printed = capfd.readouterr().out
    assert "19 training images with training augmentation, the published procedure" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("as published for Dyn-Perceiver: ")]
    assert line.endswith(
        "33 quotas, thresholds from 101 augmented training batches (--weights model --policies quotas --quota_sweep dyn_perceiver "
        "--quota_scales 0.85 1.0 0.5 --calib train_augmented, dynamic.txt in GFLOPs); --procedure ours: "
        "--weights auto --policies search --quota_sweep msdnet --calib held_out, dynamic.txt in MACs"
    )


# Files


def test_a_published_file_is_evaluated_without_naming_its_network(checkpoint, thousand, tmp_path, capsys):
    exits = {}
    for weights, name in (("model", "weights"), ("ema", "moving average of the weights")):
        words = ["--data_path", thousand, "--weights", weights, "--mode", "anytime"]
        evaluate(checkpoint, tmp_path, *words)
        assert (
            f"mobilenetV3_0x5_perceiver_t128: {name} in {checkpoint}, 1000 test images"
            in capsys.readouterr().out
        )
        exits[weights] = read_json(tmp_path / "anytime.json")
    losses = [[row["loss"] for row in rows] for rows in exits.values()]
    assert losses[0] != losses[1]

    flags = [*shlex.split("--model mobilenetV3_0x5_perceiver_t128 --depth_factor 1 1 1 1 --drop_path 0")]
    words = ["--data_path", thousand, "--weights", "ema", "--mode", "anytime", "--data_set", "IMNET"]
    evaluate(checkpoint, tmp_path, *words, *flags)
    assert read_json(tmp_path / "anytime.json") == exits["ema"]


@pytest.mark.parametrize("words", ["", "--num_calib 0"])
def test_the_published_procedure_samples_all_training_images(checkpoint, thousand, tmp_path, capsys, words):
    data = ["--data_path", thousand, "--calib", "train_augmented", "--batch_size", 6, *words.split()]
    if words:  # which the training script does of itself
        data = ["--data_path", thousand, "--batch_size", 6, *words.split(), "--mode", "dynamic", *RUN]
        into = ["--output_dir", tmp_path, "--resume", checkpoint]
        main_earlyExit.main(["--eval", "true", *map(str, [*data, *into])])
    else:
        evaluate(checkpoint, tmp_path, *data, *DYNAMIC)
    origin = "606 training images with training augmentation, the published procedure"
    printed = capsys.readouterr().out
    assert f"thresholds are chosen on {origin}\n" in printed
    assert bool(words) == ("\nas published for Dyn-Perceiver: 33 quotas" in printed)
    assert origin in (tmp_path / "report.html").read_text()
    assert len(read_json(tmp_path / "dynamic.json")) == 33


def going_on(checkpoint, folder, out, epochs):
    """The command that goes on from a file; two optimizer steps an epoch."""
    words = f"{FLAGS} --data_path {folder} --output_dir {out} --resume {checkpoint} --epochs {epochs} --clip_grad 0"
    words += " --model_ema true --batch_size 400 --eval_data_path= --log_dir= --device cpu --num_workers 0"
    return [*shlex.split(words), "--disable_eval", "true"]


def test_a_published_run_goes_on(checkpoint, thousand, tmp_path, capsys, read_log):
    main_earlyExit.main(going_on(checkpoint, thousand, tmp_path, 5))
    assert f"going on from {checkpoint}" in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(tmp_path)] == [5]
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert (content["epoch"], content["step"]) == (4, 5 * 2)
    assert {float(state["step"]) for state in content["optimizer"]["state"].values()} == {1.0 + 2}
    # Nobody knows what images the published network has not seen.
    assert content["calib_indices"] is None
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = torch.load(checkpoint, weights_only=True)
    average = (
        0.9999**2 * before["model_ema"]["latent"]
    )  # two steps from the stored average, not from the weights
    torch.testing.assert_close(content["model_ema"]["latent"], average, rtol=0, atol=1e-4)
    assert not torch.allclose(content["model_ema"]["latent"], before["model"]["latent"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("epoch", ["best", "best-ema"])
def test_a_best_file_does_not_go_on(checkpoint, thousand, tmp_path, epoch):
    path = changed(checkpoint, tmp_path / "best.pth", epoch=epoch)
    with pytest.raises(
        ValueError, match=f"best.pth can be evaluated or fine-tuned .* not resumed: its epoch is '{epoch}'"
    ):
        main_earlyExit.main(going_on(path, thousand, tmp_path, 5))


def test_what_does_not_fit_a_published_file_is_said(checkpoint, thousand, images, tmp_path):
    bare = changed(checkpoint, tmp_path / "bare.pth", model_ema=None)
    data, out = ("--data_path", thousand), tmp_path / "out"
    complaints = {
        (bare, *data, "--weights", "ema"): r"bare.pth has no EMA weights",
        (bare, "--data_path", images): r"bare.pth has 1000 classes, the data set 3",
        (
            bare,
            *data,
            "--model",
            "msdnet",
        ): r"bare.pth holds another network than --model and its options say",
        (
            bare,
        ): r"^name the images to evaluate on; \S*bare.pth was trained with --data_set IMNET --data_path PATH$",
    }
    for (path, *words), complaint in complaints.items():
        with pytest.raises(ValueError, match=complaint):
            evaluate(path, out, *words)
    other = changed(checkpoint, tmp_path / "other.pth", model_ema={"latent": torch.zeros(3)})
    with pytest.raises(ValueError, match="model_ema of checkpoint .*other.pth does not fit the model: "):
        main_earlyExit.main(going_on(other, thousand, out, 5))
    words = [*going_on(checkpoint, thousand, out, 5), "--depth_factor", "1", "1", "1", "2"]
    with pytest.raises(
        ValueError, match=r"another architecture: depth_factor is \[1, 1, 1, 1\], wanted \[1, 1, 1, 2\]"
    ):
        main_earlyExit.main(words)


def test_a_published_network_is_fine_tuned_to_other_classes(checkpoint, images, tmp_path, capsys, read_log):
    words = f"{FLAGS} --data_path {images} --output_dir {tmp_path} --finetune {checkpoint} --epochs 1 --batch_size 8"
    words += " --model_key model_ema --eval_data_path= --log_dir= --device cpu --num_workers 0 --data_set image_folder"
    main_earlyExit.main([*shlex.split(words), "--nb_classes", "3"])
    renewed = "early_classifier3, isc3, classifier_att, isc4, classifier_cnn, classifier_merge"
    assert re.search(
        rf"fine-tuning \S+: \d+ entries kept; initialised anew: {renewed}\n", capsys.readouterr().out
    )
    assert read_log(tmp_path)[0]["epoch"] == 1
