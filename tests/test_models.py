import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from adaptive.flops import count, exit_costs
from models import MultiExitModel, create_model, join, list_models, model_options, registry, take
from models.msdnet import Stem, Transition

# One variant per registered class that is small enough to really run.
SMALL = {
    "msdnet": {"nBlocks": 3, "nChannels": 4, "growthRate": 4},
    "ranet": {
        "nChannels": 4,
        "growthRate": 4,
        "step": 2,
        "grFactor": (2, 1, 1),
        "bnFactor": (2, 1, 1),
        "scale_list": (1, 2, 2),
    },
    "boosted/msdnet": {"nBlocks": 3, "nChannels": 4, "growthRate": 4},
    "reg400m_perceiver_t32": {},
    "resnet18": {},
    "rexnet_ee_100": {"input_ch": 4, "final_ch": 16, "head_width": 8},
    "rexnet_ee_lite_100": {"input_ch": 4, "final_ch": 16, "head_width": 8},
    "cifar_densenet": {"depth": 10, "growthRate": 4},
    "cifar_resnet": {"depth": 11, "block_name": "Bottleneck"},
    "cifar_preresnet": {"depth": 8},
    "cifar_wrn": {"depth": 10},
    "cifar_resnext": {"depth": 11, "cardinality": 2},
    "cifar_vgg11_bn": {},
    "cifar_alexnet": {},
    "timm/mobilenetv3_small_050": {},
    "ebjr": {
        "networks": ("cifar_resnet:depth=8,size=16", "msdnet:nBlocks=2,nChannels=4,growthRate=4,std=0.5/1/1")
    },
    "mobilenetv2": {"width_mult": 0.1},
    "timm_ee": {"backbone": "mobilenetv3_small_050", "head_width": 8},
}

MSDNETS = {
    "as published": {},
    "max, one scale leaves late": {"nBlocks": 2, "base": 3, "step": 3, "stepmode": "even"},
    "max, two scales leave": {"nBlocks": 2, "base": 2, "step": 2, "stepmode": "even"},
    "max, a block a layer": {"nBlocks": 4, "stepmode": "even"},
    "min": {"nBlocks": 3, "prune": "min"},
    "min, a block a layer": {"nBlocks": 7, "stepmode": "even", "prune": "min"},
    "min, fewer layers than scales": {"nBlocks": 2, "stepmode": "even", "prune": "min"},
    "no transitions": {"nBlocks": 3, "reduction": 0},
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
    "ranet_cifar": (10, 3.262, [15.81, 31.28, 44.66, 50.36, 60.65, 63.65, 90.17, 94.90]),
    "ranet_cifar_lg": (10, 2.548, [8.36, 21.77, 32.84, 41.52, 53.23, 58.92]),
    "ranet_imagenet_script": (
        1000,
        87.973,
        [168.07, 520.47, 731.89, 903.79, 1052.25, 1118.80, 1589.01, 1680.98],
    ),
    "ranet_imagenet_readme": (
        1000,
        131.124,
        [246.47, 631.16, 860.40, 1041.14, 1869.85, 2160.38, 2734.28, 2828.31],
    ),
    "ranet_imagenet": (1000, 149.144, [434.97, 888.67, 1153.36, 1352.45, 2279.91, 2588.47, 3235.52, 3333.48]),
}

families = pytest.mark.parametrize("name", SMALL)
msdnets = pytest.mark.parametrize("options", MSDNETS.values(), ids=MSDNETS)


def is_cifar(name):
    stem = model_options(name).get("stem")
    return name.startswith(("cifar_", "ebjr")) or (stem is not None and stem.default == "cifar")


def settled(model, images):
    """The model in float64 and eval mode, with batch norm statistics that are not those of a new network."""
    model.double().train()
    with torch.no_grad():
        model(images)
    return model.eval()


def small(name, num_classes=7):
    """The family's small variant, and five images for it."""
    torch.manual_seed(0)
    side = 32 if is_cifar(name) else 64
    images = torch.randn(5, 3, side, side, dtype=torch.float64)
    return settled(create_model(name, num_classes=num_classes, **SMALL[name]), images), images


def small_msdnet(**options):
    torch.manual_seed(0)
    side = 64 if options.get("stem") == "imagenet" else 32
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    options = {"nChannels": 4, "growthRate": 4, **options}
    return settled(create_model("msdnet", num_classes=5, **options), images), images, options


def leaves(state):
    """The tensors of a state, each with a function that gives the state with this tensor replaced."""
    if isinstance(state, torch.Tensor):
        return [(state, lambda new: new)]
    if isinstance(state, dict):
        return [
            (leaf, lambda new, key=key, put=put: {**state, key: put(new)})
            for key, value in state.items()
            for leaf, put in leaves(value)
        ]
    return [
        (leaf, lambda new, i=i, put=put: type(state)([*state[:i], put(new), *state[i + 1 :]]))
        for i, value in enumerate(state or ())
        for leaf, put in leaves(value)
    ]


def rest(model, k, state):
    """Logits of the exits from k on."""
    exits = []
    for j in range(k, model.num_exits):
        logits, state = model.step(j, state)
        exits.append(logits)
    return exits


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds_and_answers_on_the_meta_device(name):
    with torch.device("meta"):
        net, again = create_model(name), create_model(name)
    side = 32 if is_cifar(name) else 224
    exits = net.eval()(torch.empty(2, 3, side, side, device="meta"))
    assert [logits.shape for logits in exits] == [(2, 1000)] * net.num_exits
    again.load_state_dict(net.state_dict(), strict=True)
    assert list(again.state_dict()) == list(net.state_dict())
    costs = exit_costs(net, (3, side, side))
    assert len(costs) == net.num_exits
    assert all(a < b for a, b in zip([0, *costs], costs, strict=False))


def test_every_registered_class_has_a_small_variant():
    classes = {type(create_model(name, **options)) for name, options in SMALL.items()}
    assert classes == {entry.model_class for entry in registry._ENTRIES.values()}


@families
@torch.no_grad()
def test_steps_in_order_are_the_forward_pass(name):
    net, images = small(name)
    for a, b in zip(rest(net, 0, net.begin(images)), net(images), strict=True):
        assert torch.equal(a, b)


@families
@torch.no_grad()
def test_rows_are_independent(name):
    net, images = small(name)
    whole = net(images)
    assert [logits.shape for logits in whole] == [(5, 7)] * net.num_exits
    for i in range(5):
        for alone, logits in zip(net(images[i : i + 1]), whole, strict=True):
            assert_close(alone[0], logits[i], rtol=1e-12, atol=1e-12)


@families
def test_every_trainable_parameter_gets_a_gradient(name):
    net, images = small(name)
    sum(F.cross_entropy(logits, torch.arange(5)) for logits in net.train()(images)).backward()
    assert [key for key, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@families
@torch.no_grad()
def test_state_dict_round_trips(name):
    net, images = small(name)
    torch.manual_seed(1)
    other = create_model(name, num_classes=7, **SMALL[name]).double().eval()
    assert not torch.equal(other(images)[0], net(images)[0])
    other.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other(images), net(images), strict=True))


@families
def test_unknown_option_is_a_type_error(name):
    with pytest.raises(TypeError, match=f"{name} has no option 'no_such_option'"):
        create_model(name, **SMALL[name], no_such_option=1)


def test_unknown_option_lists_close_ones():
    with pytest.raises(TypeError, match="model msdnet has no option 'growthrate'; did you mean growthRate"):
        create_model("msdnet", growthrate=4)


@families
@torch.no_grad()
def test_stages_of_some_samples_are_those_samples_of_the_stages(name):
    net, images = small(name)
    rows = torch.tensor([3, 0])
    whole = net.begin(images)
    part = take(whole, rows)
    for k in range(net.num_exits):
        logits, whole = net.step(k, whole)
        some, part = net.step(k, part)
        assert_close(some, logits[rows], rtol=1e-12, atol=1e-12)
        assert_close(part, take(whole, rows), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def check_that_states_hold_only_what_is_read(net, images):
    state = net.begin(images)
    for k in range(net.num_exits):
        for leaf, put in leaves(state):
            assert len(leaf) == len(images)
            spoilt = rest(net, k, put(torch.full_like(leaf, torch.nan)))
            assert any(logits.isnan().any() for logits in spoilt), (
                f"stage {k} is given a tensor that nobody reads"
            )
        _, state = net.step(k, state)
    assert leaves(state) == []


@families
def test_states_hold_only_what_later_stages_read(name):
    check_that_states_hold_only_what_is_read(*small(name))


@msdnets
def test_msdnet_states_hold_only_what_later_stages_read(options):
    net, images, _ = small_msdnet(**options)
    check_that_states_hold_only_what_is_read(net, images)
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


@msdnets
@torch.no_grad()
def test_msdnet_lazy_answers_are_those_of_whole_blocks(options):
    lazy, images, options = small_msdnet(**options)
    whole = create_model("msdnet", num_classes=5, lazy=False, **options).double().eval()
    whole.load_state_dict(lazy.state_dict(), strict=True)
    for a, b in zip(lazy(images), whole(images), strict=True):
        assert torch.equal(a, b)
    shape = tuple(images.shape[1:])
    assert all(a <= b for a, b in zip(exit_costs(lazy, shape), exit_costs(whole, shape), strict=True))


def test_msdnet_lazy_runs_less_for_early_exits():
    lazy, images, options = small_msdnet()
    whole = create_model("msdnet", num_classes=5, lazy=False, **options)
    assert exit_costs(lazy, (3, 32, 32))[0] < exit_costs(whole, (3, 32, 32))[0]


@msdnets
def test_msdnet_freezes_exactly_the_units_that_no_exit_reads(options):
    net, images, options = small_msdnet(**options)
    frozen = [key for key, p in net.named_parameters() if not p.requires_grad]
    whole = create_model("msdnet", num_classes=5, lazy=False, **options).double().train().requires_grad_(True)
    sum(logits.sum() for logits in whole(images)).backward()
    assert [key for key, p in whole.named_parameters() if p.grad is None] == frozen


def test_msdnet_with_two_scales_leaving_has_frozen_units():
    net, _, _ = small_msdnet(**MSDNETS["max, two scales leave"])
    frozen = {key.split(".conv")[0] for key, p in net.named_parameters() if not p.requires_grad}
    # 4 layers, 3 scales: scales 1 and 2 leave layer 4 (element 2 of block 1, behind a transition), exits read
    # scale 2.
    assert frozen == {"blocks.1.2.layers.0"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size_and_cost(name):
    num_classes, millions, operations = PUBLISHED[name]
    with torch.device("meta"):
        as_published = {"lazy": False} if "lazy" in model_options(name) else {}
        net = create_model(name, num_classes=num_classes, **as_published)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    side = 32 if is_cifar(name) else 224
    assert [round(n / 1e6, 2) for n in count(net, (3, side, side)).papers] == operations


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
        ({"reduction": 1.0}, "reduction is 1.0"),
        ({"reduction": -0.5}, "reduction is -0.5"),
    ],
)
def test_msdnet_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("msdnet", **options)


def test_take_and_join_keep_the_nest():
    a, b = torch.arange(6).view(3, 2), torch.arange(3)
    state = {"maps": [a, (b, None)], "said": None, "none": [], "latent": a + 10}
    part = take(state, torch.tensor([2, 0]))
    assert_close(part["maps"][0], torch.tensor([[4, 5], [0, 1]]))
    assert_close(part["maps"][1][0], torch.tensor([2, 0]))
    assert_close(part["latent"], torch.tensor([[14, 15], [10, 11]]))
    assert isinstance(part["maps"][1], tuple) and part["maps"][1][1] is None
    assert part["said"] is None and part["none"] == []
    whole = join([part, take(state, torch.tensor([1]))])
    assert_close(whole["maps"][0], torch.tensor([[4, 5], [0, 1], [2, 3]]))
    assert_close(whole["maps"][1][0], torch.tensor([2, 0, 1]))
    assert isinstance(whole["maps"][1], tuple) and whole["maps"][1][1] is None
    assert list(whole) == list(state) and whole["said"] is None and whole["none"] == []


def test_join_of_one_state_is_that_state():
    state = [torch.zeros(2)]
    assert join([state]) is state


def test_take_and_join_keep_channels_last():
    maps = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    part = take([maps], torch.tensor([0, 2]))
    assert part[0].is_contiguous(memory_format=torch.channels_last)
    assert join([part, part])[0].is_contiguous(memory_format=torch.channels_last)


def test_a_state_of_anything_else_is_our_mistake():
    with pytest.raises(AssertionError, match="not str"):
        take("maps", torch.tensor([0]))


def test_registering_a_name_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="msdnet is registered twice"):
        registry.register(MultiExitModel, "msdnet", "")


@pytest.mark.parametrize("name", ["msdnet_cifar_lin", "mobilenetv3_small_050", "nets/msdnet", ""])
def test_unknown_name_is_a_value_error(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; "):
        create_model(name)


def test_unknown_name_lists_close_ones():
    with pytest.raises(
        ValueError, match="unknown model 'msdnet_cifar_lin'; did you mean .*msdnet_cifar_lin5"
    ):
        create_model("msdnet_cifar_lin")


def test_list_models_takes_a_pattern():
    names = list_models()
    assert names == sorted(names) and "timm/" not in names
    assert list_models("msdnet_imagenet_step?") == [f"msdnet_imagenet_step{n}" for n in (4, 6, 7)]
    assert list_models("MSDNET*") == []
    assert "timm/mobilenetv3_small_050" in list_models("timm/mobilenetv3_small*")


def test_preset_options_are_the_classes_with_other_defaults():
    preset, bare = model_options("msdnet_cifar_even7"), model_options("msdnet")
    assert list(preset) == list(bare) and "num_classes" not in bare
    assert {key: preset[key].default for key in preset if preset[key].default != bare[key].default} == {
        "nBlocks": 7,
        "stepmode": "even",
        "step": 2,
        "base": 4,
    }
    assert create_model("msdnet_cifar_even7", nBlocks=2).num_exits == 2


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


def test_msdnet_has_batch_norm_after_its_convolutions():
    assert create_model("msdnet", 10, bnAfter=True).num_exits == 5
    with pytest.raises(ValueError, match="bnAfter is False"):
        create_model("msdnet", 10, bnAfter=False)
