"""Which stage of an exported network runs next, on how many requests: by deadlines and measured times."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from deploy.decide import Array, Policy, State

NEVER = float("inf")
Table = dict[tuple[int, int], float]  # seconds of a call, by stage and size of the batch


class Stages(Protocol):
    """What is scheduled: a `deploy.runner.Runner`, or something like it."""

    stages: Sequence[Callable[[State], tuple[Array, State]]]
    exits: list[int]
    later: list[set[str]]
    micro_batch: int
    view: dict[str, Any]
    policy: Policy


class Call(NamedTuple):
    """A call of stage `k` with `count` requests, as a batch of `size`, that takes `seconds`."""

    k: int
    count: int
    size: int
    seconds: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.count / self.seconds


def sizes_of(most: int, base: int = 2) -> list[int]:
    """Sizes of batches: powers of the base that are less than the most, and the most."""
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size *= base
    return [*sizes, most]


def measure(runner: Stages) -> Table:
    """Seconds of every (stage, size of a batch); the best of three, after the call that compiles it."""
    side = runner.view["size"]
    rng = np.random.default_rng(0)
    table = {}
    for size in sizes_of(runner.micro_batch):
        state = {"images": rng.standard_normal((size, 3, side, side), np.float32)}
        for k, stage in enumerate(runner.stages):
            seconds = []
            for _ in range(4):
                start = perf_counter()
                _, made = stage(state)
                seconds.append(perf_counter() - start)
            table[k, size] = min(seconds[1:])
            state |= {name: array.copy() for name, array in made.items()}
    return table


def best_call(table: Table, sizes: Sequence[int], k: int, waiting: int) -> Call:
    """The call that does most of the `waiting` requests of stage `k` per second; sizes are padded up."""
    waiting = min(waiting, sizes[-1])
    enough = bisect_left(sizes, waiting) + 1
    calls = [Call(k, min(waiting, size), size, table[k, size]) for size in sizes[:enough]]
    return max(calls, key=lambda call: (call.rate, call.count))


def choose(
    deadlines: Sequence[Sequence[float]], table: Table, sizes: Sequence[int], now: float
) -> Call | None:
    """The next call, of sorted deadlines by stage; None where nobody waits.

    Stage 0 where its queue, run in full batches, could not wait for a call of every stage and another one:
    who has a first answer is never too late. Else the stage with the least slack, if it could not wait for
    one call; else the one that comes nearest to the rate that it has in full batches, so that others gather
    more. Requests without a deadline wait for the rest.
    """
    counts = [bisect_left(queue, NEVER) for queue in deadlines]
    if not any(counts):
        counts = [len(queue) for queue in deadlines]
    calls = {k: best_call(table, sizes, k, count) for k, count in enumerate(counts) if count}
    if len(calls) < 2:
        return next(iter(calls.values()), None)
    most = sizes[-1]
    full = [table[k, most] for k in range(len(deadlines))]
    longest = max(call.seconds for call in calls.values())
    if 0 in calls:
        # The first of a full batch has the least time to wait for the batches before.
        turns = enumerate(deadlines[0][: counts[0] : most], 1)
        spare = min(deadline - now - turn * full[0] for turn, deadline in turns)
        if spare <= sum(full) + longest:
            return calls[0]
    slack = {k: deadlines[k][0] - now - sum(full[k:]) for k in calls}
    tightest = min(calls, key=slack.__getitem__)
    if slack[tightest] <= longest:
        return calls[tightest]
    return max(calls.values(), key=lambda call: (call.rate * full[call.k], call.k))
