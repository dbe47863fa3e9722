import pytest
import torch
from torch import nn

from adaptive.flops import count, exit_costs
from models import create_model
from models.msdnet import Stem, Transition

MSDNETS = {
    "as published": {},
    "max, one scale leaves late": {"nBlocks": 2, "base": 3, "step": 3, "stepmode": "even"},
    "max, two scales leave": {"nBlocks": 2, "base": 2, "step": 2, "stepmode": "even"},
    "max, a block a layer": {"nBlocks": 4, "stepmode": "even"},
    "min": {"nBlocks": 3, "prune": "min"},
    "min, a block a layer": {"nBlocks": 7, "stepmode": "even", "prune": "min"},
    "min, fewer layers than scales": {"nBlocks": 2, "stepmode": "even", "prune": "min"},
    "no transitions": {"nBlocks": 3, "reduction": 0},
    "transitions that keep the width": {"nBlocks": 3, "reduction": 1.0},
    "no bottleneck": {"nBlocks": 3, "bottleneck": False},
    "one scale": {"nBlocks": 3, "grFactor": (1,), "bnFactor": (1,)},
    "five scales": {"nBlocks": 3, "base": 4, "grFactor": (1, 2, 2, 4, 4), "bnFactor": (1, 2, 2, 4, 4)},
    "one exit": {"nBlocks": 1, "base": 5},
    "imagenet stem": {"nBlocks": 2, "stem": "imagenet", "base": 3, "step": 2, "stepmode": "even"},
}

# Parameters in millions, and millions of operations per exit as the papers' tool counts them.
PUBLISHED = {
    "msdnet_imagenet_step4": (1000, 23.958, [339.90, 685.46, 1008.16, 1254.47, 1360.53]),
    "msdnet_imagenet_step6": (1000, 38.679, [339.90, 924.19, 1517.43, 1991.60, 2194.42]),
    "msdnet_imagenet_step7": (1000, 47.545, [339.90, 1058.27, 1811.88, 2422.16, 2684.44]),
    "msdnet_imagenet_step7_base7": (1000, 62.314, [615.69, 1436.39, 2283.21, 2967.42, 3253.79]),
    "msdnet_cifar_lin5": (100, 2.079, [6.86, 14.35, 27.54, 41.71, 58.48]),
    "msdnet_cifar_even7": (100, 3.068, [15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94]),
}

msdnets = pytest.mark.parametrize("options", MSDNETS.values(), ids=MSDNETS)


@pytest.fixture
def small_msdnet(settled):
    """`small_msdnet(**options)`: a network, two images, and all of its options."""

    def make(**options):
        torch.manual_seed(0)
        side = 64 if options.get("stem") == "imagenet" else 32
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        options = {"nChannels": 4, "growthRate": 4, **options}
        return settled(create_model("msdnet", num_classes=5, **options), images), images, options

    return make


@msdnets
def test_msdnet_states_hold_only_what_later_stages_read(options, small_msdnet, states_hold_only_what_is_read):
    net, images, _ = small_msdnet(**options)
    states_hold_only_what_is_read(net, images)
    assert net.kept == sorted(net.kept, reverse=True)


def shorthand(element):
    """A layer is its units, plain or fused, fine to coarse; a transition the number of scales that it
    compresses."""
    if isinstance(element, Transition):
        return f"T{len(element.m)}"
    return "".join("F" if hasattr(unit, "conv_down") else "P" for unit in element.layers)


@pytest.mark.parametrize(
    ("prune", "elements"),
    [
        ("max", ["PFF", "PFF", "FF", "T2", "PF", "F", "T1", "P"]),
        ("min", ["PFF", "PFF", "T3", "PFF", "PFF", "T3", "FF", "F"]),
    ],
)
def test_msdnet_drops_scales_with_depth(prune, elements):
    net = create_model("msdnet", nBlocks=3, base=2, step=2, stepmode="even", prune=prune)
    assert [
        shorthand(element) for block in net.blocks for element in block if not isinstance(element, Stem)
    ] == elements


@pytest.mark.parametrize("prune", ["max", "min"])
def test_msdnet_transitions_of_reduction_1_stay_and_compress_nothing(prune):
    """Where they are with other reductions, from `c * g` channels to as many."""
    nets = [create_model("msdnet", nBlocks=3, prune=prune, reduction=kept) for kept in (0.5, 1.0)]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    transitions = [m for m in nets[1].modules() if isinstance(m, Transition)]
    shapes = [unit.net[0].weight.shape[:2] for transition in transitions for unit in transition.m]
    assert len(transitions) == 2 and all(n_out == n_in for n_out, n_in in shapes)
    assert nets[1].classifier[-1].m[0].net[0].weight.shape[1] == (16 + 6 * (1 + 2 + 3)) * 4


@msdnets
@torch.no_grad()
def test_msdnet_lazy_answers_are_those_of_whole_blocks(options, small_msdnet):
    lazy, images, options = small_msdnet(**options)
    whole = create_model("msdnet", num_classes=5, lazy=False, **options).double().eval()
    whole.load_state_dict(lazy.state_dict(), strict=True)
    for a, b in zip(lazy(images), whole(images), strict=True):
        assert torch.equal(a, b)
    shape = tuple(images.shape[1:])
    assert all(a <= b for a, b in zip(exit_costs(lazy, shape), exit_costs(whole, shape), strict=True))


def test_msdnet_lazy_runs_less_for_early_exits(small_msdnet):
    lazy, images, options = small_msdnet()
    whole = create_model("msdnet", num_classes=5, lazy=False, **options)
    assert exit_costs(lazy, (3, 32, 32))[0] < exit_costs(whole, (3, 32, 32))[0]


@msdnets
def test_msdnet_freezes_exactly_the_units_that_no_exit_reads(options, small_msdnet):
    net, images, options = small_msdnet(**options)
    frozen = [key for key, p in net.named_parameters() if not p.requires_grad]
    whole = create_model("msdnet", num_classes=5, lazy=False, **options).double().train().requires_grad_(True)
    sum(logits.sum() for logits in whole(images)).backward()
    assert [key for key, p in whole.named_parameters() if p.grad is None] == frozen


def test_msdnet_with_two_scales_leaving_has_frozen_units(small_msdnet):
    net, _, _ = small_msdnet(**MSDNETS["max, two scales leave"])
    frozen = {key.split(".conv")[0] for key, p in net.named_parameters() if not p.requires_grad}
    # 4 layers, 3 scales: scales 1 and 2 leave layer 4 (element 2 of block 1, behind a transition), exits read
    # scale 2.
    assert frozen == {"blocks.1.2.layers.0"}


def test_msdnet_he_init():
    torch.manual_seed(0)
    net = create_model("msdnet", init="he")
    weight = net.classifier[0].m[0].net[0].weight  # [128, 88, 3, 3]
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert all(m.bias.eq(0).all() for m in net.modules() if isinstance(m, nn.Linear))
    torch.manual_seed(0)
    assert create_model("msdnet").classifier[0].m[0].net[0].weight.std() < weight.std() / 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "mnist"}, "stem is 'mnist'; accepted: cifar, imagenet"),
        ({"stepmode": "odd"}, "stepmode is 'odd'; accepted: even, lin_grow"),
        ({"prune": "mid"}, "prune is 'mid'; accepted: max, min"),
        ({"init": "zero"}, "init is 'zero'; accepted: default, he"),
        ({"nBlocks": 0}, "nBlocks is 0"),
        ({"base": 0}, "base is 0"),
        ({"step": -1}, "step is -1"),
        ({"nChannels": 0}, "nChannels is 0"),
        ({"grFactor": (1, 2)}, r"bnFactor \[1, 2, 4\] and grFactor \[1, 2\]"),
        ({"growthRate": 3, "grFactor": (1, 1, 2)}, r"growthRate 3 times grFactor \[1, 1, 2\] must be even"),
        ({"reduction": 1.1}, "reduction is 1.1; it must be at least 0 and at most 1"),
        ({"reduction": -0.5}, "reduction is -0.5"),
    ],
)
def test_msdnet_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("msdnet", **options)


def test_msdnet_has_batch_norm_after_its_convolutions():
    assert create_model("msdnet", 10, bnAfter=True).num_exits == 5
    with pytest.raises(ValueError, match="bnAfter is False"):
        create_model("msdnet", 10, bnAfter=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size_and_cost(name, is_cifar, on_meta):
    num_classes, millions, operations = PUBLISHED[name]
    net = on_meta(name, num_classes=num_classes, lazy=False)  # as published
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    side = 32 if is_cifar(name) else 224
    assert [round(n / 1e6, 2) for n in count(net, (3, side, side)).papers] == operations
