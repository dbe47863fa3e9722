"""How a classifier is asked for answers: one image at a time, eight, all at once, or as users come.

The scenarios are those of MLPerf's inference rules, the figures are not MLPerf's. A system is a function that
classifies images for the first three, and one that queues an image for the last.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from adaptive.percentiles import Array, Latencies, holds

Classify = Callable[[Array], Array]  # images [N, 3, H, W] to classes [N]
# Queues an image [3, H, W]; the result has its class as `label`. ValueError, at once or later: no answer.
Submit = Callable[[Array], "Future[Any]"]
SHARE = 0.99  # of a server's requests that must be answered within the bound


@dataclass(frozen=True)
class Samples:
    """Images [N, 3, H, W] as the network reads them, and their labels [N]."""

    images: Array
    labels: Array

    def rows(self, count: int, seed: int) -> Array:
        """The images that `count` requests ask for: all in random order, again and again."""
        rng = np.random.default_rng(seed)
        rounds = -(-count // len(self.labels))
        return np.concatenate([rng.permutation(len(self.labels)) for _ in range(rounds)])[:count]


class Asked(NamedTuple):
    """Latencies [Q] of requests, one after another, and what was right, bool [Q, images a request]."""

    latencies_ms: Array
    correct: Array

    @property
    def accuracy(self) -> float:
        """The fraction that is right."""
        return float(self.correct.mean())

    @property
    def images_per_s(self) -> float:
        """Images classified in a second, by the median request."""
        return 1e3 * self.correct.shape[1] / float(np.median(self.latencies_ms))

    @classmethod
    def joined(cls, parts: Sequence["Asked"]) -> "Asked":
        """Several parts as one."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def ask(classify: Classify, samples: Samples, rows: Array) -> Asked:
    """Sends requests for images by number, [Q, images a request]: the next one when the last is answered."""
    latencies = np.empty(len(rows))
    correct = np.empty(rows.shape, bool)
    for i, group in enumerate(rows):
        images = samples.images[group]
        start = time.perf_counter()
        classes = classify(images)
        latencies[i] = time.perf_counter() - start
        correct[i] = classes == samples.labels[group]
    return Asked(1e3 * latencies, correct)


def stream(
    systems: Mapping[str, Classify], samples: Samples, requests: int, size: int, *, rounds: int, warm: int = 0
) -> dict[str, Asked]:
    """What `ask` finds of every system with the same requests for `size` images.

    One image is single stream, eight are multi-stream, and all in one request offline. Systems take turns, a
    part of the requests each, after the first `warm` of which once without counting.
    """
    rows = samples.rows(requests * size, seed=0).reshape(requests, size)
    parts: dict[str, list[Asked]] = {name: [] for name in systems}
    for turn in np.array_split(rows, rounds):
        for name, classify in systems.items():
            ask(classify, samples, turn[:warm])
            parts[name].append(ask(classify, samples, turn))
    return {name: Asked.joined(found) for name, found in parts.items()}


@dataclass(frozen=True)
class Served:
    """What a system did at a rate of requests per second.

    `goodput` counts answers within the bound per second, `lost` the requests without an answer, and `held`
    says whether all were answered and p99 is confirmed to be within the bound.
    """

    rate: float
    latencies: Latencies
    goodput: float
    lost: int
    accuracy: float
    held: bool


def serve(
    submit: Submit, samples: Samples, rate: float, requests: int, *, bound_ms: float, seed: int
) -> Served:
    """Sends requests at random times, `rate` a second on average, whatever becomes of those before.

    A latency counts from the time at which a request was due, so a late sender hides nothing.
    """
    due = np.random.default_rng(seed).exponential(1 / rate, requests).cumsum()
    rows = samples.rows(requests, seed)
    ends = np.full(requests, np.inf)
    labels = np.full(requests, -1)
    sent: list[Future[Any]] = []
    noted = threading.Semaphore(0)  # futures are finished before what was asked for then is done
    start = time.perf_counter()

    def note(i: int, future: "Future[Any]") -> None:
        if future.exception() is None:
            ends[i] = time.perf_counter() - start
            labels[i] = future.result().label
        noted.release()

    for i, row in enumerate(rows):
        if (early := due[i] - (time.perf_counter() - start)) > 0:
            time.sleep(early)
        try:
            future = submit(samples.images[row])
        except ValueError:  # no room for it
            continue
        future.add_done_callback(partial(note, i))
        sent.append(future)
    for _ in sent:
        noted.acquire()
    seconds = time.perf_counter() - start
    missed = requests - len(sent) + sum(map(lost, sent))
    latencies = 1e3 * (ends - due)
    over = int((latencies > bound_ms).sum())
    return Served(
        rate,
        Latencies.of(latencies),
        goodput=(requests - over) / seconds,
        lost=missed,
        accuracy=float((labels == samples.labels[rows]).mean()),
        held=missed == 0 and holds(over, requests, SHARE),
    )


def lost(future: "Future[Any]") -> bool:
    """Whether a finished future has no answer; raises what is no ValueError."""
    error = future.exception()
    if error is not None and not isinstance(error, ValueError):
        raise error
    return error is not None


def highest_rate(trial: Callable[[float, int], Served], fastest: float, steps: int = 6) -> Served | None:
    """The highest rate below `fastest` at which `trial(rate, seed)` holds, to 1 / 2**steps of that.

    Bisection tries every rate with the same arrivals, seed 0, closer together or further apart; twice if need
    be, since one pause of the machine fails a rate. What it finds must hold with others, seed 1, or a step
    lower; these figures are returned. None where no rate holds.
    """
    step = fastest / 2**steps
    low, high = 0, 2**steps
    while high - low > 1:
        middle = (low + high) // 2
        if any(trial(middle * step, 0).held for _ in range(2)):
            low = middle
        else:
            high = middle
    trials = (trial(k * step, 1) for k in range(low, 0, -1))
    return next((found for found in trials if found.held), None)
