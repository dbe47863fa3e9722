import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_dynamic
import main_earlyExit
from adaptive.flops import exit_costs
from models import create_model, model_options, nearest
from training.flags import parse_flags, with_defaults
from utils import Compute, run_main

ROOT = Path(__file__).resolve().parents[1]
train, evaluate = main_earlyExit.main, eval_dynamic.main
NETWORK = shlex.split("--model msdnet --nBlocks 2 --nChannels 8 --growthRate 4 --grFactor 1-2 --bnFactor 1-2")
PLAIN = shlex.split("--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0")
RUN = shlex.split("--num_workers 1 --device cpu")

# Defaults of Dyn-Perceiver's script, unless said otherwise.
SHARED_DEFAULTS = {
    "data_set": "DIGITS",  # there IMNET
    "data_path": None,  # there a cluster's folder
    "eval_data_path": None,
    "nb_classes": None,  # there 1000; None is "the data set's own", also below
    "input_size": None,  # there 224
    "imagenet_default_mean_and_std": True,
    "crop_pct": None,
    "seed": 0,
    "output_dir": "",
    "device": "auto",  # there cuda
    "batch_size": 64,
    "num_workers": 10,
    "pin_mem": True,
    "use_amp": False,
    # not there
    "mean": None,
    "std": None,
    "num_calib": None,
    "download": False,
    "train_split": "train",
    "val_split": "validation",
    "calib_split": None,
    "amp_dtype": "auto",
    "channels_last": False,
    "flops": False,
    "mode": "all",
    "confidence": "max_prob",
    "calib": "held_out",
    "quota_sweep": "msdnet",
    "quota_scales": (),
    "router_threshold": (),
    "shares": (),
    "popular_classes": (),
    "budget": None,
    "accuracy": None,
    "row": (),
    "runtime_images": 2000,
    "micro_batch": None,
    "fold_bn": True,
    "weights": "auto",
    "model": "",  # there convnext_tiny, which is no model here
}
TRAIN_DEFAULTS = {
    "update_freq": 1,
    "epochs": 300,
    "classifier_type": "cnn",
    "with_kd": False,
    "energy_hinge": (),
    "T_kd": 4.0,
    "alpha_kd": 0.5,
    "layer_scale_init_value": 1e-6,
    "model_ema": False,
    "model_ema_decay": 0.9999,
    "kd_teacher": "",
    "regime": "joint",
    "first_share": 0.5,
    "freeze_backbone": False,
    "l2w": False,
    "target_p_index": 15,
    "epsilon": 0.8,
    "constraint_dimension": "col",
    "meta_net_input_type": "loss",
    "meta_net_hidden_size": 500,
    "meta_net_num_layers": 1,
    "meta_interval": 1,
    "meta_lr": 1e-4,
    "meta_weight_decay": 1e-4,
    "l2w_tables": 0,
    "model_ema_warmup": False,
    "model_ema_force_cpu": False,
    "model_ema_eval": False,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "clip_grad": None,
    "decay_embeddings": False,  # there always
    "momentum": 0.9,
    "weight_decay": 0.05,
    "weight_decay_end": None,
    "lr": 4e-3,
    "layer_decay": 1.0,
    "min_lr": 1e-6,
    "lr_scales": (),
    "warmup_epochs": 20,
    "warmup_steps": -1,
    "loss_cnn_factor": None,  # there 0.25, what it is here too once another one is given
    "loss_att_factor": None,  # there 0.25
    "loss_merge_factor": None,  # there 0.5
    "color_jitter": 0.4,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "scale": (0.08, 1.0),  # fixed there
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "resplit": False,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "finetune": "",
    "head_init_scale": 1.0,
    "model_key": "model|module|state_dict_ema",
    "model_prefix": "",
    "log_dir": None,
    "resume": "",
    "auto_resume": True,
    "save_ckpt": True,
    "save_ckpt_freq": 1,
    "save_ckpt_num": 3,
    "start_epoch": 0,
    "eval": False,
    "dist_eval": True,
    "disable_eval": False,
    "world_size": 1,
    "local_rank": -1,
    "dist_on_itp": False,
    "dist_url": "env://",
    "enable_wandb": False,
    "project": "dynexit",  # there convnext
    "wandb_ckpt": False,
    "cka": False,
    "visualize": False,
    # not there
    "filter_bias_and_bn": True,
    "schedule": "cosine",
    "decay_epochs": (),
    "decay_rate": 0.1,
    "exit_weights": None,
    "print_freq": 50,
    "compile": False,
}


@pytest.fixture(scope="module", autouse=True)
def no_launcher():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "DYNEXIT_TRACEBACK"):
            patch.delenv(name, raising=False)
        yield


def write_images(folder, count):
    """Noise of 32 x 32 pixels, darker for class `dim` than for `lit`; the two overlap a little."""
    rng = np.random.default_rng(count)
    for label, name in enumerate(("dim", "lit")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (32, 32, 3)) + 60 * label + rng.integers(0, 36)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data set of 40 + 20 images in two classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 20)
    write_images(root / "val", 10)
    return root


def on(images, *words):
    """Arguments for training on a folder, 32 images for training and 8 for calibration."""
    data = (
        f"--data_set image_folder --input_size 32 --num_calib 8 --batch_size 4 --data_path {images}".split()
    )
    return [*NETWORK, *data, *RUN, *map(str, words)]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    flags = (
        "--epochs 2 --warmup_epochs 0 --model_ema true --model_ema_decay 0.5 --model_ema_eval true --lr 0.01"
    )
    train(on(images, *flags.split(), *PLAIN, "--output_dir", out))
    return out


def read_log(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def read_json(path):
    return json.loads(path.read_text())


def evaluate_into(out, checkpoint, *words):
    evaluate(["--checkpoint", str(checkpoint), "--output_dir", str(out), *RUN, *map(str, words)])
    return out


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The results of evaluating the run's last checkpoint in every mode."""
    return evaluate_into(
        tmp_path_factory.mktemp("evaluated"), trained / "checkpoint-last.pth", "--row", 3, 35
    )


# Flags


def defaults(groups):
    flags = [flag for group in groups.values() for flag in group]
    assert len(flags) == len({flag.name for flag in flags})
    return {flag.name: flag.default for flag in flags}


def test_flags_of_training_are_frozen():
    assert defaults(main_earlyExit.FLAGS) == SHARED_DEFAULTS | TRAIN_DEFAULTS


def test_flags_of_evaluation_are_frozen():
    assert defaults(eval_dynamic.FLAGS) == SHARED_DEFAULTS | {"checkpoint": None}


def test_flags_that_do_nothing_are_documented_with_their_reason(capsys):
    with pytest.raises(SystemExit):
        train(["--help", "--model", "msdnet"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--layer_decay FLOAT defined for ConvNeXt only" in text
    assert "options of msdnet" in text and "--stepmode STR default: lin_grow" in text


# Recipes


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
    module = {"main_earlyExit.py": main_earlyExit, "eval_dynamic.py": eval_dynamic}[Path(script).name]
    given, options = parse_flags(module.FLAGS, words, model_options, nearest)
    if module is main_earlyExit:
        args = with_defaults(module.FLAGS, given)
        main_earlyExit.check(args)
        assert args.data_path == "some data" and args.output_dir
        create_model(args.model, 10, **options)
    else:
        assert given.get("checkpoint") or len(options["networks"]) > 1


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(("name", "millions"), [("regnet", 21.798), ("resnet", 20.283), ("mobilenet", 9.299)])
def test_dyn_perceiver_recipes_train_the_published_networks_on_1024_images_a_step(
    name, millions, gpus, tmp_path
):
    command = f"bash scripts/train_dyn_perceiver_{name}_imagenet.sh out"
    launcher, _, words = started_by(command, tmp_path, GPUS=str(gpus))
    given, options = parse_flags(main_earlyExit.FLAGS, words, model_options, nearest)
    assert launcher == [f"--nproc_per_node={gpus}"]
    assert gpus * given["batch_size"] * given["update_freq"] == 1024
    with torch.device("meta"):
        network = create_model(given["model"], **options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == millions


# Training


def test_log_has_a_line_per_epoch(trained):
    first, last = read_log(trained)
    assert (first["epoch"], last["epoch"]) == (0, 1)
    exits = [f"acc1/exit{k}" for k in range(2)]
    wanted = {
        "train/loss",
        "opt/lr",
        *(f"{part}/{key}" for part in ("train", "calib", "calib_ema") for key in exits),
    }
    assert wanted <= first.keys() and wanted <= last.keys()
    assert not any(key.startswith("test") for key in first)
    assert {f"{part}/{key}" for part in ("test", "test_ema") for key in exits} <= last.keys()
    assert first["opt/lr"] > last["opt/lr"] == pytest.approx(1e-6)
    score = [sum(line[f"calib_ema/{key}"] for key in exits) / 2 for line in (first, last)]
    assert [first["best"], last["best"]] == pytest.approx([score[0], max(score)])


def test_checkpoint_is_plain_and_complete(trained, images):
    assert {path.name for path in trained.glob("*.pth")} == {
        f"checkpoint-{name}.pth" for name in ("last", "best", "0", "1")
    }
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert {
        "model",
        "model_ema",
        "arch",
        "optimizer",
        "scaler",
        "epoch",
        "args",
        "calib_indices",
    } <= content.keys()
    options = {"nBlocks": 2, "nChannels": 8, "growthRate": 4, "grFactor": [1, 2], "bnFactor": [1, 2]}
    assert content["arch"] == {"name": "msdnet", "options": options, "num_classes": 2}
    assert (content["epoch"], content["step"], len(set(content["calib_indices"]))) == (1, 16, 8)
    assert content["args"]["data_path"] == str(images) and content["args"]["mean"] == [0.485, 0.456, 0.406]
    network = create_model("msdnet", 2, **options)
    network.load_state_dict(content["model"])
    network.load_state_dict(content["model_ema"])


def test_other_flags_of_training_run(images, trained, tmp_path, capsys):
    flags = (
        "--epochs 1 --update_freq 2 --clip_grad 1 --with_kd true --exit_weights 0.5 1 --use_amp true "
        "--channels_last true --disable_eval true --opt sgd --warmup_steps 2 --save_ckpt_num 0 --print_freq 2"
    )
    finetune = ["--finetune", trained / "checkpoint-last.pth"]
    train(on(images, *flags.split(), *finetune, "--output_dir", tmp_path))
    assert re.search(r"entries kept; initialised anew: nothing\n", capsys.readouterr().out)
    (line,) = read_log(tmp_path)
    assert line["opt/grad_norm"] > 0 and line["train/loss"] > 0
    assert not any(key.startswith(("calib", "train/acc1")) for key in line)  # no evaluation; mixup is on
    # With nothing to judge by, the last is the best.
    assert {path.name for path in tmp_path.glob("*.pth")} == {"checkpoint-best.pth", "checkpoint-last.pth"}


def test_a_resumed_run_equals_an_unbroken_one(images, tmp_path, monkeypatch):
    flags = shlex.split(
        "--epochs 3 --warmup_epochs 1 --update_freq 2 --model_ema true --model_ema_decay 0.5 --lr 0.01"
    )
    train(on(images, *flags, "--output_dir", tmp_path / "whole"))
    train_one_epoch = main_earlyExit.train_one_epoch

    def stopped(*args, epoch, **options):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_one_epoch(*args, epoch=epoch, **options)

    monkeypatch.setattr(main_earlyExit, "train_one_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(on(images, *flags, "--output_dir", tmp_path / "parts"))
    assert [line["epoch"] for line in read_log(tmp_path / "parts")] == [0]
    monkeypatch.undo()
    torch.rand(7)  # generators elsewhere than the first run left them
    train(on(images, *flags, "--output_dir", tmp_path / "parts"))

    files = [tmp_path / name / "checkpoint-last.pth" for name in ("whole", "parts")]
    whole, parts = (torch.load(file, weights_only=True) for file in files)
    for key in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert whole["step"] == parts["step"] == 3 * 4
    assert all(whole[key] == parts[key] for key in ("epoch", "best", "scaler", "calib_indices"))
    lines = [[{**line, "seconds": 0} for line in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0]) == 3


# Sample weights, regimes, teachers

SHORT = [
    *PLAIN,
    *shlex.split("--batch_size 16 --warmup_epochs 0 --lr 0.01 --disable_eval true"),
]  # two batches an epoch
WEIGHTED = shlex.split("--l2w true --meta_net_hidden_size 8 --meta_lr 0.01 --l2w_tables 1 --epochs 2")


def stopped_before(epoch, monkeypatch, words):
    """Trains until an epoch, and then what is left in another process's state."""
    train_one_epoch = main_earlyExit.train_one_epoch

    def stopped(*args, **options):
        if options["epoch"] == epoch:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **options)

    monkeypatch.setattr(main_earlyExit, "train_one_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(words)
    monkeypatch.undo()
    torch.rand(7)
    train(words)


def last_of(out):
    return torch.load(out / "checkpoint-last.pth", weights_only=True)


def check_same(out, other, *keys):
    """Two runs ended the same."""
    contents = [last_of(folder) for folder in (out, other)]
    for key in ("model", "optimizer", *keys):
        torch.testing.assert_close(contents[0][key], contents[1][key], rtol=0, atol=0)
    lines = [[{**line, "seconds": 0} for line in read_log(folder)] for folder in (out, other)]
    assert lines[0] == lines[1] and contents[0]["step"] == contents[1]["step"]


@pytest.fixture(scope="module")
def weighted(images, tmp_path_factory):
    """The folder of a run that learned sample weights; per epoch, what its two exits lost per image, and the
    rates."""
    out, seen, train_one_epoch = tmp_path_factory.mktemp("weighted"), [], main_earlyExit.train_one_epoch

    def watched(model, loader, objective, update, *rest, **options):
        rows, rates = [], []

        def noting(model, images, targets):
            done = 0
            for loss, exits in objective(model, images, targets):
                part = targets[done : done + len(exits[0])]
                losses = [F.cross_entropy(y.detach(), part, reduction="none").half() for y in exits]
                rows.extend(zip(part.tolist(), *(column.tolist() for column in losses), strict=True))
                rates.append(update.optimizer.param_groups[0]["lr"])
                done += len(part)
                yield loss, exits

        means = train_one_epoch(model, loader, noting, update, *rest, **options)
        seen.append((rows, rates))
        return means

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_earlyExit, "train_one_epoch", watched)
        train(on(images, *SHORT, *WEIGHTED, "--output_dir", out, "--log_dir", out / "board"))
    return out, seen


def test_a_run_with_sample_weights_steps_twice_a_batch_at_one_rate(weighted):
    out, seen = weighted
    assert last_of(out)["step"] == 2 * 2 * 2 and last_of(out)["l2w"]["batch"] == 2 * 2
    rates = [rate for _, epoch in seen for rate in epoch]
    assert rates[::2] == rates[1::2] and rates[::2] == pytest.approx(
        [1e-6 + (0.01 - 1e-6) * share for share in (1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5)]
    )
    lines = read_log(out)
    assert all({"l2w/meta_loss", "l2w/negative_weights", "l2w/meta_lr"} <= line.keys() for line in lines)
    assert [line["l2w/meta_lr"] for line in lines] == pytest.approx([0.005, 0])  # of the next batch


@pytest.mark.parametrize("words", ["--warmup_steps 4", "--warmup_epochs 1 --epochs 2"])
@pytest.mark.parametrize("update_freq", [1, 2])
def test_warm_up_with_sample_weights_is_counted_in_optimizer_steps(words, update_freq):
    flags = f"--l2w true --epochs 2 --lr 0.3 --schedule constant --update_freq {update_freq} {words}"
    given, _ = parse_flags(main_earlyExit.FLAGS, flags.split(), model_options, nearest)
    args, network = with_defaults(main_earlyExit.FLAGS, given), torch.nn.Linear(2, 2)
    update = main_earlyExit.make_update(args, network, 4, Compute(torch.device("cpu")))  # four steps an epoch
    rates = [update.lr(step) for step in range(5)]
    assert rates == pytest.approx([0, 0, 0.3, 0.3, 0.3] if update_freq == 1 else [0, 0.1, 0.2, 0.3, 0.3])


def test_tables_of_sample_weights_are_of_every_training_image_once(weighted, images):
    out, seen = weighted
    assert {path.name for path in out.glob("*.npz")} == {"l2w-0.npz", "l2w-1.npz"}
    held_out = set(last_of(out)["calib_indices"])
    for epoch, (rows, _) in enumerate(seen):
        tables = np.load(out / f"l2w-{epoch}.npz")
        assert tables["index"].tolist() == sorted(set(range(40)) - held_out)
        assert {name: tables[name].shape for name in ("weights", "losses", "confidence")} == dict.fromkeys(
            ("weights", "losses", "confidence"), (32, 2)
        )
        # The class of the image that a row is said to be of is the one that it was trained with.
        named = zip((tables["index"] // 20).tolist(), *tables["losses"].T.tolist(), strict=True)
        assert sorted(named) == sorted(rows)
        assert np.allclose(tables["weights"].sum(1), 2, atol=2e-3) and np.ptp(tables["weights"]) > 0.01


def test_sample_weights_are_on_the_board(weighted):
    board = EventAccumulator(str(weighted[0] / "board"), {"histograms": 0})
    board.Reload()
    names = {f"l2w/{table}/exit{k}" for table in ("weights", "losses", "confidence") for k in range(2)}
    assert set(board.Tags()["histograms"]) == names
    steps = [(event.step, event.histogram_value.num) for event in board.Histograms("l2w/weights/exit1")]
    assert steps == [(4, 32.0), (8, 32.0)]


def test_a_resumed_run_with_sample_weights_equals_an_unbroken_one(weighted, images, tmp_path, monkeypatch):
    stopped_before(1, monkeypatch, on(images, *SHORT, *WEIGHTED, "--output_dir", tmp_path))
    check_same(tmp_path, weighted[0], "l2w")
    for name in ("l2w-0.npz", "l2w-1.npz"):
        assert (tmp_path / name).read_bytes() == (weighted[0] / name).read_bytes()


def test_a_plain_run_may_go_on_with_sample_weights(trained, images, tmp_path, capsys):
    words = [*SHORT, *WEIGHTED, "--epochs", 3, "--output_dir", tmp_path, "--regime", "equilibrium"]
    train(on(images, *words, "--resume", trained / "checkpoint-last.pth"))
    assert re.search(
        r"^checkpoint \S+ holds no weight net: it starts anew$", capsys.readouterr().out, re.MULTILINE
    )
    content = last_of(tmp_path)
    # Two epochs of the stored run had other steps; rates are those of the third epoch all the same.
    assert (content["epoch"], content["step"], content["l2w"]["batch"]) == (2, 3 * 4, 3 * 2)


def test_disjoint_training_freezes_the_trunk_and_can_be_resumed(images, tmp_path, monkeypatch):
    words = on(images, *SHORT, *shlex.split("--regime disjoint --epochs 2 --opt sgd"), "--output_dir")
    train([*words, str(tmp_path / "whole")])
    first, last = (
        torch.load(tmp_path / "whole" / f"checkpoint-{name}.pth", weights_only=True)["model"]
        for name in (0, "last")
    )
    for name, value in first.items():
        assert torch.equal(value, last[name]) == (not name.startswith("classifier")), name
    stopped_before(1, monkeypatch, [*words, str(tmp_path / "parts")])
    check_same(tmp_path / "whole", tmp_path / "parts")


def test_published_weights_are_fine_tuned_under_new_heads_on_a_frozen_backbone(images, tmp_path, capsys):
    torch.manual_seed(0)
    size = {"input_ch": 4, "final_ch": 16}
    published = create_model("rexnetv1", num_classes=1000, **size).state_dict()
    torch.save(published, tmp_path / "rexnetv1_1.0.pth")
    network = "--model rexnet_ee_100 --input_ch 4 --final_ch 16 --head_width 8 --freeze_backbone true"
    flags = shlex.split(
        f"--finetune {tmp_path}/rexnetv1_1.0.pth --output_dir {tmp_path}/run --epochs 1 --weight_decay 0"
    )
    train([*network.split(), *on(images)[len(NETWORK) :], *flags, "--lr_scales", "output=0.5"])
    assert "initialised anew: output, exits" in capsys.readouterr().out
    after = last_of(tmp_path / "run")["model"]
    kept = [key for key in published if key.startswith("features")]
    assert kept and all(torch.equal(published[key], after[key]) for key in kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--freeze_backbone true --regime mixed", "--freeze_backbone true trains heads, jointly"),
        (
            "--lr_scales bloc_=0.1",
            "no parameter's name starts with 'bloc_'; they start with blocks, classifier",
        ),
        ("--lr_scales blocks", "learning rate scale 'blocks': give START=FACTOR"),
    ],
)
def test_what_cannot_be_frozen_or_scaled_is_said(images, words, message):
    with pytest.raises(ValueError, match=message):
        train(on(images, *shlex.split(words)))


def test_mixed_training_goes_from_the_last_exit_to_all(images, tmp_path):
    words = shlex.split("--regime mixed --first_share 0.67 --epochs 3 --weight_decay 0 --save_ckpt_num 9")
    train(on(images, *SHORT, *words, "--output_dir", tmp_path))
    contents = [
        torch.load(tmp_path / f"checkpoint-{epoch}.pth", weights_only=True)["model"] for epoch in range(3)
    ]
    for name, moves in (("classifier.0.linear.weight", False), ("classifier.1.linear.weight", True)):
        assert torch.equal(contents[0][name], contents[1][name]) != moves
        assert not torch.equal(contents[1][name], contents[2][name])
    assert (
        read_log(tmp_path)[2]["train/loss"] > 1.3 * read_log(tmp_path)[1]["train/loss"]
    )  # of two exits, and of one


def test_a_teacher_adds_to_the_loss_of_all_exits(trained, images, tmp_path):
    losses = []
    for name, teacher in (
        ("alone", []),
        ("taught", ["--kd_teacher", trained / "checkpoint-last.pth", "--T_kd", 2]),
    ):
        train(
            on(images, *SHORT, "--epochs", 1, "--batch_size", 32, "--output_dir", tmp_path / name, *teacher)
        )
        losses.append(
            read_log(tmp_path / name)[0]["train/loss"]
        )  # of one step: the same answers, the same labels
    assert losses[1] > losses[0] + 1e-3
    assert last_of(tmp_path / "taught")["model"].keys() == last_of(trained)["model"].keys()


def test_a_boosted_network_is_trained_and_evaluated(images, tmp_path):
    words = shlex.split("--model boosted/msdnet --reweight 0.7 --epochs 1 --disable_eval false")
    train(on(images, *SHORT, *words, "--output_dir", tmp_path))
    arch = last_of(tmp_path)["arch"]
    assert arch["name"] == "boosted/msdnet" and (arch["options"]["reweight"], arch["options"]["nBlocks"]) == (
        0.7,
        2,
    )
    evaluate_into(tmp_path / "out", tmp_path / "checkpoint-last.pth", "--row", 3)
    (line,) = read_log(tmp_path)
    exits, runtime = (read_json(tmp_path / "out" / f"{name}.json") for name in ("anytime", "runtime"))
    assert [row["acc1"] for row in exits] == pytest.approx([line[f"test/acc1/exit{k}"] for k in range(2)])
    assert [row["loss"] for row in exits] == pytest.approx(
        [line[f"test/loss/exit{k}"] for k in range(2)], abs=1e-6
    )
    assert runtime["points"][0]["mismatches"]["throughput"] <= 1


# Evaluation


def test_every_result_is_written(evaluated):
    names = {
        "anytime.json",
        "dynamic.json",
        "dynamic.txt",
        "routing.json",
        "runtime.json",
        "curve.png",
        "report.html",
    }
    assert {path.name for path in evaluated.iterdir()} == names
    assert (evaluated / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "8 images held out of the training set" in (evaluated / "report.html").read_text()


def test_anytime_results_are_those_of_training(trained, evaluated, tmp_path):
    log, exits = read_log(trained)[-1], read_json(evaluated / "anytime.json")
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert [row["macs"] for row in exits] == exit_costs(
        create_model("msdnet", 2, **content["arch"]["options"]), (3, 32, 32)
    )
    evaluate_into(tmp_path, trained / "checkpoint-last.pth", "--weights", "model", "--mode", "anytime")
    assert [path.name for path in tmp_path.iterdir()] == ["anytime.json"]
    for part, rows in (("test_ema", exits), ("test", read_json(tmp_path / "anytime.json"))):
        for k, row in enumerate(rows):
            assert row["exit"] == k
            assert row["acc1"] == pytest.approx(log[f"{part}/acc1/exit{k}"])
            assert row["loss"] == pytest.approx(log[f"{part}/loss/exit{k}"], abs=1e-6)


def test_dynamic_results_agree_with_each_other(evaluated):
    exits, rows = read_json(evaluated / "anytime.json"), read_json(evaluated / "dynamic.json")
    assert len(rows) == 39
    for row in rows:
        assert sum(row["shares"]) == pytest.approx(1)
        costs = [one["macs"] for one in exits]
        assert row["macs"] == pytest.approx(sum(s * c for s, c in zip(row["shares"], costs, strict=True)))
        assert len(row["thresholds"]) == 2 and row["thresholds"][-1] == -1e8
        for k in range(2):
            if row["shares"][k] == 1:
                assert row["accuracy"] == pytest.approx(exits[k]["acc1"])
    assert rows[0]["macs"] < rows[-1]["macs"]
    lines = (evaluated / "dynamic.txt").read_text().splitlines()
    pairs = [tuple(map(float, line.split("\t"))) for line in lines]
    assert pairs == [
        (pytest.approx(100 * r["accuracy"], abs=1e-5), pytest.approx(r["macs"], abs=0.1)) for r in rows
    ]


def test_real_early_exit_agrees_with_the_simulation(evaluated):
    rows, runtime = read_json(evaluated / "dynamic.json"), read_json(evaluated / "runtime.json")
    assert runtime["num_images"] == 20
    assert [point["point"] for point in runtime["points"]] == ["row 3", "row 35"]
    for point, row in zip(runtime["points"], (rows[3], rows[35]), strict=True):
        assert point["thresholds"] == pytest.approx(row["thresholds"]) and point["shares"] == row["shares"]
        wrong = point["mismatches"]["throughput"]
        assert wrong <= 1  # folding batch norm changes the last digits, and with them who passes a threshold
        assert 20 * abs(point["accuracy"] - row["accuracy"]) <= wrong + 1e-6
        assert point["macs"] == pytest.approx(row["macs"], rel=0.1 * wrong + 1e-6)


def test_the_sweep_and_scales_of_dyn_perceiver(trained, tmp_path):
    flags = shlex.split("--mode dynamic --quota_sweep dyn_perceiver --quota_scales 0.85")
    rows = read_json(evaluate_into(tmp_path, trained / "checkpoint-last.pth", *flags) / "dynamic.json")
    assert len(rows) == len((tmp_path / "dynamic.txt").read_text().splitlines()) == 33
    assert rows[0]["policy"] == "dyn_perceiver p=0.2" and not (tmp_path / "runtime.json").exists()


@pytest.mark.parametrize(
    ("calib", "origin"),
    [
        ("half_test", "10 random test images, not reported on"),
        ("train_augmented", "32 training images with training augmentation, the published procedure"),
    ],
)
def test_other_images_for_thresholds(trained, tmp_path, calib, origin):
    evaluate_into(tmp_path, trained / "checkpoint-last.pth", "--mode", "dynamic", "--calib", calib)
    page = (tmp_path / "report.html").read_text()
    reported = 10 if calib == "half_test" else 20
    assert origin in page and f"{reported} test images" in page
    for row in read_json(tmp_path / "dynamic.json"):
        assert row["accuracy"] * reported == pytest.approx(round(row["accuracy"] * reported))


def test_the_training_script_evaluates_too(trained, evaluated, tmp_path):
    shutil.copy(trained / "checkpoint-last.pth", tmp_path)
    train(["--eval", "true", "--output_dir", str(tmp_path), "--mode", "dynamic", *RUN])
    for name in ("anytime.json", "dynamic.json", "dynamic.txt"):
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


# Wrong input


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Runs a script that must end with one line on stderr and exit code 2; returns that line."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--model msdnett", r"unknown model 'msdnett'; did you mean msdnet"),
        ("--nBlock 3", r"unknown flag --nBlock; did you mean --nBlocks"),
        ("--bath-size 3", r"unknown flag --bath_size; did you mean --batch_size"),
        ("--nBlocks 0", r"nBlocks is 0; it must be at least 1"),
        ("--num_workers 0", r"--num_workers: 0 is below the least value accepted, 1"),
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
        ("--num_calib 40", r"cannot hold 40 images out of 40"),
        ("--smoothing 1", r"--smoothing 1.0: it must be below 1"),
        ("--opt_betas 0.9", r"--opt_betas \[0.9\]: give two numbers"),
        ("--schedule multistep", r"--schedule multistep needs --decay_epochs"),
        ("--enable_wandb true", r"--enable_wandb mirrors TensorBoard: give --log_dir"),
        ("--exit_weights 1 2 3", r"3 exit weights given, the network has 2 exits"),
        ("--loss_cnn_factor 1", r"loss factors are for four exits, the network has 2"),
        ("--nb_classes 3", r"--nb_classes 3, but image_folder has 2 classes"),
        ("--mean 0.5", r"--mean \(0.5,\).*give three numbers each"),
        ("--data_set IMAGENET", r"unknown data set 'IMAGENET': not DIGITS"),
        ("--data_path nowhere", r"image folder nowhere: .*No such file"),
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
def test_mistakes_in_training_flags(images, error_of, words, complaint):
    assert re.match(complaint, error_of(train, *on(images), *words.split()))


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
        ("--l2w true --target_p_index 40", r"--target_p_index 40: accepted: 1 to 39, 20 for equal shares"),
        ("--l2w true --target_p_index 0", r"--target_p_index: 0 is below the least value accepted, 1"),
        (
            "--l2w true --batch_size 2",
            r"--batch_size 2: L2W trains on halves of a batch and needs at least 4",
        ),
        ("--l2w true --compile true", r"--compile true compiles the plain forward pass: not for --l2w true"),
        ("--l2w true --opt Lookahead_sgd", r"--opt Lookahead_sgd: L2W looks one step of SGD ahead"),
        (
            "--l2w true --constraint_dimension diag",
            r"--constraint_dimension: 'diag' is not one of mat, row, col",
        ),
        (
            "--l2w true --meta_net_input_type logits",
            r"--meta_net_input_type: 'logits' is not one of loss, conf, both",
        ),
        (
            "--regime equilibrium --compile true",
            r"--compile true compiles the plain forward pass: .* another --regime",
        ),
        ("--regime joined", r"--regime: 'joined' is not one of joint, equilibrium, disjoint, mixed"),
        ("--first_share 2", r"--first_share 2.0: .*at most 1"),
        ("--kd_teacher nowhere.pth", r"cannot read checkpoint nowhere.pth: No such file or directory"),
    ],
)
def test_mistakes_in_flags_of_objectives(images, error_of, words, complaint):
    assert re.match(complaint, error_of(train, *on(images, *PLAIN), *words.split()))


def test_a_teacher_of_other_classes_or_images_is_refused(trained, images, error_of):
    teacher = trained / "checkpoint-last.pth"
    line = error_of(train, *NETWORK, *PLAIN, *RUN, "--data_set", "DIGITS", "--kd_teacher", teacher)
    assert line.startswith(
        f"teacher {teacher} reads images of --mean [0.485, 0.456, 0.406], this run has [0.3057, "
    )
    stats = shlex.split("--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225")
    line = error_of(train, *NETWORK, *PLAIN, *RUN, "--data_set", "DIGITS", "--kd_teacher", teacher, *stats)
    assert line == f"checkpoint {teacher} has 2 classes, the data set 10"


def test_a_weight_net_of_another_size_is_not_resumed(weighted, images, error_of):
    words = [*SHORT, *WEIGHTED, "--meta_net_input_type", "both", "--resume", weighted[0] / "checkpoint-0.pth"]
    line = error_of(train, *on(images, *words))
    assert re.match(
        r"the weight net of checkpoint \S+ does not fit this run's: size mismatch for first_hidden_lay", line
    )


def test_a_folder_of_unnamed_images_is_imagenet(images, tmp_path, error_of):
    folder = ["--data_path", "nowhere", *RUN]
    assert error_of(train, *NETWORK, *folder).startswith("image folder nowhere/train: ")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "bare.pth")
    assert error_of(evaluate, "--checkpoint", tmp_path / "bare.pth", *folder).startswith(
        "image folder nowhere/train: "
    )


def test_a_network_must_be_named(error_of):
    assert error_of(train, "--lr", 1) == "name a network: --model NAME"
    assert error_of(train, "--nBlocks", 2).endswith("; a network's options need --model NAME")


def test_unusable_image_folders(images, tmp_path, error_of):
    shutil.copytree(images, tmp_path / "a")
    (tmp_path / "a" / "train" / "none").mkdir()
    line = error_of(train, *on(tmp_path / "a"))
    assert line.startswith(f"image folder {tmp_path / 'a' / 'train'}: ") and "none" in line
    (tmp_path / "a" / "train" / "none").rmdir()
    broken = tmp_path / "a" / "train" / "lit" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    line = error_of(train, *on(tmp_path / "a", "--num_calib", 0, "--epochs", 1))
    assert line.startswith(f"cannot read image {broken}: ")


def test_a_checkpoint_of_another_network_is_not_resumed(images, trained, error_of):
    line = error_of(train, *on(images, "--resume", trained / "checkpoint-last.pth", "--nBlocks", 3))
    assert line.endswith("checkpoint-last.pth holds another architecture: nBlocks is 2, wanted 3")


@pytest.mark.parametrize(("flag", "value", "stored"), [("seed", "5", "0"), ("opt", "sgd", "adamw")])
def test_a_run_is_not_resumed_with_another_split_or_optimizer(images, trained, error_of, flag, value, stored):
    line = error_of(train, *on(images, "--resume", trained / "checkpoint-last.pth", f"--{flag}", value))
    assert re.fullmatch(rf"--{flag} {value}, but \S*checkpoint-last.pth was trained with {stored}", line)


def test_bare_weights_are_not_resumed(images, trained, tmp_path, error_of):
    weights = torch.load(trained / "checkpoint-last.pth", weights_only=True)["model"]
    torch.save(weights, tmp_path / "bare.pth")
    line = error_of(train, *on(images, "--resume", tmp_path / "bare.pth"))
    assert "bare.pth can be evaluated or fine-tuned (--finetune) but not resumed" in line


def test_evaluating_as_another_network_is_refused(trained, error_of):
    line = error_of(
        evaluate, *RUN, "--checkpoint", trained / "checkpoint-last.pth", "--model", "msdnet_cifar_even7"
    )
    assert "holds another network than --model and its options say" in line


class NotTensors:
    """What a checkpoint may not hold."""


def test_files_that_are_no_checkpoints(trained, tmp_path, error_of):
    whole = (trained / "checkpoint-last.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(print, protocol=2))
    torch.save({"model": NotTensors()}, tmp_path / "object.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    complaints = {
        "cut": r".*cut.pth is truncated or not a checkpoint",
        "pickle": r"checkpoint \S*pickle.pth is refused: it holds \S*print",
        "object": r"checkpoint \S*object.pth is refused: it holds \S*NotTensors",
        "empty": r"checkpoint \S*empty.pth has no weights under .*; it holds epoch",
        "absent": r"cannot read checkpoint \S*absent.pth: No such file",
    }
    for name, complaint in complaints.items():
        assert re.match(complaint, error_of(evaluate, *RUN, "--checkpoint", tmp_path / f"{name}.pth"))


def test_a_checkpoint_that_names_no_network_needs_one(trained, images, tmp_path, error_of):
    torch.save(
        {"model": torch.load(trained / "checkpoint-last.pth", weights_only=True)["model"]},
        tmp_path / "bare.pth",
    )
    data = f"--data_set image_folder --input_size 32 --data_path {images}".split()
    bare = ["--checkpoint", tmp_path / "bare.pth", *data, *RUN, "--mode", "anytime", "--output_dir", tmp_path]
    assert "does not name a network known here: give --model" in error_of(evaluate, *bare)
    assert "does not fit the model" in error_of(evaluate, *bare, "--model", "msdnet")
    evaluate([*map(str, bare), *NETWORK])
    figures = [row["acc1"] for row in read_json(tmp_path / "anytime.json")]
    assert figures == pytest.approx([read_log(trained)[-1][f"test/acc1/exit{k}"] for k in range(2)])


def test_a_cascade_is_evaluated_from_its_networks_files_and_then_from_its_own(trained, tmp_path, capsys):
    words = [f"weights={trained / 'checkpoint-last.pth'}"] * 2
    flags = ["--router_threshold", "0.9", "0.8", "0.7", "--mode", "dynamic", *RUN]
    evaluate(["--model", "ebjr", "--networks", *words, "--output_dir", str(tmp_path / "first"), *flags])
    exits, routing = (read_json(tmp_path / "first" / name) for name in ("anytime.json", "routing.json"))
    assert [row["acc1"] for row in exits[:2]] == [row["acc1"] for row in exits[2:]] and len(exits) == 4
    assert (
        exits[3]["macs"] == 2 * exits[1]["macs"] and exits[3]["alone"] == exits[1]["alone"] < exits[1]["macs"]
    )
    assert routing["policy"] == "threshold 0.9 0.8 0.7" and routing["samples"] == 20
    assert "probably trained" not in capsys.readouterr().out  # both held out the same images
    evaluate_into(tmp_path / "second", tmp_path / "first" / "cascade.pth", *flags)
    assert read_json(tmp_path / "second" / "anytime.json") == exits


def test_mistakes_in_a_cascade(trained, error_of):
    weights = f"weights={trained / 'checkpoint-last.pth'}"
    known = ["--model", "ebjr", *RUN, "--networks"]
    assert "a cascade has two or more" in error_of(evaluate, *known, weights)
    assert "cannot read checkpoint nowhere.pth" in error_of(evaluate, *known, weights, "weights=nowhere.pth")
    assert "unknown model 'msdnt'" in error_of(evaluate, *known, weights, "msdnt:" + weights)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--data_set DIGITS", r"checkpoint .* has 2 classes, the data set 10"),  # and the folder is not read
        ("--data_set DIGITS --data_path nowhere", r"data set DIGITS reads no --data_path"),
        ("--data_path nowhere", r"image folder nowhere: "),  # the data set is the stored one
        ("--row 39", r"--row 39, but msdnet has rows 0 to 38"),
        ("--row -1", r"--row: -1 is below the least value accepted, 0"),
        ("--budget 1", r"a budget of 1 multiply-adds is below the cheapest setting's"),
        ("--quota_scales 1 2", r"2 quota scales .* for 2 exits; give one per exit but the last"),
        (
            "--num_calib 0",
            r"no images were held out for calibration \(--num_calib 0\); use --calib half_test",
        ),
        ("--confidence sure", r"unknown confidence 'sure'; accepted: max_prob"),
        ("--router_threshold 1 2", r"2 router thresholds for 2 exits; give one per exit but the last"),
        ("--shares 1.5", r"shares \[1.5\] for 2 exits"),
        ("--epochs 3", r"unknown flag --epochs"),
        ("--checkpoint=", r"name the file to evaluate: --checkpoint FILE"),
    ],
)
def test_mistakes_in_evaluation_flags(trained, tmp_path, error_of, words, complaint):
    known = [
        "--checkpoint",
        trained / "checkpoint-last.pth",
        "--output_dir",
        tmp_path,
        "--mode",
        "runtime",
        *RUN,
    ]
    assert re.match(complaint, error_of(evaluate, *known, *words.split()))


# Processes


def script(*words, **options):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_a_script_ends_with_one_line_for_its_user():
    end = script("main_earlyExit.py", "--model", "msdnet", "--epoch", 3)
    assert (end.returncode, end.stdout) == (2, "")
    assert re.fullmatch(r"error: unknown flag --epoch; did you mean --epochs, .*\?\n", end.stderr)


def test_torchrun_trains_in_two_processes(images, trained, tmp_path):
    flags = on(
        images, "--epochs", 1, "--warmup_epochs", 0, *PLAIN, "--output_dir", tmp_path, "--num_calib", 7
    )
    flags += ["--finetune", trained / "checkpoint-last.pth"]
    launch = shlex.split("-m torch.distributed.run --standalone --nproc_per_node 2 main_earlyExit.py")
    end = script(*launch, *flags, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert end.returncode == 0, end.stderr
    assert [end.stdout.count(text) for text in ("2 exits,", "fine-tuning", "epoch 1/1")] == [1, 1, 1]
    (line,) = read_log(tmp_path)
    # All 7 images held out, and all 20 test images, are counted once.
    assert line["calib/acc1/exit0"] * 7 == pytest.approx(round(line["calib/acc1/exit0"] * 7))
    assert line["test/acc1/exit1"] * 20 == pytest.approx(round(line["test/acc1/exit1"] * 20))
    assert torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)["step"] == 32 // 8
