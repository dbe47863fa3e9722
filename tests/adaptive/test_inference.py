from functools import cache
from typing import NamedTuple

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.testing import assert_close

from adaptive.confidence import max_prob
from adaptive.inference import fold_batch_norm, run_adaptive, run_single, stream_adaptive
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.thresholds import EVERYBODY, NOBODY, exit_of, quota_thresholds
from models import MultiExitModel

ORDERS = {
    "latency": {"order": "latency"},
    "throughput, one by one": {"order": "throughput", "micro_batch": 1},
    "throughput, 7": {"order": "throughput", "micro_batch": 7},
    "throughput, 64": {"order": "throughput", "micro_batch": 64},
}

orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
# Of 23 images, a micro-batch of 64 is one batch, as in latency order: such tests are of the relay's 50 images.
few_orders = pytest.mark.parametrize(
    "order", [ORDERS[name] for name in list(ORDERS)[:3]], ids=list(ORDERS)[:3]
)


@torch.no_grad()
def toy(model_class, count=50):
    """The network, and images whose first pixel is their position."""
    torch.manual_seed(0)
    images, model = torch.randn(count, 3, 2, 2, dtype=torch.float64), model_class().double().eval()
    images[:, 0, 0, 0] = torch.arange(count)
    for layer in model.layers:
        layer.weight[:, 0] = 0
    return model, images


class Subject(NamedTuple):
    """A network, images, its answers to them [K, N, C], and thresholds at which as many leave at every exit,
    at most a third."""

    model: MultiExitModel
    images: torch.Tensor
    logits: torch.Tensor
    thresholds: torch.Tensor


@torch.no_grad()
def subject_of(model, images):
    logits = torch.stack(model(images))
    surety = max_prob(logits)
    # Just below the sample that sets it: a batch of another size may round another way.
    thresholds = quota_thresholds(surety, torch.full((model.num_exits,), 1 / max(3, model.num_exits))) - 1e-9
    return Subject(model, images, logits, thresholds)


@pytest.fixture(scope="session")
def subject(small, relay_class):
    """`subject(name)`: 23 images of a family, which is asked about them once, or 50 of a new relay."""

    @cache
    def of_family(name):
        torch.manual_seed(0)
        model, images = small(name)
        more = torch.randn(18, *images.shape[1:], dtype=torch.float64)
        return subject_of(model, torch.cat([images, more]))

    def make(name):
        if name != "relay":
            return of_family(name)
        relay = subject_of(*toy(relay_class))
        relay.model.stages.clear()
        return relay

    return make


def simulated(logits, thresholds):
    exits = exit_of(max_prob(logits), thresholds)
    return logits[exits, torch.arange(logits.shape[1])], exits


def check_against_simulation(subject, count, thresholds, order):
    """Compares real early exit on the first `count` images with the simulation by tables."""
    logits, exits = run_adaptive(subject.model, subject.images[:count], thresholds, **order)
    expected, left_at = simulated(subject.logits[:, :count], thresholds)
    assert torch.equal(exits, left_at)
    assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    return exits


@few_orders
def test_early_exit_is_the_simulation(subject, family_or_relay, order):
    given = subject(family_or_relay)
    exits = check_against_simulation(given, 23, given.thresholds, order)
    assert exits.unique().tolist() == list(range(given.model.num_exits))


@orders
@pytest.mark.parametrize("count", [1, 3])
def test_few_images(subject, family_or_relay, order, count):
    given = subject(family_or_relay)
    check_against_simulation(given, count, given.thresholds, order)


@pytest.mark.parametrize("order", [ORDERS["latency"], ORDERS["throughput, 7"]], ids=["latency", "throughput"])
@pytest.mark.parametrize(("threshold", "exit_index"), [(EVERYBODY, 0), (NOBODY, -1)])
def test_all_leave_at_one_exit(subject, family_or_relay, order, threshold, exit_index):
    given = subject(family_or_relay)
    exits = check_against_simulation(given, 9, torch.full((given.model.num_exits,), threshold), order)
    assert exits.tolist() == [range(given.model.num_exits)[exit_index]] * 9


@orders
def test_early_exit_uses_the_confidence_asked_for(order, subject):
    model, images, *_ = subject("relay")
    exits = run_adaptive(model, images, torch.tensor([-1.0, -1.0, EVERYBODY]), "entropy", **order)[1]
    entropies = [torch.distributions.Categorical(logits=logits).entropy() for logits in model(images)]
    expected = torch.where(entropies[0] <= 1, 0, torch.where(entropies[1] <= 1, 1, 2))
    assert torch.equal(exits, expected) and exits.unique().tolist() == [0, 1, 2]


READINGS = {
    "recall": {"answer": "best"},
    "mean": {"answer": "mean"},
    "agreement": {"confidence": "agreement"},
    "agreement of means": {"confidence": "agreement", "answer": "mean"},
    "temperatures": {"temperatures": (0.5, 2.0, 1.0)},
}


@orders
@pytest.mark.parametrize("options", READINGS.values(), ids=READINGS)
def test_every_way_to_read_logits_is_as_simulated(order, subject, options):
    model, images, logits, _ = subject("relay")
    reading = Reading(**options)
    confidence = reading.confidences(logits)
    # Between two values, so that no rounding decides.
    limits = [2.0, 2.0] if reading.agreement else (confidence[:2].quantile(0.7, dim=1) + 1e-9).tolist()
    policy = Policy((*limits, EVERYBODY), **options)
    answers, exits = run_adaptive(model, images, policy, **order)
    left_at = policy.exit_of(confidence)
    assert torch.equal(exits, left_at) and len(exits.unique()) > 1
    read = torch.stack([one.answers for one in reading.read_all(logits)])
    assert_close(answers, read[left_at, torch.arange(len(images))], rtol=1e-9, atol=1e-9)


def test_exits_that_are_off_are_not_asked(subject, family_or_relay):
    given = subject(family_or_relay)
    off = tuple(range(given.model.num_exits - 1))[::2]
    limits = given.thresholds.index_fill(0, torch.tensor(off, dtype=torch.int64), NOBODY)
    policy = Policy(tuple(limits.tolist()), off=off)
    asked, head = [], given.model.head
    given.model.head = lambda k, features: asked.append(k) or head(k, features)
    try:
        logits, exits = run_adaptive(given.model, given.images, policy, **ORDERS["throughput, 7"])
    finally:
        del given.model.head
    expected, left_at = simulated(given.logits, limits)
    assert torch.equal(exits, left_at)
    assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert not {k for k in off if not given.model.reads_logits(k)} & set(asked)


@orders
def test_a_sample_on_the_threshold_leaves(order, subject):
    model, images, *_ = subject("relay")
    images = images[:1]
    surety = max_prob(model(images)[0]).detach()
    for threshold, expected in ((surety, 0), (torch.nextafter(surety, torch.ones(1).double()), 1)):
        thresholds = torch.cat([threshold, torch.tensor([EVERYBODY, EVERYBODY])])
        assert run_adaptive(model, images, thresholds, **order)[1].item() == expected


@orders
def test_stages_see_exactly_the_samples_that_are_still_there(order, subject):
    model, images, _, thresholds = subject("relay")
    exits = run_adaptive(model, images, thresholds, **order)[1]
    for k in range(3):
        seen = sorted(i for stage, ids in model.stages if stage == k for i in ids)
        assert seen == (exits >= k).nonzero().flatten().tolist()


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_throughput_order_runs_full_micro_batches_until_the_end(micro_batch, subject):
    model, images, _, thresholds = subject("relay")
    exits = run_adaptive(model, images, thresholds, order="throughput", micro_batch=micro_batch)[1]
    for k in range(3):
        sizes, total = [len(ids) for stage, ids in model.stages if stage == k], int((exits >= k).sum())
        assert sizes == [micro_batch] * (total // micro_batch) + [total % micro_batch] * (
            total % micro_batch > 0
        )


def test_latency_order_runs_every_stage_once(subject):
    model, images, _, thresholds = subject("relay")
    run_adaptive(model, images, thresholds)
    assert [k for k, _ in model.stages] == [0, 1, 2]


@pytest.mark.parametrize("micro_batch", [None, 1, 7, 64])
def test_a_stream_of_batches_is_the_simulation(micro_batch, subject):
    model, images, table, thresholds = subject("relay")
    batches = iter(images.split([20, 1, 16, 13]))
    answers = list(stream_adaptive(model, batches, thresholds, micro_batch=micro_batch))
    ids, logits, exits = (torch.cat(parts) for parts in zip(*answers, strict=True))
    assert sorted(ids.tolist()) == list(range(50))
    expected, left_at = simulated(table, thresholds)
    assert torch.equal(exits, left_at[ids])
    assert_close(logits, expected[ids], rtol=1e-12, atol=1e-12)


def test_without_micro_batches_a_stream_answers_each_batch_before_it_takes_the_next(subject):
    model, images, _, thresholds = subject("relay")
    taken = []

    def batches():
        for i in range(5):
            taken.append(i)
            yield images[10 * i : 10 * i + 10]

    for ids, _, _ in stream_adaptive(model, batches(), thresholds):
        assert (ids // 10 == taken[-1]).all()
    assert taken == [0, 1, 2, 3, 4]


def test_a_stream_holds_few_samples_of_a_long_stream(subject):
    model, images, _, thresholds = subject("relay")
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


def test_unknown_order_is_refused(relay_class):
    model, images = toy(relay_class, 1)
    with pytest.raises(ValueError, match="unknown order 'fast'; accepted: latency, throughput"):
        run_adaptive(model, images, torch.zeros(3), order="fast")


def test_unknown_confidence_is_refused(relay_class):
    model, images = toy(relay_class, 1)
    with pytest.raises(ValueError, match="unknown confidence 'maxprob'"):
        run_adaptive(model, images, torch.zeros(3), "maxprob")


def test_one_exit_alone_answers_as_in_the_forward_pass(subject, family_or_relay):
    model, images, *_ = subject(family_or_relay)
    images = images[:5]
    with torch.no_grad():
        exits = model(images)
    for k in range(model.num_exits):
        assert torch.equal(run_single(model, images, k), exits[k])


@pytest.mark.parametrize(("mute", "heads"), [(True, [2]), (False, [0, 1, 2])])
def test_one_exit_alone_spares_heads_that_no_stage_reads(relay_class, mute, heads):
    class Mute(relay_class):
        """No stage reads what an exit said."""

        carry = MultiExitModel.carry

    model, images = toy(Mute if mute else relay_class, 3)
    run_single(model, images, 2)
    assert model.answers == heads
    assert [k for k, _ in model.stages] == [0, 1, 2]


@torch.no_grad()
def test_folding_batch_norm_changes_no_answer_and_not_the_original(family, small):
    model, images = small(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images)
    folded = fold_batch_norm(model.train())
    assert model.training and not folded.training
    for a, b in zip(folded(images), expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_folded_msdnet_has_no_batch_norm_left(small):
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


def test_nothing_to_run_and_thresholds_of_another_network_are_refused(small):
    model, images = small("msdnet")
    with pytest.raises(ValueError, match="no images to run"):
        run_adaptive(model.eval(), images[:0], torch.zeros(model.num_exits))
    with pytest.raises(ValueError, match=f"9 thresholds for a network with {model.num_exits} exits"):
        run_adaptive(model.eval(), images, torch.zeros(9))


@pytest.mark.parametrize("size", [0, -1])
def test_micro_batches_below_one_are_refused(relay_class, size):
    model, images = toy(relay_class, 3)
    for order in ("throughput", "latency"):
        with pytest.raises(ValueError, match=f"^micro_batch is {size}; accepted: 1 and more"):
            run_adaptive(model, images, torch.zeros(3), order=order, micro_batch=size)
    with pytest.raises(ValueError, match=f"^micro_batch is {size}; accepted: 1 and more"):
        stream_adaptive(model, [images], torch.zeros(3), micro_batch=size)


def test_a_network_in_training_mode_is_refused(relay_class):
    model, images = toy(relay_class, 3)
    for run in (run_adaptive, stream_adaptive):
        with pytest.raises(ValueError, match=r"^the network is in training mode; .*: network.eval\(\)$"):
            run(model.train(), [images] if run is stream_adaptive else images, torch.zeros(3))
    assert model.eval() and len(run_adaptive(model, images, torch.zeros(3))[0]) == 3


@orders
def test_a_policy_and_its_thresholds_give_the_same_answers(order, subject):
    model, images, _, thresholds = subject("relay")
    policy = Policy(tuple(thresholds.tolist()), "max_prob")
    expected = run_adaptive(model, images, thresholds, **order)
    for given in (policy, thresholds.tolist()):
        for found, wanted in zip(run_adaptive(model, images, given, **order), expected, strict=True):
            assert torch.equal(found, wanted)
    # A policy has its own kind of confidence.
    exits = run_adaptive(model, images, Policy((-1.0, -1.0, EVERYBODY), "entropy"), **order)[1]
    assert torch.equal(exits, run_adaptive(model, images, [-1.0, -1.0, EVERYBODY], "entropy", **order)[1])
