"""Published widths, costs and timm's version of ReXNet; exits behind its blocks."""

import pytest
import timm
import torch
from torch.testing import assert_close

from adaptive.flops import exit_costs
from experiment.fit import fit_to, renamed_for
from models import create_model, list_models
from models.rexnet_blocks import Block

# Stem, block outputs, last convolution; parameters; millions of multiply-adds of the convolutions at 224
# pixels.
V1_090 = [32, 16, 26, 36, 46, 56, 67, 77, 87, 97, 107, 117, 127, 138, 148, 158, 168, 1152]
V1_130 = [42, 21, 35, 50, 65, 79, 94, 109, 123, 138, 152, 167, 182, 196, 211, 226, 240, 1664]
V1_220 = [70, 35, 60, 85, 109, 134, 159, 184, 208, 233, 258, 283, 307, 332, 357, 382, 406, 2816]
LITE_130 = [40, 24, 32, 48, 64, 80, 96, 104, 120, 136, 152, 160, 176, 192, 208, 224, 232, 1664]
LITE_200 = [64, 32, 56, 80, 96, 120, 144, 160, 184, 208, 232, 248, 272, 296, 320, 336, 360, 2560]
SIZES = {
    "rexnetv1_090": (4_091_257, 347.7),
    "rexnetv1_100": (4_796_873, 398.4),
    "rexnetv1_130": (7_557_091, 662.2),
    "rexnetv1_150": (9_728_593, 875.8),
    "rexnetv1_200": (16_366_620, 1528.9),
    "rexnetv1_220": (19_485_308, 1842.5),
    "rexnetv1_300": (34_708_792, 3396.0),
    "rexnetv1_lite_100": (4_740_056, 406.8),
    "rexnetv1_lite_130": (6_747_960, 646.4),
    "rexnetv1_lite_150": (8_332_296, 836.4),
    "rexnetv1_lite_200": (12_966_200, 1498.3),
}


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options).eval()


def tiny(**options):
    torch.manual_seed(0)
    return create_model("rexnetv1", num_classes=5, input_ch=4, final_ch=16, **options)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("rexnetv1_090", V1_090),
        ("rexnetv1_130", V1_130),
        ("rexnetv1_220", V1_220),
        ("rexnetv1_lite_130", LITE_130),
        ("rexnetv1_lite_200", LITE_200),
    ],
)
def test_widths_grow_by_a_constant_and_are_rounded_as_published(name, widths):
    features = on_meta(name).features
    blocks = [layer for layer in features if isinstance(layer, Block)]
    outs = [block.out[-2].out_channels for block in blocks]
    assert [features[0].out_channels, *outs, features[19].out_channels] == widths


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_and_costs(name):
    net = on_meta(name)
    params, macs = SIZES[name]
    assert sum(p.numel() for p in net.parameters()) == params
    assert exit_costs(net, (3, 224, 224))[-1] / 1e6 == pytest.approx(macs, abs=0.06)


def test_without_excitation_the_layers_move_up():
    keys = on_meta("rexnetv1", use_se=False).state_dict()
    assert "features.6.out.6.weight" in keys and not any(".fc." in key for key in keys)


def test_depth_mult_repeats_blocks_and_the_whole_first_stage_does_not_expand():
    net = on_meta("rexnetv1", depth_mult=1.5)
    blocks = [layer for layer in net.features if isinstance(layer, Block)]
    assert len(blocks) == 2 + 3 + 3 + 5 + 5 + 8
    assert [block.out[0].kernel_size for block in blocks[:3]] == [(3, 3), (3, 3), (1, 1)]


def test_lite_keeps_stem_and_last_convolution_on_request():
    net = on_meta("rexnetv1_lite", multiplier=2.0, fix_head_stem=True, kernel_conf="355533")
    assert (net.features[0].out_channels, net.features[19].out_channels) == (32, 1280)
    assert [net.features[3 + i].out[0 if i == 0 else 3].kernel_size[0] for i in (0, 1, 5, 8, 11)] == [
        3,
        5,
        5,
        3,
        3,
    ]


def test_lite_widths_are_not_rounded_without_a_divisor():
    assert on_meta("rexnetv1_lite", divisible_value=None).features[4].out[-2].out_channels == 27


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rexnetv1", {"width_mult": 0}, "width_mult is 0; it must be above 0"),
        (
            "rexnetv1",
            {"exits": (4, 15)},
            r"exits is \[4, 15\]; accepted: rising numbers of blocks from 0 to 14",
        ),
        ("rexnetv1", {"exits": (4, 4)}, r"exits is \[4, 4\]"),
        ("rexnetv1", {"exits": (4,), "head_width": 0}, "head_width is 0"),
        ("rexnetv1_lite", {"kernel_conf": "33"}, "kernel_conf is '33'; accepted: six odd digits"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_the_shortcut_is_added_to_the_first_channels_with_and_without_gradients():
    torch.manual_seed(0)
    block = tiny().eval().features[5]  # 27 channels in, more out, stride 1
    x = torch.randn(2, block.out[0].in_channels, 8, 8)
    assert 0 < block.shared < block.out[-2].out_channels
    with torch.no_grad():
        y = block.out(x)
        y[:, : block.shared] += x
        assert torch.equal(block(x), y)
    assert torch.equal(block(x).detach(), y)


def test_a_map_that_shrinks_has_no_shortcut():
    assert [block.shared for block in tiny().features if isinstance(block, Block)][:2] == [0, 0]


@torch.no_grad()
def test_an_exported_shortcut_is_joined():
    block = next(layer for layer in tiny().eval().features if isinstance(layer, Block) and layer.shared)
    x = torch.randn(2, block.shared, 4, 4)
    program = torch.export.export(block, (x,)).run_decompositions({})
    operators = {str(node.target) for node in program.graph.nodes}
    assert "aten.cat.default" in operators and not any("scatter" in one or "copy" in one for one in operators)
    assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("width", [100, 130, 150, 200, 300])
def test_timm_has_the_same_network_under_other_names(width):
    torch.manual_seed(0)
    ours, theirs = create_model(f"rexnetv1_{width}").eval(), timm.create_model(f"rexnet_{width}").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours.load_state_dict(renamed_for(ours, theirs.state_dict()), strict=True)
        assert_close(ours(images)[0], theirs(images), rtol=1e-4, atol=1e-5)


def test_own_names_are_left_alone():
    net = tiny()
    weights = net.state_dict()
    assert renamed_for(net, weights) is weights


@torch.no_grad()
def test_published_weights_are_the_backbone_and_last_exit_of_a_network_with_exits():
    plain = tiny().eval()
    net = tiny(exits=(4, 7, 10), head_width=8).eval()
    fit = fit_to(net, renamed_for(net, plain.state_dict()))
    net.load_state_dict(fit.weights)
    assert fit.renewed == ["exits"]
    images = torch.randn(2, 3, 64, 64)
    exits = net(images)
    assert len(exits) == 4 and torch.equal(exits[-1], plain(images)[0])


def test_every_width_is_a_cnn_of_dynamic_perceivers():
    names = list_models("rexnet*_perceiver_t128")
    assert names == [f"rexnet{w}_perceiver_t128" for w in (100, 130, 150, 200)]
    net, plain = on_meta(names[0]), on_meta("rexnetv1_100")
    body = {key: value for key, value in net.state_dict().items() if key.startswith(("cnn_stem", "cnn_body"))}
    theirs = [value.shape for key, value in plain.state_dict().items() if key.startswith("features")]
    assert [value.shape for value in body.values()] == theirs
    assert net.latent.shape == (128, 16) and net.token_expander[1][1].out_features == 64  # beside 61 channels
