import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from training.weight_net import (
    WeightNet,
    assign_exits,
    judgement,
    look_ahead,
    loss_table,
    sample_weights,
    weight_inputs,
    write_tables,
)

LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
CLASSES = torch.tensor([0, 1])


# The weight net and what it reads


def test_the_weight_net_has_the_published_keys_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in WeightNet(6, 3, hidden=5, layers=3).state_dict().items()}
    assert shapes == {
        "first_hidden_layer.fc.weight": (5, 6),
        "first_hidden_layer.fc.bias": (5,),
        "rest_hidden_layers.0.fc.weight": (5, 5),
        "rest_hidden_layers.0.fc.bias": (5,),
        "rest_hidden_layers.1.fc.weight": (5, 5),
        "rest_hidden_layers.1.fc.bias": (5,),
        "output_layer.weight": (3, 5),
        "output_layer.bias": (3,),
    }
    assert len(WeightNet(2, 2).state_dict()) == 4 and WeightNet(2, 2).output_layer.in_features == 100


def test_the_weight_net_is_relu_then_tanh():
    net = WeightNet(2, 1, hidden=2)
    with torch.no_grad():
        net.first_hidden_layer.fc.weight.copy_(torch.eye(2))
        net.first_hidden_layer.fc.bias.copy_(torch.tensor([0.5, 0.5]))
        net.output_layer.weight.copy_(torch.tensor([[2.0, 7.0]]))
        net.output_layer.bias.fill_(-1.0)
    assert net(torch.tensor([[1.0, -2.0]])).item() == pytest.approx(math.tanh(2 * 1.5 - 1))


def test_loss_tables_have_a_row_per_sample_and_a_column_per_exit():
    exits = [LOGITS, LOGITS.flip(1)]
    expected = [[math.log(4 / 3), math.log(4)], [math.log(2), math.log(2)]]
    assert_close(loss_table(exits, CLASSES), torch.tensor(expected))
    smooth = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)  # a smoothing of 0.2 gives each class 0.1
    assert loss_table(exits, CLASSES, 0.2)[0, 0].item() == pytest.approx(smooth)
    assert loss_table([LOGITS.bfloat16()], CLASSES).dtype == torch.float32


def test_inputs_are_losses_confidences_or_both_without_gradient():
    losses, confidence = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    for kind, parts in {"loss": [losses], "conf": [confidence], "both": [losses, confidence]}.items():
        inputs = weight_inputs(kind, losses, confidence)
        assert torch.equal(inputs, torch.cat(parts, 1)) and not inputs.requires_grad


@pytest.mark.parametrize(
    ("centring", "expected"),
    [
        ("mat", [[1.1, 0.6], [1.35, 0.95]]),  # 0.3 less
        ("col", [[1.25, 0.75], [1.2, 0.8]]),  # 0 less in row 0, 0.6 in row 1
        ("row", [[0.875, 0.825], [1.125, 1.175]]),  # 0.75 less in column 0, -0.15 in column 1
    ],
)
def test_centring_by_hand(centring, expected):
    raw = torch.tensor([[0.5, -0.5], [1.0, 0.2]], dtype=torch.float64)
    assert_close(sample_weights(raw, 0.5, centring), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("centring", "kept"), [("mat", (0, 1)), ("col", 1), ("row", 0)])
def test_centring_keeps_its_totals_and_no_others(centring, kept):
    torch.manual_seed(0)
    raw = torch.empty(5, 3, dtype=torch.float64).uniform_(-1, 1).requires_grad_()
    weights = sample_weights(raw, 0.8, centring)
    totals = {over: weights.sum(over) - torch.ones(5, 3).sum(over) for over in ((0, 1), 0, 1)}
    assert totals[kept].abs().max() < 1e-12 and totals[0, 1].abs() < 1e-12
    assert all(totals[over].abs().max() > 0.1 for over in {0, 1} - {kept})
    # Raising a raw weight lowers the others, by way of the mean.
    (slope,) = torch.autograd.grad(weights[0, 0], raw)
    share = 1 / {"mat": 15, "col": 3, "row": 5}[centring]
    assert slope[0, 0].item() == pytest.approx(0.8 * (1 - share))
    assert slope.sum().item() == pytest.approx(0)


def test_weights_are_negative_only_above_half():
    raw = torch.tensor([[1.0, 1.0, -1.0]])
    assert sample_weights(raw, 0.8, "col")[0, 2].item() == pytest.approx(1 - 0.8 * 4 / 3)
    many = torch.ones(1, 1000).index_fill(
        1, torch.tensor([7]), -1.0
    )  # the least that a centred weight can be
    assert 0 < sample_weights(many, 0.5, "col").min() < 0.01


# The look-ahead

SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "momentum 0": {"momentum": 0.0, "dampening": 0.5},
}


def two_groups(optimizer_class=torch.optim.SGD, **options):
    """A network, and an optimizer with other rates for the biases; one parameter never gets a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).double()
    net.unread = nn.Parameter(torch.ones(2, dtype=torch.float64))
    weights, biases = (
        [p for name, p in net.named_parameters() if name.endswith("bias") == b] for b in (False, True)
    )
    groups = [
        {"params": weights, "lr": 0.1, "weight_decay": 0.3},
        {"params": biases, "lr": 0.7, "weight_decay": 0.0},
    ]
    return net, optimizer_class(groups, **options)


def read(net):
    return [p for p in net.parameters() if p is not net.unread]


def step(net, optimizer):
    """A real step on gradients that are drawn."""
    for p in read(net):
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
def test_the_look_ahead_is_the_optimizers_next_step_and_changes_nothing(options, before):
    net, optimizer = two_groups(**options)
    for _ in range(before):
        step(net, optimizer)
    gradients = {p: torch.randn_like(p) for p in read(net)}
    state = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    given = copy.deepcopy(list(gradients.values()))
    moved, rates = look_ahead(optimizer, gradients)
    assert_close([net.state_dict(), optimizer.state_dict()], state, rtol=0, atol=0)
    assert_close(list(gradients.values()), given, rtol=0, atol=0)
    assert set(moved) == set(rates) == set(gradients) and all(p.grad is None for p in net.parameters())
    assert not any(t.requires_grad for t in moved.values())

    more = {p: gradient + 2.0 for p, gradient in gradients.items()}
    moved_more, _ = look_ahead(optimizer, more)
    for p in gradients:
        assert_close(moved_more[p] - moved[p], torch.full_like(p, 2 * rates[p]))

    for p, gradient in gradients.items():
        p.grad = gradient
    optimizer.step()
    assert_close([moved[p] for p in read(net)], read(net), rtol=1e-14, atol=1e-14)


def test_adam_is_looked_ahead_as_sgd_without_momentum():
    (net, adam), (same, sgd) = two_groups(torch.optim.AdamW), two_groups()
    step(net, adam)
    same.load_state_dict(net.state_dict())
    gradients = {p: torch.randn_like(p) for p in read(net)}
    moved, rates = look_ahead(adam, gradients)
    assert [rates[p] for p in read(net)] == [-0.1, -0.7] * 3
    for p, twin in zip(read(net), read(same), strict=True):
        twin.grad = gradients[p]
    sgd.step()
    assert_close([moved[p] for p in read(net)], read(same))


# Who is judged where


def counts(exits):
    return [len(rows) for rows in exits]


def test_exits_take_their_most_confident_of_those_left():
    confidence = torch.tensor([[0.9, 0.1], [0.5, 0.8], [0.7, 0.99], [0.8, 0.2]])
    assert [rows.tolist() for rows in assign_exits(confidence, torch.tensor([0.5, 0.5]))] == [[0, 3], [2, 1]]
    thrice = torch.tensor([[0.9, 0.3, 0.1], [0.8, 0.9, 0.2], [0.7, 0.4, 0.3], [0.6, 0.5, 0.9]])
    # Sample 1 is exit 1's surest, sample 0 is gone; the last exit takes the rest, whatever its share.
    assert [rows.tolist() for rows in assign_exits(thrice, torch.tensor([0.25, 0.25, 0.1]))] == [
        [0],
        [1],
        [3, 2],
    ]


def test_shares_are_rounded_down_in_single_precision():
    # 0.29 * 100 is 28.999999999999996 in double precision, 29 in single; 0.7 in single precision is below
    # 0.7.
    confidence = torch.rand(100, 2)
    for proportions in (torch.tensor([0.29, 0.71], dtype=torch.float64), torch.tensor([0.29, 0.71])):
        assert counts(assign_exits(confidence.double(), proportions)) == [29, 71]
    assert counts(assign_exits(confidence[:10], torch.tensor([0.7, 0.3]))) == [7, 3]
    assert counts(assign_exits(confidence[:10], torch.tensor([0.79, 0.21]))) == [7, 3]


@pytest.mark.parametrize(
    ("proportions", "expected"),
    [
        ([0.0, 0.5, 0.5], [0, 5, 5]),
        ([0.09, 0.0, 0.91], [0, 0, 10]),  # less than one sample
        ([0.8, 0.8, 0.1], [8, 2, 0]),  # more than are left
        ([1.0, 0.5, 0.5], [10, 0, 0]),
        ([0.3, 0.3, 0.0], [3, 3, 4]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_sample_is_judged_once(proportions, expected, tied):
    torch.manual_seed(0)
    confidence = torch.full((10, 3), 0.5) if tied else torch.rand(10, 3)
    exits = assign_exits(confidence, torch.tensor(proportions))
    assert counts(exits) == expected
    assert sorted(torch.cat(exits).tolist()) == list(range(10))
    if tied:  # in order of place, so that runs repeat
        assert torch.cat(exits).tolist() == list(range(10))
    for k, rows in enumerate(exits):
        column = confidence[rows, k]
        assert torch.equal(column, column.sort(descending=True).values)


def test_the_judgement_is_a_sum_of_means_over_exits_with_samples():
    exits = [LOGITS, LOGITS.flip(1), 2 * LOGITS]
    whole = judgement(exits, CLASSES, [torch.tensor([1]), torch.tensor([]).long(), torch.tensor([0])])
    assert whole.item() == pytest.approx(math.log(2) + math.log(10 / 9))  # odds of 9
    mean = judgement(exits, CLASSES, [torch.tensor([]).long(), torch.tensor([1, 0]), torch.tensor([]).long()])
    assert mean.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_an_exit_without_samples_gets_no_gradient_from_the_judgement():
    logits = torch.randn(2, 4, 3, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    loss = judgement(list(logits), targets, [torch.tensor([]).long(), torch.tensor([3, 1, 0, 2])])
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(logits[1], targets).item())
    assert logits.grad[0].eq(0).all() and logits.grad[1].ne(0).all()


# Files


def test_tables_of_all_processes_are_written_in_order_of_their_images(tmp_path):
    shards = [
        {"index": torch.tensor([70000, 3]), "losses": torch.tensor([[1.0, 2.0], [0.1, 4.0]])},
        {"index": torch.tensor([0, 5]), "losses": torch.tensor([[5.0, 6.0], [7.0, 8.0]])},
    ]
    write_tables(tmp_path / "t.npz", shards)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        tables = dict(file)
    assert tables.keys() == {"index", "losses"}
    assert tables["index"].dtype.kind == "i" and tables["index"].tolist() == [0, 3, 5, 70000]
    assert tables["losses"].dtype == np.float16
    assert np.array_equal(tables["losses"], np.array([[5, 6], [0.1, 4], [7, 8], [1, 2]], np.float16))
