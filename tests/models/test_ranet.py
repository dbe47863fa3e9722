import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adaptive.flops import count
from models import create_model
from models.ranet import FusionBlock, downs, transitions

TINY = {
    "nChannels": 4,
    "growthRate": 4,
    "step": 2,
    "grFactor": (2, 1, 1),
    "bnFactor": (2, 1, 1),
    "scale_list": (1, 2, 2),
}
# Parameters in millions, and millions of operations per exit as the papers' tool counts them.
PUBLISHED = {
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


def tiny(**options):
    torch.manual_seed(0)
    return create_model("ranet", num_classes=3, **{**TINY, **options}).double().eval()


def test_transitions_and_downs_of_the_papers_four_flows():
    blocks = [2, 4, 6, 8]
    levels = [1, 2, 3, 3]
    assert [transitions(n, level) for n, level in zip(blocks, levels, strict=True)] == [
        set(),
        {2},
        {2, 4},
        {2, 5},
    ]
    assert [downs(blocks[:f], levels[f]) for f in range(4)] == [set(), {2}, {2, 4}, {4, 6}]


def test_a_flow_of_level_1_never_goes_down():
    net = tiny(scale_list=(1, 1, 2))
    strides = [layer.conv_normal.net[3].stride for b in net.scale_flows[1][:2] for layer in b.layers]
    assert strides == [(1, 1)] * 4
    assert [y.shape for y in net(torch.randn(2, 3, 16, 16).double())] == [(2, 3)] * net.num_exits


@pytest.mark.parametrize("stepmode", ["even", "lg"])
def test_one_layer_a_block_is_enough(stepmode):
    net = tiny(step=1, stepmode=stepmode)
    assert isinstance(net.scale_flows[1][0], FusionBlock) and len(net.scale_flows[1][0].layers) == 1
    assert len(net.scale_flows[0][1].layers) == (2 if stepmode == "lg" else 1)
    assert len(net(torch.randn(1, 3, 16, 16).double())) == 6


def test_a_step_runs_its_own_blocks_and_no_more():
    net, ran = tiny(), []
    for f, flow in enumerate(net.scale_flows):
        for j, block in enumerate(flow):
            block.register_forward_hook(lambda *_, at=(f, j): ran.append(at))
    state = net.begin(torch.randn(1, 3, 16, 16).double())
    assert ran == []
    parts = []
    for k in range(net.num_exits):
        ran.clear()
        _, state = net.step(k, state)
        parts.append(list(ran))
    flow_1, flow_2 = [(1, j) for j in range(4)], [(2, j) for j in range(6)]
    assert parts == [[(0, 0)], [(0, 1)], flow_1[:3], flow_1[3:], flow_2[:5], flow_2[5:]]
    assert state is None


def test_the_state_holds_what_later_stages_read():
    net = tiny()
    state = net.begin(torch.randn(1, 3, 16, 16).double())
    kept = []
    for k in range(net.num_exits - 1):
        _, state = net.step(k, state)
        maps, _, read, made = state
        kept.append((len(maps), len(read), len(made)))
    # A flow's traces are read by the next flow before its first exit; the last flow's by nobody.
    assert kept == [(2, 0, 1), (1, 2, 0), (1, 0, 3), (0, 4, 0), (0, 0, 0)]


def test_fusion_takes_the_lower_flow_in():
    net = tiny()
    images = torch.randn(2, 3, 16, 16).double()
    before = net(images)
    with torch.no_grad():
        for p in net.scale_flows[0][0].parameters():
            p.mul_(1.5)
        for p in net.classifier[0].parameters():
            p.zero_()
    after = net(images)
    assert all(not torch.allclose(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_initialisation_is_the_declared_one_but_for_the_stem():
    torch.manual_seed(0)
    net = create_model("ranet", num_classes=10)
    conv = net.scale_flows[0][0].layers[3].conv_normal.net[3]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.05)
    assert_close(net.classifier[0].linear.bias, torch.zeros(10))
    stem = net.FirstLayer.layers[1].net[0]
    assert stem.weight.abs().max() <= (1 / (9 * stem.in_channels)) ** 0.5  # PyTorch's uniform default
    assert isinstance(stem, nn.Conv2d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepmode": "lin_grow"}, "stepmode is 'lin_grow'; accepted: even, lg"),
        ({"stem": "svhn"}, "stem is 'svhn'"),
        ({"nBlocks": 0}, "nBlocks is 0"),
        ({"scale_list": (2, 1, 1)}, r"scale_list is \[2, 1, 1\]; levels"),
        ({"scale_list": (1, 2)}, "one number per flow"),
        ({"grFactor": (2, 0, 1)}, "numbers of at least 1"),
        ({"compress_factor": 0.1}, "compress_factor is 0.1"),
        ({"compress_factor": 1.0}, "compress_factor is 1.0"),
        ({"reduction": 1.0}, "reduction is 1.0"),
        ({"bnAfter": False}, "bnAfter is False"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("ranet", num_classes=3, **{**TINY, **options})


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size_and_cost(name, is_cifar, on_meta):
    num_classes, millions, operations = PUBLISHED[name]
    net = on_meta(name, num_classes=num_classes)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    side = 32 if is_cifar(name) else 224
    assert [round(n / 1e6, 2) for n in count(net, (3, side, side)).papers] == operations
