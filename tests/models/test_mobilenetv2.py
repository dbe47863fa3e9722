import pytest
import torch
from torchvision import models

from models import create_model


@pytest.mark.parametrize(("width", "side"), [(1.0, 64), (1.4, 32), (0.5, 32)])
@torch.no_grad()
def test_it_is_torchvisions_network_under_other_names(width, side):
    torch.manual_seed(0)
    theirs = models.mobilenet_v2(width_mult=width, num_classes=7)
    for module in theirs.modules():  # statistics that are not those of a new network
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    ours = create_model("mobilenetv2", 7, width_mult=width)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, side, side)
    torch.testing.assert_close(ours.eval()(images)[0], theirs.eval()(images), rtol=1e-4, atol=1e-5)


def test_weights_have_the_published_names():
    with torch.device("meta"):
        keys = create_model("mobilenetv2").state_dict().keys()
    assert {
        "features.0.1.weight",
        "features.1.conv.4.bias",
        "features.17.conv.7.weight",
        "conv.1.bias",
    } <= keys
    assert "features.1.conv.6.weight" not in keys and "classifier.bias" in keys


def test_a_tenth_of_the_width_is_rounded_to_fours():
    with torch.device("meta"):
        net = create_model("mobilenetv2", width_mult=0.1)
    assert [net.features[i].conv[-2].out_channels for i in (1, 2, 17)] == [4, 4, 32]


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_32x8d"])
def test_the_zoos_other_networks_for_imagenet_are_timms(name):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in getattr(models, name)().state_dict().items()}
        own = create_model(f"timm/{name}").state_dict()
    assert {key.removeprefix("net."): value.shape for key, value in own.items()} == shapes
