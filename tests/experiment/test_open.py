import copy
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional as TF

from datasets import View
from experiment import open_network
from experiment.checkpoint import save
from experiment.fit import fit_to
from experiment.open import architecture, open_teacher, read_weights
from experiment.published import understood
from experiment.recipe import Network, Recipe, Start
from models import create_model

PERCEIVER = "mobilenetV3_0x5_perceiver_t128"
SMALL = {"nBlocks": 2, "nChannels": 4, "growthRate": 4}
NETWORK = {"name": "msdnet", "options": SMALL, "num_classes": 5}
STATS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def same_answers(network, other, side=32):
    torch.manual_seed(0)
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        theirs = other.eval()(images)
        theirs = theirs if isinstance(theirs, list) else [theirs]
        torch.testing.assert_close(network(images), theirs, rtol=1e-5, atol=1e-5)


# Every kind of file


def test_our_checkpoint_says_everything(tmp_path):
    network, average = create_model("msdnet", 5, **SMALL), create_model("msdnet", 5, **SMALL)
    content = {
        "model": network.state_dict(),
        "model_ema": average.state_dict(),
        "arch": NETWORK,
        "args": {"data_set": "DIGITS", "input_size": 16, **{key: list(v) for key, v in STATS.items()}},
        "calib_indices": [3, 4],
        "class_names": ["a", "b", "c", "d", "e"],
    }
    save(tmp_path / "x.pth", content)
    opened = open_network(tmp_path / "x.pth")
    assert (opened.arch, opened.held_out, opened.class_names) == (NETWORK, [3, 4], tuple("abcde"))
    assert opened.recipe.data.data_set == "DIGITS" and opened.view == View(16, *STATS.values())
    assert opened.source == str(tmp_path / "x.pth") and opened.weights == "moving average of the weights"
    assert not opened.network.training
    same_answers(opened.network, average)
    same_answers(open_network(tmp_path / "x.pth", weights="model").network, network)
    grey = Image.new("L", (40, 20), 51)  # 0.2 of 255
    batch = opened.transform([grey, grey.convert("RGB"), grey.convert("I").point(lambda level: 257 * level)])
    assert (
        batch.shape == (3, 3, 16, 16)
        and torch.equal(batch[0], batch[2])
        and opened.transform(grey).shape == (1, 3, 16, 16)
    )
    torch.testing.assert_close(batch[0, :, 0, 0], torch.tensor([0.25, 0.0, -1 / 6]))


@pytest.fixture(scope="module")
def perceiver_file():
    """The content of a published file; in the moving average everything is half as large."""
    import argparse

    torch.manual_seed(0)
    flags = {
        "model": PERCEIVER,
        "drop_path": 0.3,
        "dropout": 0.0,
        "input_size": 64,
        "SA_widening_factor": 2,
        "depth_factor": [1, 1, 1, 2],
        "with_isc": False,
        "data_path": "/home/somebody/ImageNet",
        "data_set": "IMNET",
        "nb_classes": 1000,
    }
    args = argparse.Namespace(**flags)
    arch = understood({"args": args}, "x.pth").arch
    weights = create_model(PERCEIVER, **arch["options"]).state_dict()
    average = {key: value / 2 if value.is_floating_point() else value for key, value in weights.items()}
    return {"model": weights, "model_ema": average, "epoch": "best", "args": args}


def open_perceiver(content, weights="auto", name="", num_classes=1000, **options):
    stored = understood(content, "x.pth")
    view = View(224, *STATS.values())
    return open_network(
        stored, name=name, options=options, weights=weights, num_classes=num_classes, view=view
    )


@pytest.mark.parametrize(
    ("weights", "key"), [("auto", "model_ema"), ("ema", "model_ema"), ("model", "model")]
)
def test_a_published_dyn_perceiver_is_built_from_its_flags(perceiver_file, weights, key):
    opened = open_perceiver(perceiver_file, weights, PERCEIVER, depth_factor=[1, 1, 1, 2], drop_path=0.1)
    assert torch.equal(opened.network.latent, perceiver_file[key]["latent"]) and not opened.network.training
    assert opened.arch["options"]["input_size"] == 64  # as stored, whatever the images of the evaluation
    assert opened.weights == {"model_ema": "moving average of the weights", "model": "weights"}[key]


def test_a_file_with_a_rate_of_dropout_opens_as_before(perceiver_file):
    args = understood(perceiver_file, "x.pth").arch["options"]
    arch = {"name": PERCEIVER, "options": args | {"dropout": 0.5}, "num_classes": 1000}
    opened = open_network(understood({"model": perceiver_file["model"], "arch": arch, "args": {}}, "x.pth"))
    assert opened.arch == arch and torch.equal(opened.network.latent, perceiver_file["model"]["latent"])


def test_what_is_given_must_agree_with_the_file(perceiver_file):
    for wrong in ({"depth_factor": [1, 1, 1, 1]}, {"name": "msdnet"}):
        with pytest.raises(ValueError, match="x.pth holds another network than --model and its options say"):
            open_perceiver(perceiver_file, **wrong)
    with pytest.raises(ValueError, match="x.pth has 1000 classes, the data set 3"):
        open_perceiver(perceiver_file, num_classes=3)


def test_a_file_without_a_moving_average(perceiver_file):
    content = {key: value for key, value in perceiver_file.items() if key != "model_ema"}
    assert open_perceiver(content).weights == "weights"
    with pytest.raises(ValueError, match="x.pth has no EMA weights"):
        open_perceiver(content, "ema")


def test_a_file_that_names_no_network_needs_one(perceiver_file):
    import argparse

    content = perceiver_file | {"args": argparse.Namespace(model="convnext_tiny")}
    with pytest.raises(
        ValueError, match="x.pth does not name a network known here: give --model and its options"
    ):
        open_perceiver(content)
    options = {"depth_factor": [1, 1, 1, 2], "SA_widening_factor": 2, "with_isc": False}
    assert open_perceiver(content, name=PERCEIVER, **options).arch == {
        "name": PERCEIVER,
        "options": options | {"input_size": 224},
        "num_classes": 1000,
    }


@pytest.mark.parametrize("layout", ["msdnet", "l2w", "bare"])
def test_published_layouts_of_msdnet_and_l2w(tmp_path, layout):
    network = create_model("msdnet", 5, **SMALL)
    wrapped = OrderedDict((f"module.{key}", value) for key, value in network.state_dict().items())
    content = {
        "msdnet": {"state_dict": wrapped, "arch": "msdnet", "best_prec1": 0.5, "epoch": 3},
        "l2w": {"state_dict": wrapped, "meta_state_dict": {}, "epoch": 4},
        "bare": wrapped,
    }[layout]
    save(tmp_path / "x.pth", content)
    opened = open_network(tmp_path / "x.pth", name="msdnet", options=SMALL)
    assert opened.arch == NETWORK
    same_answers(opened.network, network)


@pytest.mark.parametrize(
    ("name", "args", "interpolation"),
    [
        ("msdnet", None, "bilinear"),  # MSDNet's and L2W's files
        ("ranet", None, "bilinear"),
        ("cifar_resnet", None, "bicubic"),
        ("msdnet", {"seed": 0}, "bicubic"),  # ours, from before there was a choice
        ("msdnet", {"interpolation": "bilinear"}, "bilinear"),
        ("cifar_resnet", {"interpolation": "bilinear"}, "bilinear"),
    ],
)
def test_images_are_resized_as_the_network_was_evaluated(small_options, name, args, interpolation):
    content = {"state_dict": create_model(name, 5, **small_options[name]).state_dict(), "args": args}
    opened = open_network(understood(content, "x.pth"), name=name, options=small_options[name])
    assert opened.view.interpolation == opened.recipe.view.interpolation == interpolation
    given = View(48, *STATS.values(), interpolation="bilinear")
    opened = open_network(understood(content, "x.pth"), name=name, options=small_options[name], view=given)
    image = Image.linear_gradient("L").resize((90, 60), Image.Resampling.BOX)
    wanted = (TF.to_tensor(image.resize((81, 54), Image.Resampling.BILINEAR).convert("RGB")) - 0.1) / 0.4
    torch.testing.assert_close(opened.transform(image)[0, 0], wanted[0, 3:51, 16:64], rtol=0, atol=1e-6)


def test_ebjrs_published_student():
    path = DATA / "ebjr" / "original_cifar10_densenet-bc-52-6_model_best.pth.tar"
    if not path.exists():
        pytest.skip(f"published checkpoints not found in {DATA}")
    opened = open_network(path, name="cifar_densenet_52_6")
    assert opened.arch["num_classes"] == 10
    assert opened.view.size == 32 and opened.view.std == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_bare_state_dict_of_timm(tmp_path, prefix):
    theirs = timm.create_model("test_resnet", num_classes=3)
    save(tmp_path / "x.pth", {prefix + key: value for key, value in theirs.state_dict().items()})
    opened = open_network(tmp_path / "x.pth", name="timm/test_resnet")
    assert opened.arch["num_classes"] == 3
    same_answers(opened.network, theirs, 64)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_state_dict_of_exits_on_a_timm_network(tmp_path, prefix):
    options = {"backbone": "test_resnet", "exits": 2}
    network = create_model("timm_ee", 3, **options)
    save(tmp_path / "x.pth", {prefix + key: value for key, value in network.state_dict().items()})
    same_answers(open_network(tmp_path / "x.pth", name="timm_ee", options=options).network, network, 64)


@pytest.mark.parametrize("prefix", ["", "backbone.", "net."])
def test_a_timm_network_starts_exits_with_and_without_the_prefix(tmp_path, prefix):
    theirs = timm.create_model("test_resnet", num_classes=7)
    save(tmp_path / "x.pth", {prefix + key: value for key, value in theirs.state_dict().items()})
    network = create_model("timm_ee", 3, backbone="test_resnet", exits=2)
    fit = fit_to(network, read_weights(Start(finetune=str(tmp_path / "x.pth")), network))
    assert fit.renewed == ["exits"]
    assert torch.equal(fit.weights["backbone.conv1.0.weight"], theirs.state_dict()["conv1.0.weight"])
    with pytest.raises(
        ValueError, match="does not fit the model: .* missing .exits.0"
    ):  # its exits are not in it
        open_network(tmp_path / "x.pth", name="timm_ee", options={"backbone": "test_resnet", "exits": 2})


def test_weights_of_torchvision(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=4)
    save(tmp_path / "x.pth", theirs.state_dict())
    opened = open_network(tmp_path / "x.pth", name="timm/resnet18")
    assert opened.arch["num_classes"] == 4
    same_answers(opened.network, theirs, 64)


def test_safetensors(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=3)
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    same_answers(open_network(tmp_path / "x.safetensors", name="timm/test_resnet").network, theirs, 64)
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="y.safetensors is truncated or not a checkpoint"):
        open_network(tmp_path / "y.safetensors", name="timm/test_resnet")


@pytest.mark.parametrize("words", [False, True])
def test_a_cascade_also_of_the_time_when_its_networks_were_words(tmp_path, words):
    networks = [{"name": "cifar_resnet", "options": {"depth": depth}} for depth in (8, 14)]
    cascade = create_model("ebjr", 5, networks=networks)
    if words:
        networks = [f"cifar_resnet:depth={depth}" for depth in (8, 14)]
    arch = {"name": "ebjr", "options": {"networks": networks}, "num_classes": 5}
    save(tmp_path / "cascade.pth", {"model": cascade.state_dict(), "arch": arch, "epoch": "cascade"})
    opened = open_network(tmp_path / "cascade.pth")
    same_answers(opened.network, cascade)
    assert all(isinstance(network, dict) for network in opened.arch["options"]["networks"])


def test_a_recipe_gives_the_network_that_it_would_train(tmp_path):
    network = create_model("msdnet", 5, **SMALL)
    save(tmp_path / "x.pth", network.state_dict())
    start = Start(finetune=str(tmp_path / "x.pth"))
    opened = open_network(Recipe(network=Network("msdnet"), start=start, options=SMALL), num_classes=5)
    assert opened.arch == NETWORK and opened.held_out is None
    same_answers(opened.network, network)


# What is told to a network, teachers, fine-tuning


def test_a_network_that_depends_on_the_side_is_told_it():
    view = View(96, *STATS.values())
    assert architecture(PERCEIVER, {"with_isc": True}, 10, view)["options"] == {
        "with_isc": True,
        "input_size": 96,
    }
    assert architecture("msdnet", {"nBlocks": 3}, 10, view)["options"] == {"nBlocks": 3}
    timms = architecture("timm/resnet18", {"pretrained": True, "drop_rate": 0.1}, 10, view)
    assert timms["options"] == {"drop_rate": 0.1}
    cascade = architecture("ebjr", {"networks": ["cifar_resnet:depth=8", "cifar_resnet"]}, 10, view)[
        "options"
    ]
    assert cascade["mean"] == [0.1, 0.2, 0.3]
    assert cascade["networks"][0] == {"name": "cifar_resnet", "options": {"depth": 8}}


def written(folder, content):
    save(folder / "x.pth", content)
    return folder / "x.pth"


def test_a_teacher_is_the_average_of_a_checkpoint_and_does_not_learn(tmp_path):
    network, average = (create_model("msdnet", 5, **SMALL) for _ in range(2))
    content = {"model": network.state_dict(), "model_ema": average.state_dict(), "arch": NETWORK}
    view, args = View(32, *STATS.values()), {key: list(value) for key, value in STATS.items()}
    for stored in ({}, {"args": args}):
        teacher = open_teacher(written(tmp_path, content | stored), 5, view, "cpu")
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(teacher(images), average.eval()(images), rtol=0, atol=0)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    path = written(tmp_path, content | {"args": args | {"std": [0.4, 0.5, 0.7]}})
    with pytest.raises(
        ValueError, match=r"x.pth reads images of --std \[0.4, 0.5, 0.7\], this run has \[0.4, 0.5, 0.6\]"
    ):
        open_teacher(path, 5, view, "cpu")
    with pytest.raises(ValueError, match="x.pth has 5 classes, the data set 4"):
        open_teacher(written(tmp_path, content), 4, view, "cpu")
    with pytest.raises(ValueError, match="x.pth does not name a network known here"):
        open_teacher(written(tmp_path, {"model": network.state_dict()}), 5, view, "cpu")


def test_fine_tuning_takes_the_weights_that_are_named(tmp_path):
    source = create_model("msdnet", 100, **SMALL)
    average = OrderedDict((f"module.{key}", value + 1) for key, value in source.state_dict().items())
    save(tmp_path / "x.pth", {"model": source.state_dict(), "model_ema": average})
    network = create_model("msdnet", 5, **SMALL)
    start = Start(finetune=str(tmp_path / "x.pth"), model_key="model_ema")
    before = copy.deepcopy(network.state_dict())
    fit = fit_to(network, read_weights(start, network))
    heads = [name for name in before if "linear" in name]
    kept = len(before) - len(heads)
    line = (
        f"fine-tuning x.pth: {kept} entries kept; initialised anew: classifier.0.linear, classifier.1.linear"
    )
    assert fit.line("x.pth") == line
    assert all(torch.equal(fit.weights[name], before[name]) for name in heads)
    trunk = next(name for name in before if name not in heads)
    assert torch.equal(fit.weights[trunk], source.state_dict()[trunk] + 1)
    named = read_weights(Start(finetune=str(tmp_path / "x.pth"), model_prefix="a."), network)
    assert all(re.match(r"a\.", key) for key in named)


def test_a_published_file_without_imagenets_statistics_is_seen_so():
    network = create_model("msdnet", 5, **SMALL)
    content = {
        "model": network.state_dict(),
        "arch": NETWORK,
        "args": {"imagenet_default_mean_and_std": False},
    }
    opened = open_network(understood(content, "x.pth"))
    assert opened.view.mean == opened.view.std == (0.5, 0.5, 0.5)


def test_the_recipe_of_a_checkpoint_is_the_one_that_trained_it():
    network = create_model("msdnet", 5, **SMALL)
    args = {"model": "msdnet", "lr": 0.25, "epochs": 7, "data_set": "DIGITS"}
    content = {"model": network.state_dict(), "arch": NETWORK, "args": args}
    recipe = open_network(understood(content, "x.pth")).recipe
    assert (recipe.network.model, recipe.optimization.lr, recipe.options) == ("msdnet", 0.25, SMALL)
    assert "--lr 0.25" in recipe.command() and "--nBlocks 2" in recipe.command()


@pytest.mark.parametrize("names", [["a"], None])
def test_names_of_classes_that_do_not_fit_are_numbers(names):
    network = create_model("msdnet", 5, **SMALL)
    content = {"model": network.state_dict(), "arch": NETWORK, "class_names": names}
    assert open_network(understood(content, "x.pth")).class_names == ("0", "1", "2", "3", "4")


def test_an_l2w_file_without_an_epoch_is_evaluated():
    network = create_model("msdnet", 5, **SMALL)
    stored = understood({"state_dict": network.state_dict(), "meta_state_dict": {}}, "x.pth")
    same_answers(open_network(stored, name="msdnet", options=SMALL).network, network)
