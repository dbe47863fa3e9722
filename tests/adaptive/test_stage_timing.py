"""Stages on a clock that moves only as told, and the latencies that follow from their times."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive import stage_timing, timing
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.stage_timing import StageTimes, latency_at, latency_of, measure_stages
from adaptive.timing import Deployed, early_contestants, measure
from models import MultiExitModel

TRUNKS, HEADS = (0.008, 0.032, 0.016), (0.001, 0.004, 0.002)  # seconds per call


class Clocked(MultiExitModel):
    """Three exits that take a known time; the confidence of later exits reads the logits before."""

    num_exits = 3

    def __init__(self, clock, chained=False):
        super().__init__()
        self.clock, self.chained, self.seen = clock, chained, []
        self.layer = nn.Linear(12, 4)

    def begin(self, images):
        self.clock.now += 0.5 * TRUNKS[0]
        return images.flatten(1)

    def trunk(self, k, state):
        self.seen.append((k, len(state)))
        self.clock.now += TRUNKS[k] * (0.5 if k == 0 else 1)
        return state, state

    def head(self, k, features):
        self.clock.now += HEADS[k]
        return self.layer(features)

    def carry(self, k, state, logits):
        return state + 0 * logits.sum() if self.chained else state

    def reads_logits(self, k):
        return self.chained


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    for module in (timing, stage_timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def deployed(clock):
    torch.manual_seed(0)
    model, images = Clocked(clock).eval(), torch.randn(7, 3, 2, 2)
    return Deployed(model, model, images, images)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_trunk_and_head_has_its_own_time(deployed, batch):
    times = measure_stages(deployed, batch=batch, rounds=4, machine="a clock")
    assert times.costs.trunks == pytest.approx([1e3 * t / batch for t in TRUNKS])
    assert times.costs.heads == pytest.approx([1e3 * t / batch for t in HEADS])
    assert times.whole_ms == pytest.approx(63 / batch) and times.gap == pytest.approx(0, abs=1e-9)
    assert times.spreads_ms == pytest.approx([0] * 3, abs=1e-9) and len(times.rounds) == 4
    assert (times.batch, times.machine) == (batch, "a clock")
    assert times.costs.unit == "ms" and times.costs.before == ((), (0,), (0, 1))
    assert {count for _, count in deployed.tuned.seen} == {batch}  # never the last, smaller part


class Elsewhere:
    """Runs stages in one piece, by a clock: the exits alone save hand-overs of 0.5 and 0.25 seconds."""

    name, precision = "elsewhere", "fp32"

    def __init__(self, model):
        self.model = model

    def network(self):
        return self.model

    def _after(self, seconds):
        def run(images, size):
            assert len(images) == size
            self.model.clock.now += seconds

        return run

    def early(self, policy, order):
        return self._after((1, 3, 7)[policy.thresholds.index(-1e8)])

    def alone(self, k):
        return self._after((1, 2.5, 6.25)[k])


def test_stages_in_one_piece_are_timed_by_what_exits_alone_save(deployed):
    model = deployed.plain
    times = measure_stages(Deployed.by(Elsewhere(model), model, deployed.images), rounds=3, machine="a clock")
    assert times.costs.heads == pytest.approx([500, 250, 0])
    assert times.costs.trunks == pytest.approx([500, 1750, 4000])
    assert times.costs.alone() == pytest.approx([1000, 2500, 6250])
    assert times.whole_ms == pytest.approx(7000) and times.rounds == (times.costs,) * 3


def test_heads_that_later_stages_read_are_fixed(clock):
    model, images = Clocked(clock, chained=True).eval(), torch.randn(2, 3, 2, 2)
    times = measure_stages(Deployed(model, model, images, images), rounds=2)
    assert times.costs.fixed == (True,) * 3 and times.costs.leaving({0})[1] == pytest.approx(45)


def test_what_a_call_costs_wherever_it_ends_is_in_the_first_trunk(deployed, clock, monkeypatch):
    real = stage_timing.run_adaptive

    def slow(*args):
        answers = real(*args)
        clock.now += 0.064  # after the last exit
        return answers

    monkeypatch.setattr(stage_timing, "run_adaptive", slow)
    times = measure_stages(deployed, rounds=3)
    assert times.costs.trunks == pytest.approx([8 + 64, 32, 16])
    assert times.costs.heads == pytest.approx([1, 4, 2])
    assert times.costs.leaving()[0] == pytest.approx(73) and times.gap == pytest.approx(0, abs=1e-9)


def test_the_decision_counts_in_the_head(deployed, clock, monkeypatch):
    real = Reading.read

    def slow(self, *args):
        clock.now += 0.128
        assert self.answer == "mean" and self.temperatures == (1.0, 2.0, 3.0)
        return real(self, *args)

    monkeypatch.setattr(Reading, "read", slow)
    times = measure_stages(deployed, rounds=1, reading=Reading("margin", "mean", (1.0, 2.0, 3.0)))
    assert times.costs.heads == pytest.approx([129, 132, 130])


def test_a_disturbed_round_does_not_count(deployed, clock):
    real, calls = deployed.tuned.begin, []

    def begin(images):
        calls.append(0)
        clock.now += 5.0 * (len(calls) in (33, 36))  # where rounds are cut into stages
        return real(images)

    deployed.tuned.begin = begin
    times = measure_stages(deployed, rounds=8)
    assert times.costs.trunks[0] == pytest.approx(8)
    assert max(one.trunks[0] for one in times.rounds) == pytest.approx(5008)


@pytest.mark.parametrize("batch", [0, 8])
def test_more_images_a_call_than_there_are_is_said(deployed, batch):
    with pytest.raises(ValueError, match=f"^batch {batch}: accepted: 1 to 7, the number of images$"):
        measure_stages(deployed, batch=batch)


def test_a_predicted_latency_is_the_one_measured(deployed):
    """On the clock: real early exit of six images, of which two leave at each exit."""
    images = deployed.images[:6]
    deployed = Deployed(deployed.plain, deployed.tuned, images, images)
    with torch.inference_mode():
        logits = torch.stack([deployed.tuned.layer(images.flatten(1))] * 3)
    tables = ExitTables.of(list(logits), torch.zeros(6, dtype=torch.int64))
    ranks = tables.confidence[0].sort().values
    policy = Policy((ranks[4].item(), ranks[2].item(), -1e8))
    times = measure_stages(deployed, rounds=2)
    found = latency_of(policy, tables, times)
    one = {"latency": early_contestants(deployed, policy)["latency"]}
    (row,) = measure(one, tables.targets, micro_batch=1, rounds=1, singles=6)
    assert found.mean_ms == pytest.approx((9 + 45 + 63) / 3)
    assert found.mean_ms == pytest.approx(1e3 / row.images_per_s)
    assert found.p50_ms == pytest.approx(row.latency_p50_ms) == pytest.approx(45)
    assert found.p95_ms == pytest.approx(row.latency_p95_ms) == pytest.approx(63)


BEFORE = ((), (0,), (0, 1))


def times_of(*rounds, batch=1):
    """Stage times of heads without cost."""
    each = tuple(StageCosts(row, (0.0,) * 3, BEFORE, (False,) * 3, "ms") for row in rounds)
    return StageTimes(each[0], each, 1.0, batch)


def test_percentiles_are_over_exits_and_rounds():
    torch.manual_seed(0)
    rounds = np.random.default_rng(0).uniform(1, 5, (20, 3))
    times, shares = times_of(*map(tuple, rounds.tolist())), [0.5, 0.3, 0.2]
    policy = Policy((0.5, 0.5, -1e8))
    spelled_out = np.concatenate(
        [np.repeat(rounds.cumsum(1)[:, k], int(100 * s)) for k, s in enumerate(shares)]
    )
    found = latency_at(policy, shares, times)
    assert found.p50_ms == pytest.approx(np.quantile(spelled_out, 0.5, method="inverted_cdf"))
    assert found.p95_ms == pytest.approx(np.quantile(spelled_out, 0.95, method="inverted_cdf"))
    assert found.mean_ms == pytest.approx(np.dot(rounds[0].cumsum(), shares))


def test_exits_switched_off_cost_no_head():
    costs = StageCosts((1.0, 2.0, 4.0), (8.0, 16.0, 32.0), BEFORE, (False,) * 3, "ms")
    times = StageTimes(costs, (costs,), 63.0)
    policy = Policy((1e8, 0.5, -1e8), off=(0,))
    assert latency_at(policy, [0, 0.5, 0.5], times) == pytest.approx((37, 19, 55))
    with pytest.raises(
        ValueError, match="^stages were timed with 8 images a call; latencies are for batch 1"
    ):
        latency_at(policy, [0, 0.5, 0.5], replace(times, batch=8))
