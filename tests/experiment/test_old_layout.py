"""Checkpoints in the layout that runs have written so far go on, are evaluated and are opened.

Here it is written down by hand: a dict of `model`, `optimizer`, `scaler`, `model_ema` (None without an average), `step`,
`arch`, `epoch`, `best`, `args` (all flags, flat), `calib_indices` and `l2w` (None without sample weights).
"""

import copy
import json
import shlex

import pytest
import torch
from torch.testing import assert_close

import main_earlyExit
from experiment import classifier, open_network
from models import create_model
from training.weight_net import WeightNet

OPTIONS = {"nBlocks": 2, "nChannels": 8, "growthRate": 4, "grFactor": [1, 2], "bnFactor": [1, 2]}
ARCH = {"name": "msdnet", "options": OPTIONS, "num_classes": 2}
HELD_OUT = [1, 4, 9, 16, 22, 27, 33, 39]
STATS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Of the 110 or so flags those that are read again, and some that are not.
FLAGS = {
    **{"data_set": "image_folder", "eval_data_path": None, "num_calib": 8, "seed": 0, "nb_classes": None},
    **{"input_size": 32, "crop_pct": None, "imagenet_default_mean_and_std": True, **STATS},
    **{"train_split": "train", "val_split": "val", "calib_split": None, "download": False},
    **{"model": "msdnet", "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None, "momentum": 0.9},
    **{"lr": 0.01, "min_lr": 1e-6, "weight_decay": 0.05, "epochs": 2, "warmup_epochs": 0, "batch_size": 4},
    **{"model_ema": True, "model_ema_decay": 0.5, "model_ema_eval": True, "l2w": False, "regime": "joint"},
    **{"aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "smoothing": 0.1},
    **{"mode": "all", "confidence": "max_prob", "local_rank": -1, "device": "cpu", "output_dir": "runs/old"},
}
STEPS = 8  # 32 images in batches of 4
GOING_ON = "--epochs 2 --warmup_epochs 0 --lr 0.01 --batch_size 4 --disable_eval true"


def network():
    return create_model("msdnet", 2, **OPTIONS)


def adamw(model):
    """AdamW with and without weight decay, as its runs had it, after one step of it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for _, p in named if not any(p is other for other in plain)]
    groups = [
        {"params": decayed, "weight_decay": 0.05, "lr_scale": 1.0, "wd_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0, "wd_scale": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for group in groups:
        for p in group["params"]:
            p.grad = 1e-3 * torch.randn_like(p)
    optimizer.step()
    return optimizer


@pytest.fixture
def content(images):
    """What a file of the first of two epochs held."""
    torch.manual_seed(3)
    model, average = network(), network()
    optimizer = adamw(model)
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(STEPS))
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "model_ema": average.state_dict(),
        "step": STEPS,
        "arch": ARCH,
        "epoch": 0,
        "best": 0.625,
        "args": {**FLAGS, "data_path": str(images)},
        "calib_indices": HELD_OUT,
        "l2w": None,
    }


@pytest.fixture
def saved(content, tmp_path):
    """`saved(**other)`: such a file, with other entries where they are given."""

    def save(**other):
        path = tmp_path / "old.pth"
        torch.save(content | other, path)
        return path

    return save


@pytest.fixture
def go_on(on, tmp_path, last_of, capsys):
    """`go_on(path, *words)` trains the epoch that is left; the last checkpoint, and what was printed."""

    def train(path, *words):
        out = tmp_path / "out"
        flags = [*shlex.split(GOING_ON), *words, "--resume", path, "--output_dir", out]
        main_earlyExit.main(on(*flags))
        return last_of(out), capsys.readouterr().out

    return train


@pytest.fixture
def no_steps(monkeypatch):
    """Epochs are done without a step, so that what a run ends with is what it started from."""
    monkeypatch.setattr(classifier, "train_one_epoch", lambda *_, **__: {"loss": 0.0})


EMA = shlex.split("--model_ema true --model_ema_decay 0.5")


@pytest.mark.usefixtures("no_steps")
def test_every_part_goes_on(content, saved, go_on):
    found, printed = go_on(saved(), *EMA)
    assert "32 train images, 8 calib images" in printed and "going on from" in printed
    for name in ("model", "model_ema"):
        assert_close(found[name], content[name], rtol=0, atol=0)
    assert_close(found["optimizer"]["state"], content["optimizer"]["state"], rtol=0, atol=0)
    assert (found["epoch"], found["best"], found["calib_indices"]) == (1, 0.625, HELD_OUT)
    assert found["step"] == STEPS and found["arch"] == ARCH


def test_its_steps_go_on(content, saved, go_on):
    found, _ = go_on(saved(), *EMA)
    assert found["step"] == 2 * STEPS
    assert {float(state["step"]) for state in found["optimizer"]["state"].values()} == {2.0 * STEPS}
    assert not torch.equal(
        found["model"]["classifier.0.linear.bias"], content["model"]["classifier.0.linear.bias"]
    )


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize("entries", [{"model_ema": None}, {}], ids=["no average", "no entry for it"])
def test_an_average_that_a_file_lacks_starts_from_its_weights(content, saved, go_on, entries):
    del content["model_ema"]
    found, _ = go_on(saved(**entries), *EMA)
    assert_close(found["model_ema"], content["model"], rtol=0, atol=0)


@pytest.mark.usefixtures("no_steps")
def test_a_weight_net_goes_on(content, saved, go_on):
    torch.manual_seed(4)
    net = WeightNet(2, 2, hidden=8, layers=1)
    meta = torch.optim.Adam(net.parameters(), 1e-4)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    meta.step()
    state = {"weight_net": net.state_dict(), "optimizer": meta.state_dict(), "batch": 8}
    found, _ = go_on(
        saved(l2w=state), "--l2w", "true", "--meta_net_hidden_size", "8", "--mixup", "0", "--cutmix", "0"
    )
    assert_close(found["l2w"]["weight_net"], state["weight_net"], rtol=0, atol=0)
    assert_close(found["l2w"]["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)


def test_it_is_evaluated(saved, evaluate_into, tmp_path, capsys, no_pictures):
    out = evaluate_into(tmp_path / "results", saved(), "--mode", "dynamic")
    assert "moving average of the weights" in capsys.readouterr().out
    exits = json.loads((out / "anytime.json").read_text())
    assert len(exits) == 2 and "8 images held out of the training set" in (out / "report.html").read_text()


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_it_is_opened(content, saved, weights):
    opened = open_network(saved(), weights=weights)
    assert (opened.arch, opened.held_out, opened.class_names) == (ARCH, HELD_OUT, ("0", "1"))
    assert (opened.view.input_size, list(opened.view.mean), list(opened.view.std)) == (32, *STATS.values())
    assert opened.recipe.data.num_calib == 8 and opened.recipe.data.data_set == "image_folder"
    stored = content["model" if weights == "model" else "model_ema"]
    assert_close(dict(opened.network.state_dict()), dict(stored), rtol=0, atol=0)
