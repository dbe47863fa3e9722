"""EBJR's model zoo: sizes, options, and the published student on real images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive.flops import count
from experiment.published import read
from models import create_model

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of EBJR's networks


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, 10, **options)


@pytest.mark.parametrize(
    ("name", "classes", "params", "operations"),
    [
        ("cifar_densenet_52_6", 10, 68_704, 27_377_392),
        ("cifar_densenet_64_12", 10, 368_122, 146_190_202),
        ("cifar_densenet_58_6", 100, 90_271, 32_140_936),
        ("cifar_densenet_88_8", 100, 298_900, 107_000_964),
    ],
)
def test_published_pairs_have_their_sizes_and_the_published_counters_costs(name, classes, params, operations):
    with torch.device("meta"):
        net = create_model(name, classes)
    assert sum(p.numel() for p in net.parameters()) == params
    assert count(net, (3, 32, 32)).papers == [operations]


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("cifar_preresnet", {"depth": 20}, ["bn.weight", "layer2.0.downsample.0.weight"]),
        (
            "cifar_resnet",
            {"depth": 29, "block_name": "Bottleneck"},
            ["layer1.0.bn3.weight", "layer1.0.downsample.1.bias"],
        ),
        (
            "cifar_wrn",
            {"depth": 16, "widen_factor": 2},
            ["block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.bias"],
        ),
        (
            "cifar_resnext",
            {"depth": 29},
            ["stage_2.stage_2_bottleneck_0.shortcut.shortcut_bn.weight", "classifier.bias"],
        ),
        ("cifar_alexnet", {}, ["features.0.bias", "features.10.weight", "classifier.weight"]),
        ("cifar_vgg19", {}, ["features.34.weight", "classifier.weight"]),
    ],
)
def test_weights_have_the_published_names(name, options, keys):
    assert set(keys) <= on_meta(name, **options).state_dict().keys()


def test_shortcuts_read_what_they_did_in_the_published_networks():
    state = on_meta("cifar_preresnet", depth=20).state_dict()
    assert "layer2.0.downsample.1.weight" not in state and "layer1.0.downsample.0.weight" not in state
    wide = on_meta("cifar_wrn", depth=16, widen_factor=1)
    assert wide.block1.layer[0].convShortcut is None and wide.block2.layer[0].convShortcut.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_densenet", {"depth": 53}, "depth is 53; DenseNet-BC accepts 6n . 4, as in 46, 52, 58"),
        ("cifar_resnet", {"depth": 29}, "depth is 29; BasicBlock accepts 6n . 2"),
        ("cifar_resnet", {"block_name": "Basic"}, "block_name is 'Basic'; accepted: BasicBlock, Bottleneck"),
        ("cifar_resnext", {"widen_factor": 2}, "widen_factor is 2; accepted: 4"),
        ("cifar_vgg16", {"layers": 12}, "layers is 12; accepted: 11, 13, 16, 19"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.skipif(not (DATA / "ebjr").is_dir(), reason=f"no published weights in {DATA}")
@torch.inference_mode()
def test_the_published_student_knows_919_of_the_first_thousand_test_images():
    path = DATA / "ebjr" / "cifar10_densenet-bc-52-6.pt"
    net = create_model("cifar_densenet_52_6", 10).eval()
    net.load_state_dict(read(path).weights(), strict=True)
    with np.load(DATA / "cifar10_test.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    images = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    right = sum(
        int((net(x)[0].argmax(1) == y).sum()) for x, y in zip(images.split(50), labels.split(50), strict=True)
    )
    assert abs(right - 919) <= 2
