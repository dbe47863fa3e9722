import argparse
import copy
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from models import create_model
from training.augment import Augment
from training.checkpoint import load, load_weights, save
from training.flags import Flag
from training.foreign import (
    architecture,
    check_same_run,
    fine_tune,
    fit_to,
    load_network,
    load_teacher,
    resume_update,
    resume_weighting,
    resume_weights,
    stored_arch,
    stored_flags,
    weights_of,
)
from training.l2w import SampleWeighting, Weighting
from training.optim import Update, make_optimizer

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
WRAPPED = {"module." + key: value for key, value in WEIGHTS.items()}
PERCEIVER = "mobilenetV3_0x5_perceiver_t128"
FLAGS = [
    Flag("data_set", str, "DIGITS"),
    Flag("data_path", str, None),
    Flag("input_size", int, None, low=1),
    Flag("crop_pct", float, None),
    Flag("mean", float, None, many=True),
    Flag("imagenet_default_mean_and_std", bool, True),
]


def written(tmp_path, content):
    save(tmp_path / "x.pth", content)
    return tmp_path / "x.pth"


def read_weights(path, **options):
    return weights_of(load(path), path, **options)


def namespace(**changes):
    """What Dyn-Perceiver's script stored, in part."""
    flags = {
        "model": PERCEIVER,
        "drop_path": 0.3,
        "dropout": 0.0,
        "input_size": 64,
        "num_latent_channels": None,
        "SA_widening_factor": 2,
        "num_SA_heads": None,
        "depth_factor": [1, 1, 1, 2],
        "spatial_reduction": True,
        "with_isc": False,
        "data_path": "/home/somebody/ImageNet",
        "data_set": "IMNET",
        "nb_classes": 1000,
        "crop_pct": None,
        "imagenet_default_mean_and_std": True,
        "lr": 1e-3,
    }
    return argparse.Namespace(**flags | changes)


@pytest.fixture
def published():
    folder = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "ebjr"
    if not folder.is_dir():
        pytest.skip(f"published checkpoints not found in {folder}")
    return folder


@pytest.mark.parametrize(
    "content",
    [
        {"model": WEIGHTS, "epoch": 3, "args": argparse.Namespace(model="x")},
        {"state_dict": WRAPPED, "arch": "msdnet", "best_prec1": 0.5},
        {"state_dict_ema": WEIGHTS},
        WEIGHTS,
        WRAPPED,
    ],
)
def test_weights_are_found_in_every_layout(tmp_path, content):
    path = written(tmp_path, content)
    weights = read_weights(path)
    assert list(weights) == ["fc.weight", "fc.bias"]
    assert torch.equal(weights["fc.weight"], torch.ones(2, 3))
    assert stored_arch(load(path), path) is None


def test_model_key_chooses_in_order(tmp_path):
    other = {"fc.weight": torch.zeros(1)}
    path = written(tmp_path, {"model": WEIGHTS, "teacher": other})
    assert list(read_weights(path, model_key="student|teacher|model")) == ["fc.weight"]


def test_ema_weights_are_read_on_request(tmp_path):
    ema = {"module.fc.weight": torch.full((2, 3), 5.0)}
    path = written(tmp_path, {"model": WEIGHTS, "model_ema": ema})
    assert read_weights(path, ema=True)["fc.weight"][0, 0] == 5
    assert read_weights(path, model_key="model_ema")["fc.weight"][0, 0] == 5


@pytest.mark.parametrize("content", [{"model": WEIGHTS}, {"model": WEIGHTS, "model_ema": None}])
def test_missing_ema_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match=r"x.pth has no EMA weights"):
        read_weights(written(tmp_path, content), ema=True)


def test_prefix_of_some_keys_only_is_part_of_the_name(tmp_path):
    mixed = {"module.fc.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert list(read_weights(written(tmp_path, mixed))) == list(mixed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": {}}, "no weights under model.*state_dict; it holds epoch, optimizer"),
        ({}, "it holds nothing"),
        ({"model": {}}, "no weights"),
        ([1], "instead of a dict"),
    ],
)
def test_a_file_without_weights_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_weights(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_published_original_loads(published):
    weights = read_weights(published / "original_cifar10_densenet-bc-52-6_model_best.pth.tar")
    assert "conv1.weight" in weights
    assert not any(key.startswith("module.") for key in weights)


def test_published_original_with_a_numpy_scalar_is_refused(published):
    name = "original_cifar10_densenet-bc-52-6_checkpoint.pth.tar"
    with pytest.raises(
        ValueError, match=f"{name} is refused: it holds numpy.core.multiarray.scalar;"
    ) as error:
        read_weights(published / name)
    assert "\n" not in str(error.value)


# What a file says of its run


def test_our_architecture_is_returned():
    arch = {"name": "msdnet", "options": {}, "num_classes": 10}
    assert stored_arch({"model": WEIGHTS, "arch": arch}, "x.pth") == arch


def test_published_flags_name_the_architecture():
    options = {
        "input_size": 64,
        "SA_widening_factor": 2,
        "depth_factor": [1, 1, 1, 2],
        "spatial_reduction": True,
        "with_isc": False,
        "dropout": 0.0,
    }
    assert stored_arch({"args": namespace()}, "x.pth") == {
        "name": PERCEIVER,
        "options": options,
        "num_classes": 1000,
    }


@pytest.mark.parametrize("name", ["convnext_tiny", None, torch.ones(3), ["reg800m"], "timm/resnet18"])
def test_a_published_name_that_is_not_ours_names_nothing(name):
    assert stored_arch({"args": namespace(model=name)}, "x.pth") is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth_factor": "1112x"}, "depth_factor: 'x' is not of type int"),
        ({"depth_factor": 2}, "depth_factor: 'int' object is not iterable"),
        ({"SA_widening_factor": torch.ones(3)}, "SA_widening_factor: 'tensor.* is not of type int"),
        ({"with_isc": {"a": 1}}, "with_isc: .* is not true or false"),
    ],
)
def test_strange_flags_are_refused_in_one_line(changes, complaint):
    with pytest.raises(
        ValueError, match=f"^checkpoint x.pth was trained with a strange --{complaint}"
    ) as error:
        stored_arch({"args": namespace(**changes)}, "x.pth")
    assert "\n" not in str(error.value)


def test_a_folder_of_another_machine_is_not_taken():
    assert stored_flags({"args": namespace(crop_pct=0.9)}, FLAGS, "x.pth") == {
        "data_set": "IMNET",
        "input_size": 64,
        "crop_pct": 0.9,
        "imagenet_default_mean_and_std": True,
    }
    ours = {"data_path": "images", "mean": (0.1, 0.2), "crop_pct": None, "epochs": 3}
    assert stored_flags({"args": ours}, FLAGS, "x.pth") == {
        "data_path": "images",
        "mean": [0.1, 0.2],
        "crop_pct": None,
    }
    assert stored_flags({"args": "none"}, FLAGS, "x.pth") == stored_flags({}, FLAGS, "x.pth") == {}


def test_a_network_that_depends_on_the_side_is_told_it():
    assert architecture(PERCEIVER, {"with_isc": True}, 10, 96)["options"] == {
        "with_isc": True,
        "input_size": 96,
    }
    assert architecture("msdnet", {"nBlocks": 3}, 10, 96)["options"] == {"nBlocks": 3}
    assert architecture("timm/resnet18", {"pretrained": True, "drop_rate": 0.1}, 10, 96)["options"] == {
        "drop_rate": 0.1
    }


# Networks to evaluate


@pytest.fixture(scope="module")
def perceiver_file():
    """The content of a published file; in the moving average everything is half as large."""
    torch.manual_seed(0)
    arch = stored_arch({"args": namespace()}, "x.pth")
    weights = create_model(PERCEIVER, **arch["options"]).state_dict()
    average = {key: value / 2 if value.is_floating_point() else value for key, value in weights.items()}
    return {"model": weights, "model_ema": average, "epoch": "best", "args": namespace()}


def load_perceiver(content, weights="auto", name="", num_classes=1000, **options):
    return load_network(
        content, "x.pth", weights, name=name, options=options, num_classes=num_classes, input_size=224
    )


@pytest.mark.parametrize(
    ("weights", "key"), [("auto", "model_ema"), ("ema", "model_ema"), ("model", "model")]
)
def test_a_published_network_is_built_from_its_flags(perceiver_file, weights, key):
    model, arch, which = load_perceiver(
        perceiver_file, weights, PERCEIVER, depth_factor=[1, 1, 1, 2], drop_path=0.1
    )
    assert torch.equal(model.latent, perceiver_file[key]["latent"]) and not model.training
    assert arch["options"]["input_size"] == 64  # as stored, whatever the images of the evaluation
    assert which == {"model_ema": "moving average of the weights", "model": "weights"}[key]


def test_what_is_given_must_agree_with_the_file(perceiver_file):
    for wrong in ({"depth_factor": [1, 1, 1, 1]}, {"name": "msdnet"}):
        with pytest.raises(ValueError, match="x.pth holds another network than --model and its options say"):
            load_perceiver(perceiver_file, **wrong)
    with pytest.raises(ValueError, match="x.pth has 1000 classes, the data set 3"):
        load_perceiver(perceiver_file, num_classes=3)


def test_a_file_without_a_moving_average(perceiver_file):
    content = {key: value for key, value in perceiver_file.items() if key != "model_ema"}
    assert load_perceiver(content)[2] == "weights"
    with pytest.raises(ValueError, match="x.pth has no EMA weights"):
        load_perceiver(content, "ema")


def test_a_file_that_names_no_network_needs_one(perceiver_file):
    content = perceiver_file | {"args": namespace(model="convnext_tiny")}
    with pytest.raises(
        ValueError, match="x.pth does not name a network known here: give --model and its options"
    ):
        load_perceiver(content)
    options = {"depth_factor": [1, 1, 1, 2], "SA_widening_factor": 2, "with_isc": False}
    assert load_perceiver(content, name=PERCEIVER, **options)[1] == {
        "name": PERCEIVER,
        "options": options | {"input_size": 224},
        "num_classes": 1000,
    }


# Going on


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": "best"}, "its epoch is 'best'"),
        ({"epoch": "best-ema", "optimizer": {}}, "its epoch is 'best-ema'"),
        ({"optimizer": {}}, "it does not hold both epoch and optimizer"),
        ({"epoch": 3}, "it does not hold both epoch and optimizer"),
    ],
)
def test_a_file_to_evaluate_only_is_not_resumed(content, reason):
    line = rf"^checkpoint x.pth can be evaluated or fine-tuned \(--finetune\) but not resumed: {reason}$"
    with pytest.raises(ValueError, match=line):
        resume_weights(nn.Linear(3, 2), {}, {"model": WEIGHTS, **content}, "x.pth")


def test_rates_may_change_on_resuming_but_not_the_network(perceiver_file):
    content = perceiver_file | {"epoch": 3, "optimizer": {}}
    options = {"depth_factor": (1, 1, 1, 2), "SA_widening_factor": 2, "with_isc": False, "input_size": 64}
    arch = {"name": PERCEIVER, "options": options | {"drop_path": 0.0, "dropout": 0.5}, "num_classes": 1000}
    model = create_model(PERCEIVER, **arch["options"])
    resume_weights(model, arch, content, "x.pth")
    assert torch.equal(model.latent, perceiver_file["model"]["latent"])
    with pytest.raises(ValueError, match="x.pth holds another architecture: with_isc is False, wanted True"):
        resume_weights(model, arch | {"options": options | {"with_isc": True}}, content, "x.pth")


def toy_update(model, filter_bias_and_bn=True):
    options = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "eps": 1e-8, "betas": None}
    optimizer = make_optimizer(model, filter_bias_and_bn=filter_bias_and_bn, **options)
    rates = {"lr": lambda step: 0.1, "weight_decay": lambda step: 0.3}
    return Update(model, optimizer, **rates, ema=ModelEmaV3(model, decay=0.9))


def test_a_published_optimizer_goes_on_as_if_not_interrupted():
    torch.manual_seed(0)
    images = torch.randn(6, 4, 3)
    model = nn.Linear(3, 2)
    update = toy_update(model)
    for batch in images[:4]:
        update(model(batch).square().mean())
    state = copy.deepcopy(update.state_dict())
    for group in state["optimizer"]["param_groups"]:
        for name in group.keys() - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params", "lr_scale"}:
            del group[name]  # not there in the torch and the script of the time
    content = {
        "optimizer": state["optimizer"],
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "epoch": 1,
    }

    later = copy.deepcopy(model)
    later_update = toy_update(later)
    assert resume_update(later_update, content, "x.pth", steps=2) == 2
    assert later_update.step == 4
    assert torch.equal(
        later_update.ema.module.weight, later.weight
    )  # the file has no average: it starts here
    for batch in images[4:]:
        update(model(batch).square().mean())
        later_update(later(batch).square().mean())
    torch.testing.assert_close(later.weight, model.weight)
    torch.testing.assert_close(later.bias, model.bias)

    average = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    resume_update(later_update, content | {"model_ema": average}, "x.pth", steps=2)
    assert torch.equal(later_update.ema.module.weight, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (
            toy_update(nn.Linear(3, 2), filter_bias_and_bn=False).state_dict()["optimizer"],
            "different number of param",
        ),
        (
            toy_update(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))).state_dict()["optimizer"],
            "doesn't match the",
        ),
        ({}, "'param_groups'"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_in_one_line(optimizer, reason):
    complaint = f"^the optimizer of checkpoint x.pth does not fit the one of this run: .*{reason}"
    with pytest.raises(ValueError, match=complaint) as error:
        resume_update(toy_update(nn.Linear(3, 2)), {"optimizer": optimizer, "epoch": 3}, "x.pth", steps=2)
    assert "\n" not in str(error.value)


def test_a_run_of_other_steps_goes_on_at_the_same_epoch():
    content = toy_update(nn.Linear(3, 2)).state_dict() | {"epoch": 4, "step": 123}
    update = toy_update(nn.Linear(3, 2))
    assert resume_update(update, content, "x.pth", steps=7) == 5
    assert update.step == 5 * 7
    # L2W's program counts epochs that are done.
    published = content | {"meta_state_dict": {}, "meta_optimizer": {}}
    assert resume_update(update, published, "x.pth", steps=7) == 4
    assert update.step == 4 * 7


def test_a_run_keeps_its_images_its_seed_and_its_optimizer():
    given = {"data_set": "DIGITS", "num_calib": None, "seed": 3, "opt": "sgd"}
    flags = [
        Flag("data_set", str, ""),
        Flag("num_calib", int, None),
        Flag("seed", int, 0),
        Flag("opt", str, "adamw"),
    ]
    check_same_run(given, {}, None, flags)
    check_same_run(given, {"args": {"seed": 3, "lr": 7}}, "x.pth", flags)  # an old file without the others
    check_same_run(given, {"args": dict(given)}, "x.pth", flags)
    for name, other in (("data_set", "CIFAR10"), ("num_calib", 5), ("seed", 0), ("opt", "adamw")):
        with pytest.raises(ValueError, match=f"^--{name} {given[name]}, but x.pth was trained with {other}$"):
            check_same_run(given, {"args": given | {name: other}}, "x.pth", flags)


# The weight net and the teacher


def weighting(seed, num_exits=2):
    """A weight net that has taken a step, on 5 batches an epoch."""
    torch.manual_seed(seed)
    shape = {"proportions": torch.full((num_exits,), 1 / num_exits), "exit_weights": [1.0] * num_exits}
    options = Weighting(meta_net_hidden_size=3)
    objective = SampleWeighting(options, toy_update(nn.Linear(3, 2)), batches=5, epochs=3, **shape)
    for p in objective.weight_net.parameters():
        p.grad = torch.randn_like(p)
    objective.optimizer.step()
    objective.batch = 99
    return objective


def weight_net_of(objective):
    """Its weights, and what its optimizer remembers."""
    return objective.state_dict()["weight_net"], objective.state_dict()["optimizer"]["state"]


@pytest.mark.parametrize("published", [False, True])
def test_a_weight_net_goes_on(tmp_path, published):
    there, here = weighting(0), weighting(1)
    state = there.state_dict()
    content = {"l2w": state}
    if published:
        content = {"meta_state_dict": state["weight_net"], "meta_optimizer": state["optimizer"]}
    assert resume_weighting(here, load(written(tmp_path, content)), "x.pth", 2) == ""
    torch.testing.assert_close(weight_net_of(here), weight_net_of(there), rtol=0, atol=0)
    assert here.batch == 2 * 5


@pytest.mark.parametrize("content", [{}, {"l2w": None}])
def test_a_weight_net_starts_anew_where_a_file_has_none(content):
    objective = weighting(0)
    before = copy.deepcopy(weight_net_of(objective))
    line = resume_weighting(objective, content, "x.pth", 2)
    assert line == "checkpoint x.pth holds no weight net: it starts anew" and objective.batch == 10
    torch.testing.assert_close(weight_net_of(objective), before, rtol=0, atol=0)
    assert resume_weighting(objective, {}, None, 2) == ""  # a run that starts at a later epoch


def test_a_weight_net_that_does_not_fit_is_refused_in_one_line():
    other, state = weighting(0, num_exits=3).state_dict(), weighting(0).state_dict()
    bare = {"state": {}, "param_groups": []}
    complaints = {
        "size mismatch for output_layer.bias: ": {"l2w": other},
        "'meta_optimizer'": {"meta_state_dict": state["weight_net"]},
        "loaded state dict has a different number of parameter groups": {"l2w": state | {"optimizer": bare}},
    }
    for complaint, content in complaints.items():
        with pytest.raises(
            ValueError, match=f"^the weight net of checkpoint x.pth does not fit this run's: {complaint}"
        ) as error:
            resume_weighting(weighting(1), content, "x.pth", 1)
        assert "\n" not in str(error.value)


def test_a_teacher_is_the_average_of_a_checkpoint_and_does_not_learn(tmp_path):
    options = {"nBlocks": 2, "nChannels": 4, "growthRate": 4}
    network, average = (create_model("msdnet", 5, **options) for _ in range(2))
    arch = {"name": "msdnet", "options": options, "num_classes": 5}
    content = {"model": network.state_dict(), "model_ema": average.state_dict(), "arch": arch}
    augment = Augment(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    args = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for stored in ({}, {"args": args}):
        teacher = load_teacher(written(tmp_path, content | stored), 5, augment)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(teacher(images), average.eval()(images), rtol=0, atol=0)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    path = written(tmp_path, content | {"args": args | {"std": [0.4, 0.5, 0.7]}})
    with pytest.raises(
        ValueError, match=r"x.pth reads images of --std \[0.4, 0.5, 0.7\], this run has \[0.4, 0.5, 0.6\]"
    ):
        load_teacher(path, 5, augment)
    with pytest.raises(ValueError, match="x.pth has 5 classes, the data set 4"):
        load_teacher(written(tmp_path, content), 4, augment)
    with pytest.raises(ValueError, match="x.pth does not name a network known here"):
        load_teacher(written(tmp_path, {"model": network.state_dict()}), 5, augment)


# Fine-tuning


def heads(classes, width=4):
    """A trunk, an exit, a connection of it to a second exit, and a learned array beside them."""
    model = nn.Module()
    model.token = nn.Parameter(torch.randn(width))
    model.trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.head = nn.Linear(4, classes)
    model.isc = nn.Sequential(nn.Linear(classes, 4), nn.BatchNorm1d(4), nn.ReLU())
    model.last = nn.ModuleDict(
        {"norm": nn.LayerNorm(4), "classify": nn.Sequential(nn.Sequential(nn.Linear(4, classes)))}
    )
    return model


def trained_heads(classes, **options):
    """The same after its batch norms saw images."""
    model = heads(classes, **options)
    for norm in (model.trunk[1], model.isc[1]):
        norm.running_mean.fill_(3.0)
    return model


def test_fit_to_renews_heads_whole_and_takes_the_rest():
    source, model = trained_heads(100), heads(10)
    fit = fit_to(model, source.state_dict())
    assert fit.renewed == ["head", "isc", "last.classify"]
    assert len(fit.kept) == 1 + 7 + 2 and fit.unused == []
    initial = copy.deepcopy(model)
    load_weights(model, fit.weights, "x.pth")
    assert torch.equal(model.trunk[0].weight, source.trunk[0].weight) and torch.equal(
        model.token, source.token
    )
    assert torch.equal(model.head.weight, initial.head.weight)
    # The connection's batch norm fits by its shape, but its statistics are of another layer's output.
    assert model.isc[1].running_mean.eq(0).all() and model.trunk[1].running_mean.eq(3).all()


def test_fit_to_renews_a_tensor_beside_modules_alone():
    fit = fit_to(heads(10, width=6), heads(10).state_dict())
    assert fit.renewed == ["token"] and len(fit.kept) == len(fit.weights) - 1


def test_fit_to_renews_new_layers_and_lists_old_ones():
    weights = {key.replace("head.", "old."): value for key, value in heads(10).state_dict().items()}
    fit = fit_to(heads(10), weights)
    assert fit.renewed == ["head"] and fit.unused == ["old.weight", "old.bias"]
    # Only the modules next to a new one in a list keep their values: it is named as a whole.
    model = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.LayerNorm(3)}) for _ in range(2)])
    assert fit_to(model, model[:1].state_dict()).renewed == ["1"]


def test_fit_to_does_without_batch_counters():
    source, model = trained_heads(10), heads(10)
    weights = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    fit = fit_to(model, weights)
    assert fit.renewed == [] and len(fit.kept) == len(weights)
    load_weights(model, fit.weights, "x.pth")
    assert model.isc[1].running_mean.eq(3).all()


def test_fit_to_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="none of the 2 given weights fits any of the model's 2"):
        fit_to(nn.Linear(3, 4), WEIGHTS)


def test_fine_tuning_says_what_it_took(tmp_path):
    source = trained_heads(100)
    average = OrderedDict((f"module.{key}", value + 1) for key, value in source.state_dict().items())
    save(tmp_path / "x.pth", {"model": {"net." + k: v for k, v in WEIGHTS.items()}, "model_ema": average})
    keys = {"model_key": "model_ema", "model_prefix": ""}
    model = heads(10)
    line = fine_tune(model, tmp_path / "x.pth", **keys)
    assert (
        line
        == f"fine-tuning {tmp_path / 'x.pth'}: 10 entries kept; initialised anew: head, isc, last.classify"
    )
    assert torch.equal(model.token, source.token + 1)
    save(
        tmp_path / "y.pth",
        {k.removeprefix("trunk."): v for k, v in source.trunk.state_dict().items()} | average,
    )
    line = fine_tune(heads(10), tmp_path / "y.pth", model_key="model", model_prefix="trunk.")
    assert line.endswith(
        "7 entries kept; initialised anew: token, head, isc, last; 21 unused: "
        "trunk.module.token, trunk.module.trunk.0.weight, trunk.module.trunk.0.bias, ..."
    )


@pytest.mark.parametrize(("backbone", "first"), [("mobilenetV3_0x5", []), ("resnet18", ["classifier_cnn"])])
def test_all_heads_and_connections_of_a_perceiver_are_renewed(backbone, first):
    with torch.device("meta"):
        source, model = (create_model(f"{backbone}_perceiver_t128", classes) for classes in (1000, 3))
    others = ["classifier_att", "isc4", "classifier_cnn", "classifier_merge"]
    fit = fit_to(model, source.state_dict())
    assert fit.renewed == [
        *first,
        "early_classifier3",
        "isc3",
        *(name for name in others if name not in first),
    ]
    assert len(fit.kept) == sum(not key.startswith(tuple(fit.renewed)) for key in model.state_dict())


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_a_published_optimizer_state_follows_its_weights_into_other_groups(decay_embeddings):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.latent, model.embeddings = nn.Parameter(torch.randn(4, 2)), ("latent",)
    options = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "eps": 1e-8, "betas": None}
    old = make_optimizer(model, filter_bias_and_bn=True, decay_embeddings=True, **options)
    (model.weight.sum() + 2 * model.bias.sum() + 3 * model.latent.sum()).backward()
    old.step()
    new = make_optimizer(model, filter_bias_and_bn=True, decay_embeddings=decay_embeddings, **options)
    update = Update(model, new, lr=lambda step: 0.1, weight_decay=lambda step: 0.3)
    content = {"optimizer": old.state_dict(), "epoch": 0, "args": argparse.Namespace(model="x")}
    resume_update(update, content, "x.pth", steps=1)
    for scale, parameter in ((1, model.weight), (2, model.bias), (3, model.latent)):
        torch.testing.assert_close(new.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1 * scale))
    assert sorted(len(group["params"]) for group in new.param_groups) == [1, 2]
    assert [g["weight_decay"] for g in new.param_groups if any(p is model.latent for p in g["params"])] == [
        0.3 * decay_embeddings
    ]
