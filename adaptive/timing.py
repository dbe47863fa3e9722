"""Timing: warmed up, synchronised, and interleaved, so that a drifting machine slows everything alike."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive.backend import Backend, Eager, Run, static
from adaptive.costs import StageCosts
from adaptive.exit_tables import first_not_finite
from adaptive.flops import count
from adaptive.inference import ORDERS, all_logits, fold_batch_norm
from adaptive.intervals import Estimate, median_ratio
from adaptive.policy import Policy
from models import MultiExitModel
from utils import UserError

MICRO_BATCHES = (16, 32, 64, 128, 256)
_ALL_PLAIN = "all exits, plain"
FILLED = 4  # how often the images at hand fill a micro-batch that is worth a try


@dataclass(frozen=True)
class Contestant:
    """A way to classify images: `run(images, size)`, `size` per call, gives logits [N, C] and exits [N].

    `costs` [K] are the multiply-adds of an image that leaves at each exit. Contestants of one `kind` share
    the micro-batch size that is best for the last of them.
    """

    kind: str
    run: Run
    images: Tensor
    costs: Sequence[float]


@dataclass(frozen=True)
class Deployed:
    """A network as trained and `tuned` for deployment, and the images [N, 3, H, W] that each reads.

    Tuned: batch norms folded, channels-last, half precision ... It runs eagerly unless it `runs` elsewhere.
    """

    plain: MultiExitModel
    tuned: MultiExitModel
    images: Tensor
    tuned_images: Tensor
    runs: Backend | None = None

    @classmethod
    def of(
        cls,
        model: MultiExitModel,
        images: Tensor,
        *,
        fold_bn: bool = True,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Deployed":
        """Tunes a copy of the network; without `dtype` it keeps its precision."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tuned = fold_batch_norm(model) if fold_bn else copy.deepcopy(model)
        tuned = tuned.to(dtype=dtype, memory_format=layout)
        return cls(model, tuned, images, images.to(dtype=dtype or images.dtype, memory_format=layout))

    @classmethod
    def by(cls, backend: Backend, model: MultiExitModel, images: Tensor) -> "Deployed":
        """A network as trained, deployed by a backend."""
        return cls(model, backend.network(), images, images, backend)

    @cached_property
    def backend(self) -> Backend:
        """What runs the tuned network."""
        return self.runs or Eager(self.tuned)

    @cached_property
    def costs(self) -> StageCosts:
        """Multiply-adds of every stage."""
        return count(self.plain, tuple(self.images.shape[1:])).stages


@dataclass(frozen=True)
class Measurement:
    """Measurements of a contestant; accuracy is a fraction, `exits` [N] where each image left.

    Latencies are for one image alone; None in throughput order, where images wait for others. `seconds` are
    those of every round, `images_per_s` is of their median.
    """

    contestant: str
    micro_batch: int
    images_per_s: float
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    macs: float
    accuracy: float
    exits: Tensor
    seconds: Sequence[float] = ()


@dataclass(frozen=True)
class TimedPoint:
    """Early exit in throughput order at one operating point, compared with static networks.

    `mismatches` counts, per order, the images that left at another exit than in the simulation of the network
    as trained; `shares` are the simulated ones. `speedup` and `macs_ratio` are relative to the network that
    ends at the last exit, without earlier heads, whose accuracy on these images is `static_accuracy`;
    `speedup_over_plain` is relative to all exits of the network as trained. Intervals are of 95 %, over
    rounds.
    """

    point: str
    thresholds: list[float]
    mismatches: dict[str, int]
    accuracy: float
    macs: float
    shares: list[float]
    speedup: float
    macs_ratio: float
    speedup_over_plain: float
    static_accuracy: float
    speedup_interval: tuple[float, float]
    speedup_over_plain_interval: tuple[float, float]

    @property
    def over_static(self) -> Estimate:
        """`speedup` with its interval."""
        return Estimate(self.speedup, *self.speedup_interval)

    @property
    def over_plain(self) -> Estimate:
        """`speedup_over_plain` with its interval."""
        return Estimate(self.speedup_over_plain, *self.speedup_over_plain_interval)


@dataclass(frozen=True)
class Comparison:
    """Everything that was timed, and each operating point against the static networks."""

    num_images: int
    table: list[Measurement]
    points: list[TimedPoint]


def interleaved(
    calls: Mapping[Any, Callable[[], Any]], *, rounds: int, device: torch.device
) -> dict[Any, float]:
    """Median seconds per call, in turn (A B C A B C ...) for `rounds` rounds; callers warm up first."""
    times = round_times(calls, calls, rounds=rounds, device=device)
    return {name: percentile(values, 0.5) for name, values in times.items()}


def round_times(
    calls: Mapping[Any, Callable[[], Any]], turns: Iterable[Any], *, rounds: int, device: torch.device
) -> dict[Any, list[float]]:
    """Seconds of every call; a round calls by the names in `turns`, some of which may come several times."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in turns:
            times[name].append(_seconds(calls[name], device))
    return times


def percentile(times: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the times lie, interpolated."""
    return float(np.quantile(times, share))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait = torch.get_device_module(device).synchronize
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def static_contestants(deployed: Deployed) -> dict[str, Contestant]:
    """Baselines of early exit: all exits on all images, as trained and tuned, and each exit alone, tuned."""
    plain = deployed.plain
    tuned = deployed.tuned
    images = deployed.tuned_images
    together = deployed.costs.leaving()
    alone = deployed.costs.alone()
    last = plain.num_exits - 1
    as_trained = static(lambda part, _: plain(part)[-1], last)
    everything = static(lambda part, _: tuned(part)[-1], last)
    contestants = {
        _ALL_PLAIN: Contestant("plain", as_trained, deployed.images, together),
        "all exits": Contestant("static", everything, images, together),
    }
    for k in range(plain.num_exits):
        run = deployed.backend.alone(k)
        contestants[f"exit {k} alone"] = Contestant("static", run, images, alone)
    return contestants


def early_contestants(deployed: Deployed, policy: Policy) -> dict[str, Contestant]:
    """Early exit of the tuned network in both orders, by the name of the order."""
    costs = policy.leaving(deployed.costs)
    found = {}
    for order in ("throughput", "latency"):
        run = deployed.backend.early(policy, order)
        found[order] = Contestant(order, run, deployed.tuned_images, costs)
    return found


def measure(
    contestants: dict[str, Contestant],
    targets: Tensor,
    *,
    micro_batch: int | None = None,
    rounds: int = 3,
    singles: int = 200,
    often: Sequence[str] = (),
) -> list[Measurement]:
    """Times contestants on images with targets [N], and those named in `often` three times in every round.

    Without `micro_batch`, every kind of contestant gets the size that `_fastest_size` finds. Latencies are
    over `singles` images. Raises ValueError for answers that are not finite.
    """
    device = targets.device
    deciding = {one.kind: one for one in contestants.values()}
    sizes = {kind: micro_batch or _fastest_size(one, device) for kind, one in deciding.items()}
    calls = {name: partial(one.run, one.images, sizes[one.kind]) for name, one in contestants.items()}
    answers = {name: call() for name, call in calls.items()}
    times = round_times(calls, [*calls, *often, *often], rounds=rounds, device=device)
    rows = []
    for name, one in contestants.items():
        logits, exits = answers[name]
        if found := first_not_finite([logits]):
            _, row, value = found
            where = f"exit {int(exits[row])} for image {row} of those timed"
            raise UserError(f"{name} gives the logit {value} at {where}")
        exits = exits.cpu()
        speed = len(targets) / percentile(times[name], 0.5)
        latencies = (None, None) if one.kind == "throughput" else _single_latencies(one, singles, device)
        macs = torch.tensor(one.costs, dtype=torch.float64)[exits].mean().item()
        accuracy = (logits.argmax(1) == targets).double().mean().item()
        figures = (speed, *latencies, macs, accuracy, exits, times[name])
        rows.append(Measurement(name, sizes[one.kind], *figures))
    return rows


def compare_orders(
    policies: dict[str, Policy], deployed: Deployed, targets: Tensor, *, micro_batch: int | None = None
) -> Comparison:
    """Times early exit with the named policies beside the static networks; targets [N] of the images."""
    contestants = static_contestants(deployed)
    often = [_ALL_PLAIN, list(contestants)[-1], *(f"{name}, throughput order" for name in policies)]
    for name, policy in policies.items():
        for order, contestant in early_contestants(deployed, policy).items():
            contestants[f"{name}, {order} order"] = contestant
    rows = measure(contestants, targets, micro_batch=micro_batch, often=often)
    logits = all_logits(deployed.plain, deployed.images)
    points = [_timed_point(name, policy, rows, logits) for name, policy in policies.items()]
    return Comparison(len(targets), rows, points)


def _timed_point(name: str, policy: Policy, rows: list[Measurement], logits: Tensor) -> TimedPoint:
    """A policy's measurements against the static ones and the simulation on logits [K, N, C]."""
    by_name = {row.contestant: row for row in rows}
    simulated = policy.exit_of(policy.reading.confidences(logits)).cpu()
    orders = {order: by_name[f"{name}, {order} order"] for order in ORDERS}
    pooled = orders["throughput"]
    last = by_name[f"exit {len(logits) - 1} alone"]
    gain = median_ratio(last.seconds, pooled.seconds)
    over_plain = median_ratio(by_name[_ALL_PLAIN].seconds, pooled.seconds)
    mismatches = {order: int((row.exits != simulated).sum()) for order, row in orders.items()}
    shares = torch.bincount(simulated, minlength=len(logits)).double() / len(simulated)
    return TimedPoint(
        name,
        list(policy.thresholds),
        mismatches,
        pooled.accuracy,
        pooled.macs,
        shares.tolist(),
        speedup=gain.value,
        macs_ratio=last.macs / pooled.macs,
        speedup_over_plain=over_plain.value,
        static_accuracy=last.accuracy,
        speedup_interval=(gain.low, gain.high),
        speedup_over_plain_interval=(over_plain.low, over_plain.high),
    )


def _fastest_size(contestant: Contestant, device: torch.device) -> int:
    """The fastest of the `MICRO_BATCHES` that the images fill `FILLED` times, on the first of them that do.

    So all calls but those for the last survivors are full ones. On fewer images a size would be judged by
    batches that it does not fill. The least size is always accepted.
    """
    sizes = [size for size in MICRO_BATCHES if FILLED * size <= len(contestant.images)] or MICRO_BATCHES[:1]
    part = contestant.images[: FILLED * sizes[-1]]
    calls = {size: partial(contestant.run, part, size) for size in sizes}
    for call in calls.values():
        call()
    times = interleaved(calls, rounds=2, device=device)
    return min(times, key=lambda size: times[size])


def _single_latencies(contestant: Contestant, singles: int, device: torch.device) -> tuple[float, float]:
    """Median and 95th percentile of batch 1, in milliseconds."""
    images = contestant.images[:singles].split(1)
    for image in images[:10]:
        contestant.run(image, 1)
    times = [1e3 * _seconds(partial(contestant.run, image, 1), device) for image in images]
    return percentile(times, 0.5), percentile(times, 0.95)
