"""Heads that train on features computed once do what they do on images."""

import shlex

import pytest
import torch
from torch.testing import assert_close

import main_earlyExit
from datasets import eval_transform
from experiment import cached, classifier
from loading.split import Split

pytestmark = pytest.mark.usefixtures("costs_once", "no_pictures")
train = main_earlyExit.main
FLAGS = shlex.split(
    "--freeze_backbone true --batch_size 16 --warmup_epochs 0 --lr 0.01 --epochs 2 --smoothing 0 "
    "--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0"
)
NETWORKS = {
    "vit_ee": "--model vit_ee --backbone test_vit --exits 2 --head_width 8",
    "pooled": "--model timm_ee --backbone resnet10t --exits 2 --head_width 8 --head pooled",
    "map": "--model timm_ee --backbone resnet10t --exits 2 --head_width 8",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_epochs_are_those_without_a_cache(name, tmp_path, on, read_log, last_of, monkeypatch):
    open_splits = classifier.open_splits

    def without_augmentation(*args):
        splits = open_splits(*args)
        clean = Split(splits.train.base, splits.train.indices, eval_transform(splits.view))
        return classifier.replace(splits, train=clean)

    monkeypatch.setattr(classifier, "open_splits", without_augmentation)
    words = [*on(network=NETWORKS[name].split()), *FLAGS]
    for kept in ("true", "false"):
        train([*words, "--cache_features", kept, "--output_dir", str(tmp_path / kept)])
    lines = [read_log(tmp_path / kept) for kept in ("true", "false")]
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if "loss" in key:
                assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    models = [last_of(tmp_path / kept)["model"] for kept in ("true", "false")]
    assert_close(*models, rtol=1e-3, atol=1e-4)


def test_a_run_that_was_stopped_goes_on(tmp_path, on, last_of, monkeypatch):
    words = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true", "--output_dir"]
    train([*words, str(tmp_path / "whole")])
    train_one_epoch = classifier.train_one_epoch

    def stopped(*args, **options):
        if options["epoch"].number == 1:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **options)

    monkeypatch.setattr(classifier, "train_one_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train([*words, str(tmp_path / "parts")])
    monkeypatch.undo()
    torch.rand(7)
    train([*words, str(tmp_path / "parts")])
    whole, parts = (last_of(tmp_path / name) for name in ("whole", "parts"))
    for key in ("model", "optimizer"):
        assert_close(whole[key], parts[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--freeze_backbone false", "--cache_features true needs --freeze_backbone true"),
        ("--mixup 0.8", "features are not mixed; give --mixup 0 --cutmix 0"),
        ("--device_data true", "give --device_data false"),
        ("--kd_teacher x.pth", "a teacher reads images"),
    ],
)
def test_what_is_refused(words, message, on, error_of):
    every = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true", *words.split()]
    assert message in error_of(train, *every)


def test_features_that_do_not_fit(on, error_of, monkeypatch):
    monkeypatch.setattr(cached, "ROOM", 2**10)
    every = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true"]
    assert "GiB; accepted: at most 0" in error_of(train, *every)
