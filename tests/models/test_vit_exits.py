"""Exits on timm's vision transformers: the last exit sees what timm's own forward pass gives."""

from functools import partial

import pytest
import timm
import torch
from torch.testing import assert_close

from models import create_model, take

NARROW = {"depth": 3, "embed_dim": 24, "num_heads": 2}
SIDES = {
    "vit_tiny_patch16_224": 32,
    "vit_small_patch14_reg4_dinov2": 28,
    "vit_small_patch16_dinov3": 48,
}


@pytest.fixture
def narrow(monkeypatch):
    """timm's networks with few and narrow blocks."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **NARROW))


@pytest.mark.parametrize("name", SIDES)
@torch.no_grad()
def test_the_last_exit_reads_timms_own_features(name, narrow):
    torch.manual_seed(0)
    net = create_model("vit_ee", 5, backbone=name, exits=2, head_width=8).eval()
    images = torch.randn(3, 3, SIDES[name], SIDES[name])
    theirs = net.backbone.forward_features(images)
    _, state = net.trunk(0, net.begin(images))
    features, rest = net.trunk(1, state)
    assert net.ends == [1, 3] and rest == []
    assert_close(features, net.pooled(theirs))
    assert_close(features[:, :24], theirs[:, 0])
    part, _ = net.trunk(1, take(state, torch.tensor([2, 0])))
    assert_close(part, features[[2, 0]])


def test_a_fixed_size(narrow):
    net = create_model("vit_ee", 5, backbone="vit_tiny_patch16_224", img_size=48, exits=1, head_width=8)
    assert net.backbone.pos_embed.shape == (1, 10, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vit_tiny"}, "timm has no model 'vit_tiny'"),
        ({"backbone": "resnet10t"}, "backbone is 'resnet10t'; accepted: a VisionTransformer or Eva"),
        ({"backbone": "test_vit", "exits": 7}, "exits is 7; test_vit has 6 blocks, so accepted: 1 to 6"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("vit_ee", **options)
