"""Exits on timm's networks: each stage computes its part of the backbone, and all parts together the
whole."""

import copy

import pytest
import timm
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from adaptive.flops import exit_costs
from models import create_model, model_options, take
from models.timm_exits import cut

# Plain stages, blocks of attention on tokens, on channels-last maps, branches that stay apart, sizes read
# from images.
BACKBONES = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "efficientformerv2_s0": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 12,
        "num_heads": (1, 2, 2, 2),
        "drop_path_rate": 0,
    },
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 12, "depth": 4},
    "hrnet_w18_small": {},
}


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_parts_in_order_are_the_backbone_in_both_modes(name):
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, **BACKBONES[name])
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        backbone.train(mode)
        parts, values, found = cut(backbone), [images], []
        reference = copy.deepcopy(backbone)(images)
        for part in parts:
            features, *values = part(backbone, *values)
            found.append(features.clone())
            assert all(isinstance(value, torch.Tensor) and len(value) == 2 for value in values)
        assert values == []
        for ours, theirs in zip(found, reference, strict=True):
            assert_close(ours, theirs)


def test_stages_compute_nothing_twice():
    with torch.device("meta"):
        net = (
            create_model("timm_ee", num_classes=5, backbone="resnet10t", head_width=8)
            .eval()
            .requires_grad_(False)
        )
        with FlopCounterMode(display=False) as flops:
            for head, features in zip(net.exits, net.backbone(torch.empty(1, 3, 64, 64)), strict=True):
                head(features)
    assert exit_costs(net, (3, 64, 64))[-1] == flops.get_total_flops() // 2


@torch.no_grad()
def test_states_of_a_copy_use_the_weights_of_the_copy():
    net = create_model("timm_ee", num_classes=5, backbone="mobilenetv3_small_050", head_width=8).eval()
    other = copy.deepcopy(net)
    for p in other.parameters():
        p.zero_()
    images = torch.randn(2, 3, 64, 64)
    assert other(images)[0].abs().max() == 0 < net(images)[0].abs().max()


def test_modes_differ_where_the_backbone_drops_paths():
    torch.manual_seed(0)
    net = create_model(
        "timm_ee", backbone="swin_tiny_patch4_window7_224", exits=1, drop_path_rate=0.9, head_width=8
    )
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        net.train()
        assert not torch.equal(net.trunk(0, [images])[0], net.trunk(0, [images])[0])
        net.eval()
        features, state = net.trunk(0, [images])
        assert features.shape == (2, 768, 7, 7) and state == []
        assert torch.equal(features, net.trunk(0, [images])[0])


@torch.no_grad()
def test_rows_can_leave_between_stages():
    net = create_model(
        "timm_ee", num_classes=5, backbone="vit_tiny_patch16_224", exits=2, head_width=8
    ).eval()
    images, rows = torch.randn(3, 3, 224, 224), torch.tensor([2, 0])
    whole = net(images)
    _, state = net.step(0, net.begin(images))
    logits, _ = net.step(1, take(state, rows))
    assert_close(logits, whole[1][rows], rtol=1e-4, atol=1e-5)


def test_maps_are_chosen_by_count_or_number():
    net = create_model("timm_ee", backbone="resnet10t", exits=2)
    assert net.backbone.feature_info.reduction() == [16, 32]
    net = create_model("timm_ee", backbone="resnet10t", out_indices=(1, 4))
    assert net.backbone.feature_info.reduction() == [4, 32] and net.num_exits == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet10"}, "timm has no model 'resnet10'; did you mean"),
        (
            {"backbone": "resnet10t", "exits": 6},
            "exits is 6; resnet10t has 5 feature maps, so accepted: 1 to 5",
        ),
        (
            {"backbone": "resnet10t", "out_indices": (3, 1)},
            r"out_indices is \[3, 1\]; accepted: rising numbers from 0",
        ),
        (
            {"backbone": "crossvit_9_240"},
            "timm's crossvit_9_240 (cannot be cut at its feature maps: symbolically traced|offers no feature maps)",
        ),
    ],
)
def test_bad_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("timm_ee", **options)


@torch.no_grad()
def test_timm_networks_answer_as_timm_does():
    torch.manual_seed(0)
    net = create_model("timm/mobilenetv3_small_050", num_classes=7).eval()
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    theirs.load_state_dict(net.net.state_dict())
    images = torch.randn(2, 3, 64, 64)
    (logits,) = net(images)
    assert torch.equal(logits, theirs(images)) and net.num_exits == 1


def test_timm_options_are_timm_nets():
    assert set(model_options("timm/resnet18")) == {"pretrained", "drop_rate", "drop_path_rate"}
    assert create_model("timm/mobilenetv3_small_050", drop_rate=0.3).net.drop_rate == 0.3


def test_unknown_timm_name_lists_close_ones():
    with pytest.raises(ValueError, match="timm has no model 'mobilenetv3_smal_050'; .*mobilenetv3_small_050"):
        create_model("timm/mobilenetv3_smal_050")


@torch.no_grad()
def test_pooled_exits_read_the_means_of_maps():
    options = {"num_classes": 5, "backbone": "resnet10t", "exits": 2, "head_width": 8}
    maps = create_model("timm_ee", **options).eval()
    pooled = create_model("timm_ee", **options, head="pooled").eval()
    pooled.backbone.load_state_dict(maps.backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    features, _ = maps.trunk(0, [images])
    means, state = pooled.trunk(0, [images])
    assert_close(means, features.mean((2, 3)))
    assert pooled.head(0, means).shape == (2, 5) and len(state) == 1
