"""What the stages of a network cost in measured milliseconds, and the latency of policies that follows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from adaptive.backend import Eager
from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.inference import run_adaptive
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.timing import Deployed, percentile, round_times
from models import MultiExitModel, State
from models.bases import Wrapped
from utils import UserError

WARM_UP = 10  # unmeasured rounds


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds per image of every trunk and head of a network, `batch` images a call, in latency order.

    `costs` are means over the middle half of `rounds` by their sums: these add up, which medians of stages do
    not on a busy machine. `whole_ms` is the median of a run through all exits that was not cut into stages.
    `machine` says what ran it.
    """

    costs: StageCosts
    rounds: tuple[StageCosts, ...]
    whole_ms: float
    batch: int = 1
    machine: str = ""

    @property
    def gap(self) -> float:
        """How much longer all stages take in sum than the whole network, a fraction of the latter."""
        return self.costs.leaving()[-1] / self.whole_ms - 1

    @property
    def spreads_ms(self) -> list[float]:
        """Every stage's interquartile range over the rounds, [K]."""
        stages = np.array([np.add(one.trunks, one.heads) for one in self.rounds])  # (rounds, K)
        low, high = np.quantile(stages, (0.25, 0.75), axis=0)
        return (high - low).tolist()


class Latency(NamedTuple):
    """Mean, median and 95th percentile of the time for one image, in milliseconds."""

    mean_ms: float
    p50_ms: float
    p95_ms: float


def measure_stages(
    deployed: Deployed,
    *,
    batch: int = 1,
    rounds: int = 50,
    reading: Reading | str = "max_prob",
    machine: str = "",
) -> StageTimes:
    """Times the trunks and heads of the tuned network, with `batch` images a call, over several rounds.

    Caches hold what the last stages left there, as for images that come now and then: behind others that left
    early, the first stages of a small network are up to a quarter faster. Raises ValueError for fewer images
    than a call has.
    """
    images = deployed.tuned_images
    if not 1 <= batch <= len(images):
        raise UserError(f"batch {batch}: accepted: 1 to {len(images)}, the number of images")
    calls = images.split(batch)[: len(images) // batch]
    by = _by_marks if isinstance(deployed.backend, Eager) else _by_calls
    times = by(deployed, calls, rounds, Reading.of(reading))
    return replace(times, machine=machine)


def _by_marks(deployed: Deployed, calls: Sequence[Tensor], rounds: int, reading: Reading) -> StageTimes:
    """Times of stages that run in PyTorch.

    A round times three calls of `run_adaptive` on the same images: through all exits, the same cut into
    stages by the clock, and one that leaves at the first exit. A head's time includes what decides (the
    confidence by `reading`, the host's wait for the device) and passes the images on. What a call costs
    wherever it ends is in the first trunk, as `begin` is.
    """
    model = deployed.tuned
    batch = len(calls[0])
    device = calls[0].device
    watched = _Watched(model, device)
    last = model.num_exits - 1
    through = Policy.by(reading, [NOBODY] * last + [EVERYBODY])
    at_once = Policy.by(reading, [EVERYBODY] * (last + 1))
    wholes = []
    firsts = []
    cuts = []
    for i in range(WARM_UP + rounds):
        part = calls[i % len(calls)]
        runs = {name: partial(run_adaptive, model, part, name) for name in (through, at_once)}
        whole, first = round_times(runs, runs, rounds=1, device=device).values()
        wholes += whole
        firsts += first
        cuts.append(watched.cut(part, through))
    scale = 1e3 / batch
    stages = scale * np.array(cuts[WARM_UP:])  # (rounds, K, 2): of every trunk and head
    first_ms = scale * np.array(firsts[WARM_UP:])
    # In one round the difference of two times is mostly noise, so the median counts in all of them.
    common = max(float(np.median(first_ms - stages[:, 0].sum(-1))), 0.0)
    stages[:, 0, 0] += common
    stages[:, -1, 1] = np.maximum(stages[:, -1, 1] - common, 0)  # where the call that was cut ended
    middle = stages.sum((1, 2)).argsort()[rounds // 4 : rounds - rounds // 4]
    each = tuple(_costs(model, one) for one in stages)
    whole_ms = scale * percentile(wholes[WARM_UP:], 0.5)
    return StageTimes(_costs(model, stages[middle].mean(0)), each, whole_ms, batch)


def _costs(model: MultiExitModel, stages: np.ndarray) -> StageCosts:
    trunks, heads = stages.T.tolist()
    return StageCosts.of(model, trunks, heads, "ms")


def _by_calls(deployed: Deployed, calls: Sequence[Tensor], rounds: int, reading: Reading) -> StageTimes:
    """Times of stages that run in one piece, from calls that leave at each exit, and from each exit alone.

    A head's time is what switching its exit off saves: the head itself, what decides, and the hand-over to
    the next stage, with which its own is then merged. That of the last exit is in its trunk.
    """
    model = deployed.tuned
    backend = deployed.backend
    batch = len(calls[0])
    last = model.num_exits - 1
    runs = []
    for k in range(last + 1):
        policy = Policy.by(reading, [NOBODY] * k + [EVERYBODY] * (last + 1 - k))
        runs += [backend.early(policy, "latency"), backend.alone(k)]
    taken = []
    for i in range(WARM_UP + rounds):
        part = calls[i % len(calls)]
        turn = {place: partial(run, part, batch) for place, run in enumerate(runs)}
        times = round_times(turn, turn, rounds=1, device=part.device)
        taken.append(list(times.values()))
    seconds = np.array(taken[WARM_UP:]).reshape(rounds, last + 1, 2)
    leaving, alone = 1e3 / batch * np.moveaxis(seconds, 2, 0)  # (rounds, K) each
    stages = np.diff(leaving, prepend=0.0)
    middle = np.diff(np.median(leaving, 0), prepend=0.0).clip(0)
    heads = np.minimum(_saved(model, middle, np.median(alone, 0)), middle)
    costs, *each = (_costs(model, np.stack([row - heads, heads], 1)) for row in (middle, *stages))
    whole_ms = float(np.median(leaving[:, -1]))
    return StageTimes(costs, tuple(each), whole_ms, batch)


def _saved(model: MultiExitModel, stages: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """What switching each exit off saves, [K], by the times [K] of stages and of each exit alone."""
    exits = range(model.num_exits)
    before = np.zeros((len(exits), len(exits)))
    for k in exits:
        for j in model.stages_before(k):
            before[k, j] = not model.reads_logits(j)
    needed = [sum(stages[[*model.stages_before(k), k]]) for k in exits]
    return nnls(before, np.maximum(needed - alone, 0))[0]


class _Watched(Wrapped):
    """A network that notes the time where trunks begin and end."""

    def __init__(self, model: MultiExitModel, device: torch.device) -> None:
        super().__init__(model)
        self.device = device
        self.marks: list[float] = []

    def cut(self, images: Tensor, policy: Policy) -> list[list[float]]:
        """Seconds of the trunk and head of every stage, [K, 2], where all images take the last exit."""
        self.marks.clear()
        self.mark()
        run_adaptive(self, images, policy)
        self.mark()
        return np.diff(self.marks).reshape(self.num_exits, 2).tolist()

    def mark(self) -> None:
        """Notes the time at which the device is done."""
        torch.get_device_module(self.device).synchronize(self.device)
        self.marks.append(time.perf_counter())

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        if k > 0:  # the first begins with the call
            self.mark()
        found = super().trunk(k, state)
        self.mark()
        return found


def latency_of(policy: Policy, tables: ExitTables, times: StageTimes) -> Latency:
    """What one image takes under a policy that leaves as in `tables`, by times measured at batch 1."""
    return latency_at(policy, policy.simulate(tables, times.costs).shares, times)


def latency_at(policy: Policy, shares: Sequence[float], times: StageTimes) -> Latency:
    """What one image takes where `shares` [K] of the images leave at each exit of a policy.

    The mean is of `times.costs`, as a search over them sees it; percentiles are over exits
    and rounds. Raises ValueError for times that are not of batch 1.
    """
    if times.batch != 1:
        raise UserError(f"stages were timed with {times.batch} images a call; latencies are for batch 1")
    mean = float(np.dot(shares, times.costs.leaving(policy.off)))
    taken = np.array([one.leaving(policy.off) for one in times.rounds])  # (rounds, K)
    weights = np.broadcast_to(np.asarray(shares) / len(taken), taken.shape).ravel()
    order = taken.ravel().argsort()
    reached = weights[order].cumsum()
    places = np.searchsorted(reached, np.array([0.5, 0.95]) - 1e-9)
    p50, p95 = taken.ravel()[order][places]
    return Latency(mean, float(p50), float(p95))
