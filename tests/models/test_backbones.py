import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from models import create_model
from models.backbones import CORES, make_backbone
from models.layers import drop_path

LIBRARY = {
    **{name: torchvision.models.get_model for name in CORES if name.startswith("regnet")},
    "mobilenet_v3_large": torchvision.models.get_model,
    "mobilenet_v3_small": torchvision.models.get_model,
    **{name: timm.create_model for name in ("resnet18", "resnet34", "resnet50")},
}


def filled(net):
    """Weights and statistics that no initialisation would give."""
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            tensor.data += 0.1 * torch.rand_like(tensor)
    return net.eval()


@pytest.mark.parametrize("name", LIBRARY)
@torch.no_grad()
def test_weights_and_answers_are_the_librarys(name):
    torch.manual_seed(0)
    theirs = filled(LIBRARY[name](name).double())
    ours = create_model(name).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    (logits,) = ours(images)
    assert_close(logits, theirs(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width_mult", [0.5, 0.75, 1.25, 1.5, 2.0])
def test_mobilenet_widths_are_torchvisions(width_mult):
    with torch.device("meta"):
        ours = create_model(
            f"mobilenet_v3_large_{width_mult:.2f}".rstrip("0").replace(".", "x").replace("2x", "2x0")
        )
        theirs = torchvision.models.mobilenet_v3_large(width_mult=width_mult)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet50_0375", (24, 96, 192, 384, 768)),
        ("resnet50_0625", (40, 160, 320, 640, 1280)),
        ("mobilenet_v3_large_0x5", (16, 24, 40, 80, 480)),
        ("mobilenet_v3_large_0x75", (24, 32, 64, 120, 720)),
        ("mobilenet_v3_large_1x25", (32, 48, 104, 200, 1200)),
        ("mobilenet_v3_large_1x5", (40, 64, 120, 240, 1440)),
        ("mobilenet_v3_large_2x0", (48, 80, 160, 320, 1920)),
        ("regnet_y_3_2gf", (32, 72, 216, 576, 1512)),
    ],
)
def test_widths_of_the_maps(name, widths):
    with torch.device("meta"):
        assert make_backbone(name).widths == widths


@pytest.mark.parametrize(
    "name", ["regnet_y_400mf", "resnet18", "mobilenet_v3_large_0x5", "mobilenet_v3_small"]
)
@torch.no_grad()
def test_maps_have_the_widths_and_strides_that_are_said(name):
    backbone, x = make_backbone(name), torch.randn(1, 3, 90, 90)
    x = backbone.stem.eval()(x)
    for i, stage in enumerate(backbone.stages):
        side = -(-90 // backbone.strides[i])
        assert x.shape == (1, backbone.widths[i], side, side)
        x = stage.eval()(x)
    assert x.shape[1] == backbone.widths[-1]


def drop_rates(net):
    return [getattr(m.drop_path, "drop_prob", 0.0) for m in net.modules() if hasattr(m, "drop_path")]


def test_unset_rates_are_the_published_ones():
    assert drop_rates(create_model("resnet18")) == pytest.approx([0.2 * j / 7 for j in range(8)])
    assert create_model("resnet18").dropout == 0.2
    assert not any(drop_rates(create_model("regnet_y_400mf"))) and create_model("regnet_y_400mf").dropout == 0
    mobile = create_model("mobilenet_v3_small")
    assert not any(drop_rates(mobile)) and mobile.classifier[2].p == 0.2 and mobile.dropout == 0


@pytest.mark.parametrize("name", ["regnet_y_400mf", "resnet18", "mobilenet_v3_small"])
def test_given_rates_hold_for_every_core(name):
    rates = drop_rates(create_model(name, drop_path=0.3))
    assert rates == pytest.approx([0.3 * j / (len(rates) - 1) for j in range(len(rates))])
    none = create_model(name, drop_path=0.0, dropout=0.0)
    assert not any(drop_rates(none)) and none.dropout == 0
    assert not any(m.p for m in none.modules() if isinstance(m, nn.Dropout))


def test_drop_path_leaves_whole_samples_out():
    torch.manual_seed(0)
    x = torch.ones(200, 2, 3, 3)
    kept = drop_path(0.25).train()(x).flatten(1)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert all(len(row.unique()) == 1 for row in kept) and 0.1 < (kept == 0).float().mean() < 0.4


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    resnet = create_model("resnet18")
    assert all(not block.bn2.weight.any() for block in resnet.layer3)
    assert resnet.layer3[0].conv1.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    regnet = create_model("regnet_y_400mf")
    assert regnet.fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and not regnet.fc.bias.any()
    mobile = create_model("mobilenet_v3_small")
    assert not mobile.features[1].block[1].fc1.bias.any()
    depthwise = mobile.features[10].block[1][0].weight  # [576, 1, 5, 5]: fan-out counts all channels
    assert depthwise.std().item() == pytest.approx((2 / (25 * 576)) ** 0.5, rel=0.05)


def test_unknown_core_lists_close_ones():
    with pytest.raises(ValueError, match="unknown core 'resnet5'; did you mean .*resnet50"):
        create_model("reg400m_perceiver_t32", core="resnet5")
