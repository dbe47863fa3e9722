from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adaptive import timing
from adaptive.confidence import max_prob
from adaptive.flops import exit_costs, single_costs
from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY, NOBODY, exit_of, quota_thresholds
from adaptive.timing import (
    MICRO_BATCHES,
    Contestant,
    Deployed,
    compare_orders,
    early_contestants,
    interleaved,
    measure,
    percentile,
    static_contestants,
)
from models import MultiExitModel

CPU = torch.device("cpu")
STATIC = ["all exits, plain", "all exits", "exit 0 alone", "exit 1 alone"]
EARLY = ["throughput", "latency"]


class Tiny(MultiExitModel):
    """Two exits of linear layers."""

    num_exits = 2

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8)])
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def begin(self, images):
        return images.flatten(1)

    def trunk(self, k, state):
        x = self.stages[k](state).tanh()
        return x, x

    def head(self, k, features):
        return 3 * self.heads[k](features)


@pytest.fixture
def subject():
    """A network, 20 images, thresholds at which half leave early, and the exits by simulation."""
    torch.manual_seed(0)
    model, images = Tiny().double().eval(), torch.randn(20, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        surety = max_prob(torch.stack(model(images)))
    thresholds = quota_thresholds(surety, torch.tensor([0.5, 0.5])) - 1e-9
    exits = exit_of(surety, thresholds)
    assert exits.sum() == 10
    return model, images, thresholds, exits


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told: `clock.now += seconds`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def contestants_of(deployed, thresholds):
    return static_contestants(deployed) | early_contestants(deployed, Policy.of(thresholds))


def answers_of(model, images):
    with torch.no_grad():
        return model(images)


def test_percentile():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([4.0, 1.0, 3.0, 2.0], 1) == 4
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile([7.0], 0.95) == 7


def test_calls_take_turns(clock):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    interleaved(calls, rounds=3, device=CPU)
    assert "".join(order) == "ABABAB"


def test_times_are_medians(clock):
    durations = {"A": [1, 2, 9], "B": [30, 10, 20]}

    def call(name):
        clock.now += durations[name].pop(0)

    calls = {name: lambda name=name: call(name) for name in "AB"}
    assert interleaved(calls, rounds=3, device=CPU) == {"A": 2, "B": 20}


def test_contestants_are_early_exit_and_static_networks(subject):
    model, images, thresholds, _ = subject
    contestants = contestants_of(Deployed(model, model, images, images), thresholds)
    whole, alone = exit_costs(model, (3, 2, 2))[-1], single_costs(model, (3, 2, 2))
    leaving = dict(zip(STATIC, [1, 1, 0, 1], strict=True))
    assert {name: contestants[name].costs[k] for name, k in leaving.items()} == dict(
        zip(STATIC, [whole, whole, *alone], strict=True)
    )
    assert [contestants[name].costs for name in EARLY] == [exit_costs(model, (3, 2, 2))] * 2
    assert [one.kind for one in contestants.values()] == ["plain", "static", "static", "static", *EARLY]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_contestants_answer_as_the_network(subject, size):
    model, images, thresholds, simulated = subject
    exits = answers_of(model, images)
    contestants = contestants_of(Deployed(model, model, images, images), thresholds)
    expected = dict(zip(STATIC, [1, 1, 0, 1], strict=True)) | dict.fromkeys(EARLY, simulated)
    for name, one in contestants.items():
        logits, left_at = one.run(one.images, size)
        wanted = torch.as_tensor(expected[name]).expand(20)
        assert torch.equal(left_at, wanted)
        torch.testing.assert_close(logits, torch.stack(exits)[wanted, torch.arange(20)])


def test_only_the_first_contestant_uses_the_network_as_trained(subject):
    model, images, thresholds, _ = subject
    torch.manual_seed(1)
    tuned, other_images = Tiny().double().eval(), images + 1
    contestants = contestants_of(Deployed(model, tuned, images, other_images), thresholds)
    assert contestants["all exits, plain"].images is images
    plain = contestants["all exits, plain"].run(images, 64)[0]
    torch.testing.assert_close(plain, answers_of(model, images)[1])
    for name in (*STATIC[1:], *EARLY):
        assert contestants[name].images is other_images
        logits, exits = contestants[name].run(other_images, 64)
        answers = torch.stack(answers_of(tuned, other_images))
        torch.testing.assert_close(logits, answers[exits, torch.arange(20)])


def test_rows_hold_what_was_measured(subject):
    model, images, thresholds, simulated = subject
    targets = answers_of(model, images)[1].argmax(1)
    targets[:5] = (targets[:5] + 1) % 4
    contestants = contestants_of(Deployed(model, model, images, images), thresholds)
    for name in EARLY:
        contestants[name] = replace(contestants[name], costs=[100, 300])
    rows = measure(contestants, targets, micro_batch=8, rounds=1, singles=3)
    assert [row.contestant for row in rows] == [*STATIC, *EARLY]
    for row in rows:
        assert row.micro_batch == 8 and row.images_per_s > 0
        if row.contestant == "throughput":
            assert row.latency_p50_ms is None and row.latency_p95_ms is None
        else:
            assert 0 < row.latency_p50_ms <= row.latency_p95_ms
    by_name = {row.contestant: row for row in rows}
    assert by_name["all exits"].accuracy == by_name["exit 1 alone"].accuracy == 0.75
    for name in EARLY:
        assert torch.equal(by_name[name].exits, simulated)
        assert by_name[name].macs == 200  # half leave at either exit
    assert by_name["exit 0 alone"].macs == single_costs(model, (3, 2, 2))[0]


def scripted(clock, seconds_of, kind="static", count=40):
    """A contestant that takes `seconds_of(images, size)` and is always right about class 0."""

    def run(images, size):
        clock.now += seconds_of(images, size)
        return torch.eye(3)[:1].expand(len(images), 3), torch.zeros(len(images), dtype=torch.long)

    return Contestant(kind, run, torch.zeros(count, 3, 2, 2), [123.0])


def test_speed_and_latency_are_by_the_clock(clock):
    waits = iter([*[5.0] * 10, 0.001, 0.002, 0.006, 0.003, 0.004, *[0.009] * 35])
    one = scripted(clock, lambda images, size: 0.5 if len(images) > 1 else next(waits))
    (row,) = measure({"a": one}, torch.zeros(40), micro_batch=16, rounds=3, singles=15)
    assert row.images_per_s == pytest.approx(80)
    # ten calls warm up; of the fifteen timed ones the median is 9 ms
    assert row.latency_p50_ms == pytest.approx(9) and row.latency_p95_ms == pytest.approx(9)
    assert row.macs == 123.0 and row.accuracy == 1


def test_latency_is_over_few_images(clock):
    waits = iter([*[5.0] * 4, 0.001, 0.002, 0.006, 0.003])
    one = scripted(clock, lambda images, size: 0.5 if len(images) > 1 else next(waits))
    (row,) = measure({"a": one}, torch.zeros(40), micro_batch=16, rounds=1, singles=4)
    assert row.latency_p50_ms == pytest.approx(2.5)
    assert row.latency_p95_ms == pytest.approx(3 + 0.85 * 3)


def test_every_kind_of_contestant_gets_its_fastest_micro_batch(clock):
    sizes = {"a": 32, "b": 256}
    contestants = {
        name: scripted(clock, lambda images, size, best=best: 1.0 + (size != best), kind=name, count=1100)
        for name, best in sizes.items()
    }
    rows = measure(contestants, torch.zeros(1100), rounds=1, singles=1)
    assert {row.contestant: row.micro_batch for row in rows} == sizes
    assert set(sizes.values()) <= set(MICRO_BATCHES)
    assert [row.images_per_s for row in rows] == [1100, 1100]


def test_the_last_of_a_kind_decides(clock):
    """Of the static networks that is the last exit alone, with which early exit is compared."""
    contestants = {
        f"exit {best}": scripted(clock, lambda images, size, best=best: 1.0 + (size != best), count=256)
        for best in (16, 64, 32)
    }
    rows = measure(contestants, torch.zeros(256), rounds=1, singles=1)
    assert {row.micro_batch for row in rows} == {32}


@pytest.mark.parametrize(
    ("count", "largest"), [(20, 16), (255, 32), (256, 64), (360, 64), (1023, 128), (2000, 256)]
)
def test_only_sizes_that_the_images_fill_several_times_are_tried(clock, count, largest):
    tried = []

    def seconds(images, size):
        tried.append((size, len(images)))
        return 1 / size  # the larger the better

    (row,) = measure({"a": scripted(clock, seconds, count=count)}, torch.zeros(count), rounds=1, singles=1)
    assert row.micro_batch == largest
    choosing = {images for size, images in tried[:-4]}  # then the run, its warm-up, and two single images
    assert choosing == {min(count, 4 * largest)}  # the same whole micro-batches for every size


class Clocked(Tiny):
    """A network whose stages take a known time: some per call, and more per image beyond a cache's size."""

    def trunk(self, k, state):
        self.clock.now += self.seconds(len(state))
        return super().trunk(k, state)

    @staticmethod
    def seconds(count):
        return 8 + count + 4 * max(count - 96, 0)


def test_early_exit_does_not_lose_by_a_size_chosen_on_few_images(clock):
    """A quarter of 360 images is less than a micro-batch of 128, which then seems to be the best one."""
    torch.manual_seed(0)
    model, images = Clocked().double().eval(), torch.randn(360, 3, 2, 2, dtype=torch.float64)
    model.clock = clock
    surety = max_prob(torch.stack(answers_of(model, images)))
    policy = Policy.of(quota_thresholds(surety, torch.tensor([0.3, 0.7])))
    found = compare_orders({"row 0": policy}, Deployed(model, model, images, images), torch.zeros(360))
    rows = {row.contestant: row for row in found.table}
    for row in rows.values():
        assert row.micro_batch == 64
    last, pooled = rows["exit 1 alone"], rows["row 0, throughput order"]
    assert last.images_per_s == 360 / (2 * (5 * (8 + 64) + 8 + 40))
    assert pooled.images_per_s == 360 / (5 * (8 + 64) + 8 + 40 + 3 * (8 + 64) + 8 + 60)
    (point,) = found.points
    assert point.speedup == pytest.approx(816 / 692) and point.speedup_interval == (point.speedup,) * 2


def test_often_compared_contestants_are_timed_in_more_turns(clock):
    order = []

    def noted(name):
        order.append(name)
        return {"a": 1.0, "b": 2.0, "c": 4.0}[name]

    contestants = {
        name: scripted(clock, lambda images, size, name=name: noted(name), kind="throughput")
        for name in "abc"
    }
    rows = measure(contestants, torch.zeros(40), micro_batch=8, rounds=2, often="ac")
    assert "".join(order) == "abc" + 2 * "abcacac"  # after a call each to warm up
    assert [row.seconds for row in rows] == [[1] * 6, [2] * 2, [4] * 6]


def test_comparison_of_operating_points(subject):
    model, images, thresholds, simulated = subject
    points = {"half": thresholds, "nobody": torch.tensor([NOBODY, EVERYBODY])}
    targets = answers_of(model, images)[1].argmax(1)
    policies = {name: Policy.of(limits) for name, limits in points.items()}
    result = compare_orders(policies, Deployed(model, model, images, images), targets, micro_batch=8)
    orders = [f"{name}, {order} order" for name in points for order in EARLY]
    assert [row.contestant for row in result.table] == [*STATIC, *orders]
    assert result.num_images == 20 and len(result.table) == 8
    rate = {row.contestant: row.images_per_s for row in result.table}
    half, nobody = result.points
    assert half.point == "half" and half.thresholds == thresholds.tolist()
    assert half.mismatches == {"latency": 0, "throughput": 0} == nobody.mismatches
    assert half.shares == [0.5, 0.5] and nobody.shares == [0, 1]
    costs, alone = exit_costs(model, (3, 2, 2)), single_costs(model, (3, 2, 2))
    assert half.macs == sum(costs) / 2 and nobody.macs == costs[1]
    assert half.macs_ratio == alone[1] / half.macs
    assert half.speedup == pytest.approx(rate["half, throughput order"] / rate["exit 1 alone"])
    assert half.speedup_over_plain == pytest.approx(rate["half, throughput order"] / rate["all exits, plain"])
    for point in result.points:
        assert point.speedup_interval[0] <= point.speedup <= point.speedup_interval[1]
        low, high = point.speedup_over_plain_interval
        assert low <= point.speedup_over_plain <= high
    assert nobody.accuracy == nobody.static_accuracy == 1
    assert len(result.table[0].seconds) == 9 and len(result.table[1].seconds) == 3


def test_comparison_counts_what_left_elsewhere(subject):
    model, images, thresholds, simulated = subject
    other = torch.ones_like(images)  # the tuned network sees other images: all leave at one exit
    deployed = Deployed(model, model, images, other)
    result = compare_orders({"half": Policy.of(thresholds)}, deployed, simulated, micro_batch=8)
    (point,) = result.points
    assert point.mismatches == {"latency": 10, "throughput": 10}


def test_deployment_tunes_a_copy():
    torch.manual_seed(0)
    model, images = Folding().eval(), torch.randn(2, 3, 4, 4)
    deployed = Deployed.of(model, images, channels_last=True, dtype=torch.bfloat16)
    assert deployed.plain is model and deployed.images is images and model.norm.weight.dtype == torch.float32
    assert isinstance(deployed.tuned.norm, nn.Identity) and deployed.tuned.conv.weight.dtype == torch.bfloat16
    assert deployed.tuned_images.dtype == torch.bfloat16
    assert deployed.tuned_images.is_contiguous(memory_format=torch.channels_last)
    kept = Deployed.of(model, images, fold_bn=False)
    assert isinstance(kept.tuned.norm, nn.BatchNorm2d) and kept.tuned is not model
    assert kept.tuned_images.dtype == torch.float32


class Folding(nn.Module):
    """A convolution with a batch norm behind it."""

    folds = (("conv", "norm"),)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def test_answers_that_are_not_finite_are_not_timed(subject):
    model, images, thresholds, _ = subject
    with torch.no_grad():
        model.heads[1].bias[2] = torch.inf
    with pytest.raises(ValueError) as error:
        compare_orders({"row 1": Policy.of(thresholds)}, Deployed.of(model, images), torch.zeros(20).long())
    assert str(error.value) == "all exits, plain gives the logit inf at exit 1 for image 0 of those timed"
