import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptive import flops
from adaptive.flops import check_side, cost_lines, count, exit_costs, fvcore_counts, single_costs
from models import MultiExitModel, create_model

SHAPE = (3, 8, 8)

# Of the stages below: 3 * 4 * 9 per output of the first convolution, 4 / 2 * 6 * 9 of the grouped one, heads
# of 5.
STEM, SECOND, HEAD0, HEAD1 = 3 * 4 * 9 * 64, 2 * 6 * 9 * 16, 4 * 5, 6 * 5


class Tiny(MultiExitModel):
    """Two exits of convolutions, ReLU, pooling and linear layers."""

    num_exits = 2

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
                ),  # [4, 8, 8]
                nn.Sequential(
                    nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU()
                ),  # [6, 4, 4]
            ]
        )
        pools = [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(4)]
        widths, biases = (4, 6), (True, False)
        self.heads = nn.ModuleList(
            nn.Sequential(pool, nn.Flatten(), nn.Linear(width, 5, bias=bias))
            for pool, width, bias in zip(pools, widths, biases, strict=True)
        )

    def begin(self, images):
        return images

    def trunk(self, k, state):
        x = self.stages[k](state)
        return x, x

    def head(self, k, features):
        return self.heads[k](features)


class Attentive(Tiny):
    """The same with attention among the 64 positions of 4 channels, in two heads, before exit 0."""

    def trunk(self, k, state):
        features, x = super().trunk(k, state)
        if k == 0:
            tokens = x.flatten(2).mT.unflatten(2, (2, 2)).transpose(1, 2)  # (B, heads, positions, channels)
            tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
            features = tokens.transpose(1, 2).flatten(2).mT.unflatten(2, x.shape[2:])
        return features, x


class Distant(Tiny):
    """The same with an operator that nobody has a formula for."""

    def head(self, k, features):
        vectors = features.flatten(2)
        return super().head(k, features) + torch.cdist(vectors, vectors).mean()


class Relaying(Tiny):
    """The same, whose second stage reads what the first exit said."""

    def carry(self, k, state, logits):
        return state + logits.mean()


def test_multiply_adds_by_hand():
    first = STEM + HEAD0
    assert exit_costs(Tiny(), SHAPE) == [first, first + SECOND + HEAD1]


def test_every_operator_of_a_network_has_a_formula():
    costs = count(Tiny(), SHAPE)
    assert costs.macs == exit_costs(Tiny(), SHAPE) and costs.uncounted == []


def test_attention_is_two_products():
    extra = exit_costs(Attentive(), SHAPE)[0] - exit_costs(Tiny(), SHAPE)[0]
    assert extra == 2 * (2 * 64 * 64 * 2)  # heads * positions * positions * channels, each
    assert count(Attentive(), SHAPE).uncounted == []


def test_papers_counter_by_hand():
    # Convolution, ReLU, global pooling, linear with bias.
    first = STEM + 4 * 64 + 4 * 64 + HEAD0 + 5
    # Max pooling 2x2, convolution, ReLU, average pooling 4x4, linear without bias.
    second = 4 * 4 * 16 + SECOND + 6 * 16 + 16 * 6 + HEAD1
    assert count(Tiny(), SHAPE).papers == [first, first + second]


def test_papers_counter_does_not_see_functions():
    assert count(Attentive(), SHAPE).papers == count(Tiny(), SHAPE).papers


def test_operators_without_a_formula_are_reported():
    costs = count(Distant(), SHAPE)
    assert costs.macs == exit_costs(Tiny(), SHAPE)
    assert len(costs.uncounted) == 1 and "cdist" in costs.uncounted[0]


def test_a_second_count_is_the_same():
    model = Tiny()
    assert count(model, SHAPE) == count(model, SHAPE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_precision_does_not_matter(dtype):
    assert exit_costs(Tiny().to(dtype), SHAPE) == exit_costs(Tiny(), SHAPE)


def test_one_exit_alone_spares_the_earlier_heads():
    whole = exit_costs(Tiny(), SHAPE)
    assert single_costs(Tiny(), SHAPE) == [whole[0], whole[1] - HEAD0]


def test_one_exit_alone_needs_the_heads_that_stages_read():
    assert single_costs(Relaying(), SHAPE) == exit_costs(Relaying(), SHAPE)


def test_fvcore_agrees():
    for macs, operators in zip(exit_costs(Tiny(), SHAPE), fvcore_counts(Tiny(), SHAPE), strict=True):
        assert operators["conv"] + operators["linear"] == macs


@pytest.mark.parametrize(
    "counter",
    [count, exit_costs, single_costs, fvcore_counts, lambda model, shape: cost_lines(model, model, shape)],
    ids=["count", "exit_costs", "single_costs", "fvcore_counts", "cost_lines"],
)
def test_counting_leaves_the_model_alone(counter):
    model = Tiny().double()
    model.stages[1].eval().requires_grad_(False)
    weights, modes = dict(model.named_parameters()), [m.training for m in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counter(model, SHAPE)
    after = dict(model.named_parameters())
    assert all(after[key] is weight for key, weight in weights.items())
    assert [p.requires_grad for p in after.values()] == [not key.startswith("stages.1") for key in after]
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    state = model.state_dict()
    assert all(
        state[key].device.type == "cpu" and torch.equal(state[key], value) for key, value in before.items()
    )


def test_table_has_every_exit_under_every_convention():
    lines = cost_lines(Tiny(), Attentive(), SHAPE)
    assert "(3, 8, 8)" in lines[0] and "in millions" in lines[0]
    assert len(lines) == 2 + 2
    ours, published = count(Tiny(), SHAPE), count(Attentive(), SHAPE)
    for k, line in enumerate(lines[2:]):
        total = sum(fvcore_counts(Tiny(), SHAPE)[k].values())
        numbers = [ours.macs[k], published.macs[k], published.papers[k], total]
        assert line.split() == [str(k), *(f"{n / 1e6:.3f}" for n in numbers)]


def test_images_that_are_too_small_are_named_with_the_least_side():
    check_side(Tiny(), 8)
    reason = r"\(Given input size: .*Output size is too small\)"
    line = rf"^--input_size 5: the network cannot read such images {reason}; the least side accepted is 8$"
    with pytest.raises(ValueError, match=line):
        check_side(Tiny(), 5)


def test_a_network_for_one_side_only_says_so(on_meta):
    vit = on_meta("timm/vit_tiny_patch16_224", 3)
    check_side(vit, 224)
    with pytest.raises(ValueError, match=r"\(Input height \(32\) doesn't match model \(224\)\.\)$"):
        check_side(vit, 32)


def test_table_reports_operators_without_a_formula():
    assert cost_lines(Distant(), Distant(), SHAPE)[-1].startswith(
        "not counted for want of a formula: aten._cdist"
    )


def test_table_reports_counters_that_disagree(monkeypatch):
    macs = exit_costs(Tiny(), SHAPE)
    traced = [{"conv": macs[0] - 7, "linear": 7}, {"conv": macs[1] - 7, "batch_norm": 7}]
    monkeypatch.setattr(flops, "fvcore_counts", lambda model, shape: traced)
    lines = cost_lines(Tiny(), Tiny(), SHAPE)
    assert lines[4:] == [
        f"counters disagree at exit 1: torch has {macs[1]} multiply-adds, fvcore {macs[1] - 7}"
    ]


def test_both_counters_count_both_products_of_attention(monkeypatch):
    net = create_model("reg400m_perceiver_t32", num_classes=3)
    ours, traced = count(net, (3, 32, 32)), fvcore_counts(net, (3, 32, 32))
    for macs, operators in zip(ours.macs, traced, strict=True):
        assert sum(operators[name] for name in ("conv", "linear", "attention")) == macs
    # By hand, what exit 3 has beyond exit 2: one position reads 4 tokens through 440 // 8 channels.
    assert traced[3]["attention"] - traced[2]["attention"] == 1 * 4 * 55 * 2
    for name, found in (("count", ours), ("fvcore_counts", traced)):  # they would find the same again
        monkeypatch.setattr(flops, name, lambda model, shape, found=found: found)
    assert not any("disagree" in line for line in cost_lines(net, net, (3, 32, 32)))
