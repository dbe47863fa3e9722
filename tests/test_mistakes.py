"""What a user of the training script did wrong is said in one line."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval_dynamic
import main_earlyExit
from datasets import Data, open_splits
from loading.split import Images
from models import create_model

train, evaluate = main_earlyExit.main, eval_dynamic.main
NETWORK = shlex.split("--model msdnet --nBlocks 2 --nChannels 8 --growthRate 4 --grFactor 1-2 --bnFactor 1-2")
PLAIN = shlex.split("--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0")
RUN = shlex.split("--num_workers 0 --device cpu")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--model msdnett", r"unknown model 'msdnett'; did you mean msdnet"),
        ("--nBlock 3", r"unknown flag --nBlock; did you mean --nBlocks"),
        ("--bath-size 3", r"unknown flag --bath_size; did you mean --batch_size"),
        ("--nBlocks 0", r"nBlocks is 0; it must be at least 1"),
        ("--num_workers -1", r"--num_workers: -1 is below the least value accepted, 0"),
        ("--epochs 0", r"--epochs: 0 is below the least value accepted, 1"),
        ("--lr -1", r"--lr: -1 is below the least value accepted, 0"),
        ("--layer_decay 0.9", r"--layer_decay 0.9 is not supported: defined for ConvNeXt only"),
        ("--cka true", r"--cka True is not supported: "),
        (
            "--dist_on_itp true",
            r"--dist_on_itp True is not supported: start processes with torchrun or SLURM",
        ),
        ("--classifier_type latent", r"--classifier_type latent is not supported: .*--exit_weights"),
        ("--batch_size 5", r"--batch_size 5: mixup and cutmix need an even number"),
        ("--batch_size 34", r"32 training images are fewer than one global batch of batch size 34"),
        ("--num_calib 40", r"--num_calib 40: accepted: 0 to 39, fewer than the training images"),
        ("--smoothing 1", r"--smoothing: 1 is above the greatest value accepted, 0.9999"),
        ("--opt_betas 0.9", r"--opt_betas \[0.9\]: give two numbers"),
        ("--schedule multistep", r"--schedule multistep needs --decay_epochs"),
        (
            "--schedule multistep --decay_epochs 225 150",
            r"--decay_epochs \[225, 150\]: give them in ascending order, each once",
        ),
        ("--momentum 1", r"--momentum: 1 is above the greatest value accepted, 0.9999"),
        ("--model_ema_decay 1.5", r"--model_ema_decay: 1.5 is above the greatest value accepted, 1"),
        ("--lr inf", r"--lr: inf is not accepted: give a finite number"),
        ("--exit_weights 0 0", r"exit weights \[0.0, 0.0\]: nothing would be trained; give one above 0"),
        ("--accuracy 94", r"--accuracy: 94 is above the greatest value accepted, 1"),
        (
            "--with_kd true --kd_teacher a.pth",
            r"--with_kd true, and --kd_teacher a.pth: .*; give one of them",
        ),
        ("--enable_wandb true", r"--enable_wandb mirrors TensorBoard: give --log_dir"),
        ("--exit_weights 1 2 3", r"3 exit weights given, the network has 2 exits"),
        ("--loss_cnn_factor 1", r"loss factors are for four exits, the network has 2"),
        ("--nb_classes 3", r"--nb_classes 3, but image_folder has 2 classes"),
        (
            "--device_data true",
            r"--device_data true: --aa rand-m9-mstd0.5-inc1 --color_jitter 0.4 work image by",
        ),
        ("--flip alternating", r"--flip alternating needs --device_data true"),
        ("--mean 0.5", r"--mean \(0.5,\).*give three numbers each"),
        ("--data_set IMAGENET", r"unknown data set 'IMAGENET': not DIGITS"),
        ("--data_path nowhere", r"image folder nowhere: there is no such folder"),
        ("--data_set DIGITS", r"data set DIGITS reads no --data_path"),
        ("--opt adamv", r"unknown optimizer 'adamv'; did you mean .*adam"),
        ("--device gpu", r"--device gpu: accepted: auto, cpu, cuda"),
        ("--finetune nowhere.pth", r"cannot read checkpoint nowhere.pth: No such file or directory"),
        ("--resume nowhere.pth", r"cannot read checkpoint nowhere.pth: No such file or directory"),
        (
            "--eval true",
            r"nothing to evaluate: give --resume FILE, or an --output_dir that holds a checkpoint",
        ),
    ],
)
def test_mistakes_in_training_flags(error_of, words, complaint, on):
    assert re.match(complaint, error_of(train, *on(), *words.split()))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--l2w true --mixup 0.8", r"--l2w true weighs samples of one class each: give --mixup 0 --cutmix 0"),
        ("--l2w true --cutmix_minmax 0.2 0.8", r"--l2w true weighs samples of one class each"),
        (
            "--l2w true --regime disjoint",
            r"--regime disjoint: L2W weighs all exits at once; accepted: joint, equi",
        ),
        (
            "--l2w true --regime mixed",
            r"--regime mixed: L2W weighs all exits at once; accepted: joint, equilibrium",
        ),
        ("--l2w true --target_p_index 40", r"--target_p_index: 40 is above the greatest value accepted, 39"),
        ("--l2w true --target_p_index 0", r"--target_p_index: 0 is below the least value accepted, 1"),
        (
            "--l2w true --batch_size 2",
            r"--batch_size 2: L2W trains on halves of a batch and needs at least 4",
        ),
        ("--l2w true --opt Lookahead_sgd", r"--opt Lookahead_sgd: L2W looks one step of SGD ahead"),
        (
            "--l2w true --constraint_dimension diag",
            r"--constraint_dimension: 'diag' is not one of mat, row, col",
        ),
        (
            "--l2w true --meta_net_input_type logits",
            r"--meta_net_input_type: 'logits' is not one of loss, conf, both",
        ),
        ("--regime joined", r"--regime: 'joined' is not one of joint, equilibrium, disjoint, mixed"),
        ("--first_share 2", r"--first_share: 2 is above the greatest value accepted, 1"),
        ("--kd_teacher nowhere.pth", r"cannot read checkpoint nowhere.pth: No such file or directory"),
    ],
)
def test_mistakes_in_flags_of_objectives(error_of, words, complaint, on):
    assert re.match(complaint, error_of(train, *on(*PLAIN), *words.split()))


def test_a_teacher_of_other_classes_or_images_is_refused(trained, error_of):
    teacher = trained / "checkpoint-last.pth"
    line = error_of(train, *NETWORK, *PLAIN, *RUN, "--data_set", "DIGITS", "--kd_teacher", teacher)
    assert line.startswith(
        f"teacher {teacher} reads images of --mean [0.485, 0.456, 0.406], this run has [0.3057, "
    )
    stats = shlex.split("--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225")
    line = error_of(train, *NETWORK, *PLAIN, *RUN, "--data_set", "DIGITS", "--kd_teacher", teacher, *stats)
    assert line == f"checkpoint {teacher} has 2 classes, the data set 10"


def test_a_folder_of_unnamed_images_is_imagenet(tmp_path, error_of):
    folder = ["--data_path", "nowhere", *RUN]
    assert error_of(train, *NETWORK, *folder).startswith("image folder nowhere/train: ")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "bare.pth")
    assert error_of(evaluate, "--checkpoint", tmp_path / "bare.pth", *folder).startswith(
        "image folder nowhere/train: "
    )


SMALL_ONLY = ["--model", "cifar_densenet", "--depth", "10", "--growthRate", "4"]


def test_images_too_small_for_the_network_are_refused_before_any_is_read(
    on, error_of, images, tmp_path, monkeypatch
):
    line = r"--input_size 3: the network cannot read such images \(.*\); the least side accepted is 4"
    monkeypatch.setattr(Images, "__getitem__", None)
    skip = ["--on_bad_image", "skip", *PLAIN]
    assert re.fullmatch(line, error_of(train, *on("--input_size", 3, *skip, network=SMALL_ONLY)))
    options = {"depth": 10, "growthRate": 4}
    weights = create_model("cifar_densenet", 2, **options).state_dict()
    arch = {"name": "cifar_densenet", "options": options, "num_classes": 2}
    torch.save({"model": weights, "arch": arch}, tmp_path / "a.pth")
    data = ["--data_set", "image_folder", "--data_path", images, "--input_size", 3, *RUN]
    assert re.fullmatch(line, error_of(evaluate, "--checkpoint", tmp_path / "a.pth", *data))


def test_an_output_folder_that_is_a_file_is_refused_first(trained, on, error_of, tmp_path):
    file = tmp_path / "a"
    file.write_text("")
    for folder in (file, file / "b" / "c"):
        line = f"--output_dir {folder}: {file} is a file; give a folder, it may be a new one"
        assert error_of(train, *on("--output_dir", folder, data=tmp_path / "nowhere")) == line
        stored = ["--checkpoint", trained / "checkpoint-last.pth", "--data_path", "nowhere", *RUN]
        assert error_of(evaluate, *stored, "--output_dir", folder) == line


def test_a_network_must_be_named(error_of):
    assert error_of(train, "--lr", 1) == "name a network: --model NAME"
    assert error_of(train, "--nBlocks", 2).endswith("; a network's options need --model NAME")


def test_unusable_image_folders(images, tmp_path, error_of, on):
    shutil.copytree(images, tmp_path / "a")
    (tmp_path / "a" / "train" / "none").mkdir()
    line = error_of(train, *on(data=tmp_path / "a"))
    assert line.startswith(f"image folder {tmp_path / 'a' / 'train'}: ") and "none" in line
    (tmp_path / "a" / "train" / "none").rmdir()
    broken = tmp_path / "a" / "train" / "lit" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    line = error_of(train, *on("--num_calib", 0, "--epochs", 1, data=tmp_path / "a"))
    assert line.startswith(f"cannot read image {broken}: ")


@pytest.fixture
def spoilt(images, tmp_path):
    """The images, of which one for training, one for calibration or one for test is spoilt: `spoilt(part)`."""

    def spoil(part):
        shutil.copytree(images, tmp_path / "a")
        splits = open_splits(Data("image_folder", str(tmp_path / "a"), num_calib=8))
        path = Path(getattr(splits, part).name(0))
        path.write_bytes(path.read_bytes()[:100])
        return path

    return spoil


SKIP = ["--on_bad_image", "skip", "--epochs", 1, "--warmup_epochs", 0]


def test_unreadable_training_images_are_skipped_up_to_a_share(spoilt, tmp_path, error_of, on, capsys):
    bad, out = spoilt("train"), tmp_path / "out"
    arguments = on(*PLAIN, *SKIP, "--output_dir", out, data=tmp_path / "a")
    said = f"1 of 32 training images cannot be read, listed in {out / 'bad_images.txt'}"
    assert error_of(train, *arguments).startswith(
        f"{said}; --max_bad_images 0.001 allows 0; the first: {bad}: "
    )
    train([*arguments, "--max_bad_images", "0.04"])
    assert f"{said}; each is replaced by the next one" in capsys.readouterr().out.splitlines()
    assert (out / "bad_images.txt").read_text().startswith(f"{bad}: ")
    assert (out / "checkpoint-last.pth").is_file()
    assert (
        error_of(train, *on("--max_bad_images", 2))
        == "--max_bad_images: 2 is above the greatest value accepted, 1"
    )


@pytest.mark.parametrize("part", ["calib", "test"])
def test_unreadable_images_for_calibration_and_test_are_never_skipped(spoilt, tmp_path, error_of, on, part):
    bad = spoilt(part)
    arguments = on(*PLAIN, *SKIP, "--max_bad_images", 1, data=tmp_path / "a")
    assert error_of(train, *arguments).startswith(f"cannot read image {bad}: ")


def test_a_decompression_bomb_is_one_line(images, tmp_path, error_of, on, monkeypatch):
    shutil.copytree(images, tmp_path / "a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # PIL warns from here, and refuses twice as many
    line = error_of(train, *on("--epochs", 1, data=tmp_path / "a"))
    assert re.match(
        rf"cannot read image {tmp_path}/a/.*png: Image size \(1024 pixels\) exceeds limit of 600", line
    )


def test_files_left_out_are_said_in_training_and_evaluation(
    images, tmp_path, trained, on, evaluate_into, capsys, costs_once
):
    shutil.copytree(images, tmp_path / "a")
    (tmp_path / "a" / "val" / "lit" / "notes.txt").write_text("")
    said = f"{tmp_path}/a/val: left out 1 not named as images, such as {tmp_path}/a/val/lit/notes.txt"
    words = on(*PLAIN, "--epochs", 1, "--disable_eval", "true", data=tmp_path / "a")
    train(words)
    assert said in capsys.readouterr().out.splitlines()
    moved = ["--data_path", tmp_path / "a", "--mode", "anytime"]
    evaluate_into(tmp_path / "out", trained / "checkpoint-last.pth", *moved)
    assert said in capsys.readouterr().out.splitlines()
