"""Who runs next, and what requests get: by deadlines, on stages whose times are made up."""

import threading
import time
from concurrent.futures import Future, wait
from types import SimpleNamespace

import numpy as np
import pytest

from deploy import calls
from deploy.calls import NEVER, best_call, choose, sizes_of
from deploy.scheduler import Late, Refused, Scheduler

SIZES = [1, 2, 4, 8]
TABLE = {(k, size): (0.002 + 0.001 * size) for k in range(3) for size in SIZES}  # a full call takes 10 ms


class Toy:
    """Three stages that pass a number on; a sample leaves where its number says. `gate` holds them up."""

    exits, later, micro_batch, view = [0, 2, 5], [{"x"}, {"x"}, set()], 4, {"size": 1}

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.seen = []
        self.policy = self.policy_of(0)
        self.stages = [self.stage(k) for k in range(3)]

    def stage(self, k):
        def run(state):
            self.gate.wait(5)
            x = state["images"][:, 0, 0, 0] if k == 0 else state["x"]
            self.seen.append((k, len(x)))
            if (x[0] == 99).any():
                raise ZeroDivisionError("99")
            return np.stack([-x, x], 1), {"x": x}

        return run

    def policy_of(self, shift):
        def decide(exit, logits, memory):
            x = logits[:, 1]
            met = memory.get("met", 0) + np.ones(len(x))
            answers = np.stack([x + shift, met], 1)
            return answers, x, (x <= exit) | (exit == 5), {"met": met}

        return SimpleNamespace(decide=decide)


def image(x):
    return np.full((3, 1, 1), x, np.float32)


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def scheduler(toy):
    one = Scheduler(toy, room=40)
    toy.seen.clear()
    yield one
    toy.gate.set()
    one.close()


def held(scheduler, toy):
    """Submits a request that keeps the stages busy until the gate is opened."""
    toy.gate.clear()
    first = scheduler.submit(image(0))
    while scheduler.queues[0]:
        time.sleep(0.001)
    return first


def test_sizes_and_the_best_call():
    assert sizes_of(8) == SIZES and sizes_of(6) == [1, 2, 4, 6] and sizes_of(1) == [1]
    assert sizes_of(64, 4) == [1, 4, 16, 64] and sizes_of(65, 4) == [1, 4, 16, 64, 65]
    assert best_call(TABLE, SIZES, 0, 3)[:3] == (0, 3, 4)
    assert best_call(TABLE, SIZES, 0, 50)[:3] == (0, 8, 8)
    # Two calls of the half do more where padding is dear.
    assert best_call(TABLE | {(0, 8): 1.0}, SIZES, 0, 5)[:3] == (0, 4, 4)


def test_the_fullest_runs_where_nobody_is_in_a_hurry():
    assert choose([[], [], []], TABLE, SIZES, 0) is None
    assert choose([[9.0], [], []], TABLE, SIZES, 0).k == 0
    assert choose([[9.0] * 2, [9.0] * 5, [9.0]], TABLE, SIZES, 0)[:2] == (1, 4)
    assert choose([[9.0] * 5, [9.0], [9.0] * 5], TABLE, SIZES, 0).k == 2


def test_the_least_slack_runs_where_somebody_is_in_a_hurry():
    assert choose([[9.0] * 5, [9.0] * 5, [0.015]], TABLE, SIZES, 0)[:2] == (2, 1)
    # Stage 1 has two stages to go.
    assert choose([[], [0.021], [0.015]], TABLE, SIZES, 0).k == 1


def test_a_first_answer_comes_before_better_ones():
    assert choose([[0.04] * 3, [0.03] * 5, [0.01] * 8], TABLE, SIZES, 0).k == 0
    # The first of the third full batch has less time than there is for the two before.
    waiting = [0.2] * 16 + [0.05]
    assert choose([sorted(waiting), [], [9.0] * 8], TABLE, SIZES, 0).k == 0
    assert choose([[0.2] * 8, [], [9.0] * 8], TABLE, SIZES, 0).k == 2


def test_requests_without_a_deadline_wait():
    assert choose([[NEVER] * 8, [9.0], []], TABLE, SIZES, 0)[:2] == (1, 1)
    assert choose([[NEVER] * 3, [], [NEVER]], TABLE, SIZES, 0).count == 3


def test_every_request_leaves_at_its_exit_with_its_own_answer(scheduler):
    values = [0, 1, 2, 3, 5, 0, 4, 2, 1, 5, 3]
    found = [future.result(5) for future in [scheduler.submit(image(x)) for x in values]]
    assert [one.exit for one in found] == [0 if x <= 0 else 2 if x <= 2 else 5 for x in values]
    assert [one.logits[0] for one in found] == values and not any(one.cut for one in found)
    # What a policy remembers travels with the request: how many exits it has met.
    assert [one.logits[1] for one in found] == [1 + (x > 0) + (x > 2) for x in values]
    assert scheduler.left == {(0, False): 2, (2, False): 4, (5, False): 5} and scheduler.waiting == 0


def test_waiting_requests_share_calls(scheduler, toy):
    scheduler.table = dict.fromkeys(scheduler.table, 1.0)
    first = held(scheduler, toy)
    futures = [scheduler.submit(image(1)) for _ in range(7)]
    toy.gate.set()
    wait([first, *futures], 5)
    # Padded up to a batch of 4, and deeper first where both are as full.
    assert toy.seen == [(0, 1), (0, 4), (1, 4), (0, 4), (1, 4)]
    assert scheduler.calls == {(0, 1): 1, (0, 4): 1, (1, 4): 1, (0, 3): 1, (1, 3): 1}


def test_the_deadline_gives_the_best_answer_so_far(toy, scheduler):
    scheduler.table |= {(1, size): 9.0 for size in scheduler.sizes}
    found = scheduler.submit(image(3), seconds=1).result(5)
    assert (found.exit, found.cut, found.logits[0]) == (0, True, 3)
    assert toy.seen == [(0, 1)] and scheduler.left == {(0, True): 1}


def test_no_answer_in_time_is_said(scheduler, toy):
    held(scheduler, toy)
    future = scheduler.submit(image(0), seconds=0.01)
    time.sleep(0.02)
    toy.gate.set()
    with pytest.raises(Late):
        future.result(5)
    assert scheduler.late == 1


def test_a_full_queue_refuses_and_a_closed_one(scheduler, toy):
    held(scheduler, toy)
    futures = [scheduler.submit(image(5)) for _ in range(39)]
    with pytest.raises(Refused, match="40"):
        scheduler.submit(image(0))
    toy.gate.set()
    scheduler.close()  # answers what was accepted
    assert all(future.result(0).exit == 5 for future in futures)
    with pytest.raises(Refused):
        scheduler.submit(image(0))


def test_a_stage_that_fails_takes_only_its_requests_along(scheduler):
    with pytest.raises(ZeroDivisionError):
        scheduler.submit(image(99)).result(5)
    assert scheduler.submit(image(0)).result(5).exit == 0 and scheduler.waiting == 0


def test_requests_keep_the_policy_with_which_they_came(scheduler, toy):
    held(scheduler, toy)
    before = [scheduler.submit(image(3)) for _ in range(2)]
    scheduler.swap(toy.policy_of(100))
    after = [scheduler.submit(image(3)) for _ in range(2)]
    toy.gate.set()
    assert [one.result(5).logits[0] for one in before + after] == [3, 3, 103, 103]


def test_the_monitor_sees_all_requests_in_order_also_those_cut_short(toy):
    seen = []
    scheduler = Scheduler(
        toy, watch=lambda exits, confidence: seen.extend(zip(exits, confidence, strict=True))
    )
    scheduler.table |= {(2, size): 9.0 for size in scheduler.sizes}
    cut = scheduler.submit(image(4), seconds=2)
    others = [scheduler.submit(image(x), seconds=2) for x in (0, 2)]
    assert cut.result(5)[2:] == (2, 4.0, True)
    wait(others, 5)
    for _ in range(500):
        if len(seen) == 3:
            break
        time.sleep(0.005)
    assert seen == [(5, 4.0), (0, 0.0), (2, 2.0)]  # the first goes on when nobody waits
    scheduler.close()


def test_futures_cannot_be_cancelled(scheduler, toy):
    held(scheduler, toy)
    future = scheduler.submit(image(0))
    assert isinstance(future, Future) and not future.cancel()
    toy.gate.set()
    assert future.result(5).exit == 0


def test_the_table_is_measured(toy, monkeypatch):
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(calls, "perf_counter", lambda: float(next(clock)))
    table = calls.measure(toy)
    assert table == {(k, size): 0.5 for k in range(3) for size in (1, 2, 4)}
    assert toy.seen[:4] == [(0, 1)] * 4
