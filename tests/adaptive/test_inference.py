import math

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.testing import assert_close

from adaptive.confidence import max_prob
from adaptive.inference import ExitTables, fold_batch_norm, run_adaptive, run_single, stream_adaptive
from adaptive.thresholds import EVERYBODY, NOBODY, exit_of, quota_thresholds
from models import MultiExitModel
from tests.test_models import SMALL, small

ORDERS = {
    "latency": {"order": "latency"},
    "throughput, one by one": {"order": "throughput", "micro_batch": 1},
    "throughput, 7": {"order": "throughput", "micro_batch": 7},
    "throughput, 64": {"order": "throughput", "micro_batch": 64},
}

networks = pytest.mark.parametrize("name", ["relay", *SMALL])
orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


class Relay(MultiExitModel):
    """Three exits; a stage reads the images and what the exit before it said. Remembers what it was asked to
    do."""

    num_exits = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12 + 4, 8) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.stages, self.answers = [], []

    def begin(self, images):
        return {"images": images.flatten(1), "said": images.new_zeros(len(images), 4)}

    def trunk(self, k, state):
        self.stages.append(
            (k, state["images"][:, 0].int().tolist())
        )  # the first pixel tells which image it is
        return self.layers[k](torch.cat([state["images"], state["said"]], dim=1)).tanh(), state

    def head(self, k, features):
        self.answers.append(k)
        return 3 * self.heads[k](features)

    def carry(self, k, state, logits):
        return {**state, "said": logits}


class Mute(Relay):
    """The same, but no stage reads what an exit said."""

    carry = MultiExitModel.carry


@torch.no_grad()
def toy(count=50, model_class=Relay):
    """The network, and images whose first pixel is their position."""
    torch.manual_seed(0)
    images, model = torch.randn(count, 3, 2, 2, dtype=torch.float64), model_class().double().eval()
    images[:, 0, 0, 0] = torch.arange(count)
    for layer in model.layers:
        layer.weight[:, 0] = 0
    return model, images


@torch.no_grad()
def subject(name, count=50):
    """A network, images, and thresholds at which as many leave at every exit, at most a third."""
    model, images = toy(count) if name == "relay" else small(name)
    images = torch.cat([images, torch.randn(count, *images.shape[1:], dtype=torch.float64)])[:count]
    surety = max_prob(torch.stack(model(images)))
    # Just below the sample that sets it: a batch of another size may round another way.
    thresholds = quota_thresholds(surety, torch.full((model.num_exits,), 1 / max(3, model.num_exits))) - 1e-9
    if name == "relay":
        model.stages.clear()
    return model, images, thresholds


@torch.no_grad()
def simulated(model, images, thresholds):
    logits = torch.stack(model(images))
    exits = exit_of(max_prob(logits), thresholds)
    return logits[exits, torch.arange(len(images))], exits


def check_against_simulation(model, images, thresholds, order):
    logits, exits = run_adaptive(model, images, thresholds, **order)
    expected, left_at = simulated(model, images, thresholds)
    assert torch.equal(exits, left_at)
    assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    return exits


@networks
@orders
def test_early_exit_is_the_simulation(name, order):
    model, images, thresholds = subject(name, count=23)
    exits = check_against_simulation(model, images, thresholds, order)
    assert exits.unique().tolist() == list(range(model.num_exits))


@networks
@orders
@pytest.mark.parametrize("count", [1, 3])
def test_few_images(name, order, count):
    model, images, thresholds = subject(name, count=9)
    check_against_simulation(model, images[:count], thresholds, order)


@networks
@orders
@pytest.mark.parametrize(("threshold", "exit_index"), [(EVERYBODY, 0), (NOBODY, -1)])
def test_all_leave_at_one_exit(name, order, threshold, exit_index):
    model, images, _ = subject(name, count=9)
    exits = check_against_simulation(model, images, torch.full((model.num_exits,), threshold), order)
    assert exits.tolist() == [range(model.num_exits)[exit_index]] * 9


@orders
def test_early_exit_uses_the_confidence_asked_for(order):
    model, images, _ = subject("relay")
    exits = run_adaptive(model, images, torch.tensor([-1.0, -1.0, EVERYBODY]), "entropy", **order)[1]
    entropies = [torch.distributions.Categorical(logits=logits).entropy() for logits in model(images)]
    expected = torch.where(entropies[0] <= 1, 0, torch.where(entropies[1] <= 1, 1, 2))
    assert torch.equal(exits, expected) and exits.unique().tolist() == [0, 1, 2]


@orders
def test_a_sample_on_the_threshold_leaves(order):
    model, images, _ = subject("relay", count=1)
    surety = max_prob(model(images)[0]).detach()
    for threshold, expected in ((surety, 0), (torch.nextafter(surety, torch.ones(1).double()), 1)):
        thresholds = torch.cat([threshold, torch.tensor([EVERYBODY, EVERYBODY])])
        assert run_adaptive(model, images, thresholds, **order)[1].item() == expected


@orders
def test_stages_see_exactly_the_samples_that_are_still_there(order):
    model, images, thresholds = subject("relay")
    exits = run_adaptive(model, images, thresholds, **order)[1]
    for k in range(3):
        seen = sorted(i for stage, ids in model.stages if stage == k for i in ids)
        assert seen == (exits >= k).nonzero().flatten().tolist()


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_throughput_order_runs_full_micro_batches_until_the_end(micro_batch):
    model, images, thresholds = subject("relay")
    exits = run_adaptive(model, images, thresholds, order="throughput", micro_batch=micro_batch)[1]
    for k in range(3):
        sizes, total = [len(ids) for stage, ids in model.stages if stage == k], int((exits >= k).sum())
        assert sizes == [micro_batch] * (total // micro_batch) + [total % micro_batch] * (
            total % micro_batch > 0
        )


def test_latency_order_runs_every_stage_once():
    model, images, thresholds = subject("relay")
    run_adaptive(model, images, thresholds)
    assert [k for k, _ in model.stages] == [0, 1, 2]


@pytest.mark.parametrize("micro_batch", [None, 1, 7, 64])
def test_a_stream_of_batches_is_the_simulation(micro_batch):
    model, images, thresholds = subject("relay")
    batches = iter(images.split([20, 1, 16, 13]))
    answers = list(stream_adaptive(model, batches, thresholds, micro_batch=micro_batch))
    ids, logits, exits = (torch.cat(parts) for parts in zip(*answers, strict=True))
    assert sorted(ids.tolist()) == list(range(50))
    expected, left_at = simulated(model, images, thresholds)
    assert torch.equal(exits, left_at[ids])
    assert_close(logits, expected[ids], rtol=1e-12, atol=1e-12)


def test_without_micro_batches_a_stream_answers_each_batch_before_it_takes_the_next():
    model, images, thresholds = subject("relay")
    taken = []

    def batches():
        for i in range(5):
            taken.append(i)
            yield images[10 * i : 10 * i + 10]

    for ids, _, _ in stream_adaptive(model, batches(), thresholds):
        assert (ids // 10 == taken[-1]).all()
    assert taken == [0, 1, 2, 3, 4]


def test_a_stream_holds_few_samples_of_a_long_stream():
    model, images, thresholds = subject("relay")
    taken = 0

    def batches():
        nonlocal taken
        for part in images.split(7):
            taken += len(part)
            yield part

    given = 0
    for ids, _, _ in stream_adaptive(model, batches(), thresholds, micro_batch=7):
        assert taken - given <= 3 * 2 * 7
        given += len(ids)
    assert given == 50


def test_unknown_order_is_refused():
    model, images = toy(1)
    with pytest.raises(ValueError, match="unknown order 'fast'; accepted: latency, throughput"):
        run_adaptive(model, images, torch.zeros(3), order="fast")


def test_unknown_confidence_is_refused():
    model, images = toy(1)
    with pytest.raises(ValueError, match="unknown confidence 'maxprob'"):
        run_adaptive(model, images, torch.zeros(3), "maxprob")


@networks
def test_one_exit_alone_answers_as_in_the_forward_pass(name):
    model, images, _ = subject(name, count=5)
    with torch.no_grad():
        exits = model(images)
    for k in range(model.num_exits):
        assert torch.equal(run_single(model, images, k), exits[k])


@pytest.mark.parametrize(("model_class", "heads"), [(Mute, [2]), (Relay, [0, 1, 2])])
def test_one_exit_alone_spares_heads_that_no_stage_reads(model_class, heads):
    model, images = toy(3, model_class)
    run_single(model, images, 2)
    assert model.answers == heads
    assert [k for k, _ in model.stages] == [0, 1, 2]


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_folding_batch_norm_changes_no_answer_and_not_the_original(name):
    model, images = small(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images)
    folded = fold_batch_norm(model.train())
    assert model.training and not folded.training
    for a, b in zip(folded(images), expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_folded_msdnet_has_no_batch_norm_left():
    model, _ = small("msdnet")
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold_batch_norm(model).modules())


class Chain(MultiExitModel):
    """One exit: a sequence of layers."""

    num_exits = 1

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def begin(self, images):
        return images

    def trunk(self, k, state):
        return self.layers(state), None

    def head(self, k, features):
        return features.mean((2, 3))


class HalvedConv2d(nn.Conv2d):
    """A convolution whose weights are not the ones it stores."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / (1 + self.weight.norm()), self.bias)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 4, 3), BatchNormAct2d(4)),  # activates as well, as in timm's resnetv2_50d
        (HalvedConv2d(3, 4, 3), nn.BatchNorm2d(4)),
        (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    ],
    ids=["batch norm with activation", "weights made in passing", "batch norm first", "activation between"],
)
def test_folding_leaves_alone_what_it_would_change(layers):
    torch.manual_seed(0)
    model, images = Chain(*layers).double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        model(images)
        assert_close(fold_batch_norm(model)(images), model.eval()(images), rtol=1e-9, atol=1e-9)


def test_tables_of_a_batch():
    logits = torch.zeros(2, 2, 6)
    logits[0, 0, 1] = logits[1, 1, 5] = 2.0
    logits[0, 1] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    tables = ExitTables.of(list(logits), torch.tensor([1, 5]))
    total = math.exp(2) + 5
    ramp = sum(math.exp(i) for i in range(6))
    assert_close(
        tables.confidence,
        torch.tensor([[math.exp(2) / total, math.exp(5) / ramp], [1 / 6, math.exp(2) / total]]),
    )
    assert tables.correct[:, 1].tolist() == [False, True] and tables.correct[0, 0]
    assert tables.correct5[0].tolist() == [True, False] and tables.correct5[1, 1]
    assert_close(
        tables.loss, torch.tensor([[math.log(total) - 2, math.log(ramp)], [math.log(6), math.log(total) - 2]])
    )
    assert len(tables) == 2


def test_tables_take_any_confidence_and_few_classes():
    logits = torch.tensor([[[2.0, 0.0, 0.0]]])
    tables = ExitTables.of(list(logits), torch.tensor([2]), "energy_logits")
    assert tables.confidence.item() == pytest.approx(math.log(math.exp(2) + 2))
    assert not tables.correct.item() and tables.correct5.item()


def numbered(*numbers):
    """Tables of two exits whose every entry tells the sample."""
    row = torch.tensor(numbers)
    two = torch.stack([row, row + 100])
    hits = torch.stack([row > 3, row > 4])
    return ExitTables(two, hits, row.expand(2, -1) > 0, -row.expand(2, -1), torch.stack([two, -two]), row)


def check_samples(tables, *numbers):
    expected = numbered(*numbers)
    for column in ("confidence", "correct", "correct5", "loss", "scores", "targets"):
        assert torch.equal(getattr(tables, column), getattr(expected, column))
    assert len(tables) == len(numbers)


def test_tables_join_in_order():
    check_samples(ExitTables.cat([numbered(5, 3), numbered(4)]), 5, 3, 4)


def test_tables_of_shards_interleave():
    check_samples(ExitTables.interleave([numbered(0, 3, 6), numbered(1, 4), numbered(2, 5)]), *range(7))


def test_part_of_a_table():
    check_samples(numbered(7, 8, 9, 0).part(torch.tensor([2, 0])), 9, 7)


def test_nothing_to_run_and_thresholds_of_another_network_are_refused():
    model, images = small("msdnet")
    with pytest.raises(ValueError, match="no images to run"):
        run_adaptive(model.eval(), images[:0], torch.zeros(model.num_exits))
    with pytest.raises(ValueError, match=f"9 thresholds for a network with {model.num_exits} exits"):
        run_adaptive(model.eval(), images, torch.zeros(9))
