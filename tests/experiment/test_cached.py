"""Heads that train on features computed once do what they do on images."""

import json
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

import main_earlyExit
from datasets import eval_transform
from experiment import cached, classifier, open_network
from experiment.place import Place
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
        ("--low_size 16", "features have one size; give no --low_size"),
        ("--kd_teacher x.pth", "a teacher reads images"),
    ],
)
def test_what_is_refused(words, message, on, error_of):
    every = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true", *words.split()]
    assert message in error_of(train, *every)


def test_features_that_do_not_fit(on, error_of, tmp_path, monkeypatch):
    monkeypatch.setattr(cached.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**4))
    every = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true"]
    said = error_of(train, *every, "--output_dir", tmp_path)
    assert "2 of 2 files to compute, 0.1 MB; 0.0 MB are free in" in said and "--cache_dir names" in said


@pytest.fixture
def run(on, tmp_path, capsys):
    """`run(*words)` trains heads on features in a folder that all runs of a test share.

    Returns how many files were to be computed.
    """

    def trained(*words, network=NETWORKS["vit_ee"]):
        out = str(tmp_path / f"run{len([*tmp_path.iterdir()])}")
        shared = ["--cache_features", "true", "--cache_dir", str(tmp_path / "features")]
        capsys.readouterr()
        train([*on(network=network.split()), *FLAGS, *shared, "--output_dir", out, *map(str, words)])
        return int(re.search(r"(\d+) of \d+ files to compute", capsys.readouterr().out).group(1))

    return trained


def files_of(folder, pattern="*.npy"):
    return sorted((folder / "features").glob(pattern))


def test_a_file_serves_all_that_it_fits(run, tmp_path):
    torch.manual_seed(0)
    weights = timm.create_model("test_vit").state_dict()
    torch.save(weights, tmp_path / "a.pth")
    torch.save({name: 1.1 * value for name, value in weights.items()}, tmp_path / "b.pth")
    start = "--epochs", 1, "--finetune", tmp_path / "a.pth"
    assert run(*start) == 2
    assert run(*start, "--seed", 1, "--lr", 0.1) == 0  # other images are held out, and heads begin elsewhere
    assert run(*start, network=NETWORKS["vit_ee"].replace("width 8", "width 4")) == 0
    assert run(*start, "--mean", 0.4, 0.4, 0.4) == 2
    assert run(*start[:3], tmp_path / "b.pth") == 2
    assert run(*start, network=NETWORKS["vit_ee"].replace("exits 2", "exits 1")) == 2
    assert run(*start, "--use_amp", "true", "--amp_dtype", "bf16") == 2
    assert run(*start, "--cache_views", 2, "--scale", 0.5, 1) == 1
    assert run(*start, "--cache_views", 2, "--scale", 0.6, 1) == 1


def test_images_that_changed_are_computed_anew(on, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    words = [*on(network=NETWORKS["vit_ee"].split(), data=tmp_path / "images"), *FLAGS, "--epochs", "1"]
    words += ["--finetune", str(tmp_path / "a.pth"), "--cache_features", "true"]
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "a.pth")
    words += ["--cache_dir", str(tmp_path / "features"), "--output_dir"]
    train([*words, str(tmp_path / "before")])
    shutil.copy(tmp_path / "images/train/dim/0.png", tmp_path / "images/train/lit/0.png")
    train([*words, str(tmp_path / "after")])
    assert len(files_of(tmp_path, "train-0-*.npy")) == 2 and len(files_of(tmp_path, "test-0-*.npy")) == 1


def test_a_file_is_read_only_if_it_is_whole(run, tmp_path, monkeypatch):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "a.pth")
    start = "--epochs", 1, "--finetune", tmp_path / "a.pth"
    row, seen = cached.Features._row, []

    def broken(features, batch):
        seen.append(batch)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return row(features, batch)

    monkeypatch.setattr(cached.Features, "_row", broken)
    with pytest.raises(KeyboardInterrupt):
        run(*start)
    assert [path.name for path in (tmp_path / "features").iterdir()] == [".features.lock"]
    assert run(*start) == 2
    train_file = files_of(tmp_path)[1]
    whole = train_file.read_bytes()
    train_file.write_bytes(whole[:-4])
    assert run(*start) == 1 and train_file.read_bytes() == whole


def test_epochs_go_through_the_views_in_turn(run, tmp_path, monkeypatch):
    read, rows = [], cached.Features.rows

    def watched(features, part, view=0):
        read.append((part, view))
        return rows(features, part, view)

    monkeypatch.setattr(cached.Features, "rows", watched)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "a.pth")
    words = ("--finetune", tmp_path / "a.pth", "--cache_views", 2, "--epochs", 3)
    assert run(*words) == 3
    assert [view for part, view in read if part == "train"] == [0, 1, 0]
    assert {view for part, view in read if part != "train"} == {0}
    plain, augmented = map(np.load, files_of(tmp_path, "train-*.npy"))
    assert (plain[:, -1] == augmented[:, -1]).all() and not np.isclose(plain, augmented).all(1).any()
    for path in files_of(tmp_path):
        path.unlink()
    assert run(*words, "--seed", 1) == 3  # the views are those of every seed
    assert (np.load(files_of(tmp_path, "train-1-*.npy")[0]) == augmented).all()


def test_a_run_stopped_within_an_epoch_goes_on(tmp_path, on, last_of, monkeypatch):
    words = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true", "--batch_size", "4"]
    words += ["--cache_views", "2", "--save_every_steps", "3", "--output_dir"]
    train([*words, str(tmp_path / "whole")])
    after_batch = Place.after_batch

    def stopping(place, check):
        after_batch(place, check)
        if (place.epoch.number, place.epoch.batch) == (1, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(Place, "after_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        train([*words, str(tmp_path / "parts")])
    monkeypatch.undo()
    assert last_of(tmp_path / "parts")["partial"]["batch"] in (3, 4)
    train([*words, str(tmp_path / "parts")])
    whole, parts = (last_of(tmp_path / name) for name in ("whole", "parts"))
    for key in ("model", "optimizer"):
        assert_close(whole[key], parts[key], rtol=0, atol=0)


def test_the_network_answers_images_as_its_heads_answer_features(tmp_path, on, read_log, evaluate_into):
    torch.manual_seed(0)
    weights = timm.create_model("test_vit").state_dict()
    torch.save(weights, tmp_path / "a.pth")
    words = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--cache_features", "true"]
    train([*words, "--finetune", str(tmp_path / "a.pth"), "--output_dir", str(tmp_path / "run")])
    network = open_network(str(tmp_path / "run" / "checkpoint-last.pth")).network
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, weights[name])
    evaluated = evaluate_into(
        tmp_path / "evaluated", tmp_path / "run" / "checkpoint-last.pth", "--mode", "anytime"
    )
    log = read_log(tmp_path / "run")[-1]
    for k, row in enumerate(json.loads((evaluated / "anytime.json").read_text())):
        assert row["acc1"] == log[f"test/acc1/exit{k}"]
        assert row["loss"] == pytest.approx(log[f"test/loss/exit{k}"], rel=1e-5)


def worker(words):
    train(words)


def test_two_processes_compute_and_read_the_same(tmp_path, on, in_processes, last_of):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "a.pth")
    words = [*on(network=NETWORKS["vit_ee"].split()), *FLAGS, "--finetune", str(tmp_path / "a.pth")]
    words += ["--cache_features", "true", "--cache_views", "2", "--clip_grad", "1", "--output_dir"]
    train([*words, str(tmp_path / "one")])
    in_processes(2, worker, [*words, str(tmp_path / "two"), "--batch_size", "8"])
    folders = [tmp_path / name / "features" for name in ("one", "two")]
    files = [sorted(folder.glob("*.npy")) for folder in folders]
    assert len(files[0]) == 3
    for ours, theirs in zip(*files, strict=True):
        assert ours.name == theirs.name
        assert np.allclose(np.load(ours), np.load(theirs), rtol=1e-4, atol=1e-5)
    assert last_of(tmp_path / "two")["epoch"] == 1
