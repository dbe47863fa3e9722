"""A runner behind a queue answers everybody, at the right exit, first come, first served."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from deploy.queued import Answer, Line, Queued


class Two:
    """Two stages: odd numbers leave at the first, and a class is the image's number, also after stage 1."""

    micro_batch = 6

    def __init__(self, pause=0.0):
        self.pause, self.calls = pause, []
        self.stages = [lambda state, k=k: (None, {"seen": state["images"] + k}) for k in (0, 1)]

    def step(self, k, state, count):
        time.sleep(self.pause)
        self.calls.append((k, len(state["ids"]), state["ids"][:count].tolist()))
        numbers = state["images"][:, 0, 0, 0].astype(int)
        leaves = (numbers[:count] % 2 == 1) | (k == 1)
        ids = state["ids"][:count][leaves]
        found = SimpleNamespace(ids=ids, classes=numbers[:count][leaves], exits=np.full(len(ids), 10 * k))
        return found, dict(state), np.flatnonzero(~leaves)


def image(number):
    return np.full((3, 2, 2), number, np.float32)


def test_everybody_is_answered_at_the_right_exit():
    runner = Two(pause=1e-3)
    queue = Queued(runner, image(0))
    futures = [queue.submit(image(number)) for number in range(50)]
    queue.close()
    answers = [future.result(timeout=0) for future in futures]
    assert answers == [Answer(number, 10 * (number % 2 == 0)) for number in range(50)]
    assert not queue.futures and not queue.thread.is_alive()
    for k in (0, 1):
        ids = [one for stage, _, some in runner.calls if stage == k for one in some]
        assert ids == [number for number in range(50) if k == 0 or number % 2 == 0]  # in order
    assert {size for _, size, _ in runner.calls} <= {1, 2, 3, 4, 6}
    assert max(len(some) for *_, some in runner.calls) == 6


def test_answers_leave_as_their_exit_runs():
    runner, gate = Two(), threading.Event()
    step = runner.step
    runner.step = lambda k, *rows: (gate.wait(5) if k else None, step(k, *rows))[1]
    queue = Queued(runner, image(0))
    with queue.changed:  # both come before the first stage runs
        late, early = queue.submit(image(2)), queue.submit(image(1))
    assert early.result(timeout=5) == Answer(1, 0) and not late.done()
    gate.set()
    assert late.result(timeout=5) == Answer(2, 10)
    queue.close()


def test_a_stage_that_fails_leaves_nobody_waiting():
    runner = Two()
    queue = Queued(runner, image(0))
    runner.step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        queue.submit(image(0)).result(timeout=5)
    queue.close()
    with pytest.raises(ZeroDivisionError):
        queue.submit(image(0))


def test_a_line_keeps_its_order():
    line = Line(6)
    rows = np.arange(4)
    line.put({"a": 10 * rows, "b": rows[:, None]}, np.array([0, 2, 3]))
    line.drop(1)
    line.put({"a": 10 * rows, "b": rows[:, None]}, np.array([1]))
    assert line.fill == 3 and line.rows(0, 4)["a"][:3].tolist() == [20, 30, 10]
    assert line.rows(0, 2)["b"].tolist() == [[2], [3]]
