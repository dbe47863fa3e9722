"""Early exit in every backend and precision, beside static networks in the same one, and its floor.

    python scripts/bench_backends.py --checkpoint FILE --data_path "$DATA" [--drop 0.005] [--policy FILE]
    python scripts/bench_backends.py --model ebjr --networks A B --data_set CIFAR10 --data_path "$DATA"

The flags of eval_dynamic.py apply: the policy is the one that it would deploy, the same in all backends.
First table: what to expect. Every stage is timed alone on a full micro-batch and weighted by the share of the
images that reach it; so is what decides, and what hands the state of those that stay to the next stage.
Second table: what is measured, early exit beside the last exit alone and the cheapest exit alone that is at
least as accurate as early exit on the test images (eagerly in fp32). All take turns in one run, with all
images at once (images/s) and with one at a time (ms). Test images are repeated where there are too few.
Moved: how many leave at another exit than eagerly in fp32. Ratio: multiply-adds of this row
over those of early exit.
Gain: images/s of early exit over those of this row, by median rounds, with the 95 % interval over rounds.
Today's is early exit eagerly in fp32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from common import print_table, read_known, rivals_of

import numpy as np
import torch
from torch import Tensor

from adaptive.backend import PRECISIONS as NAMES
from adaptive.backend import Backend, Run
from adaptive.costs import StageCosts
from adaptive.flops import count
from adaptive.intervals import median_ratio
from adaptive.policy import Policy
from adaptive.timing import interleaved, percentile, round_times
from deploy.backends import PRECISIONS, Exports, open_backend
from experiment.evaluation import deployed_policy
from experiment.recipe import read_command
from experiment.record import describe_machine
from experiment.samples import test_images
from experiment.subject import EVALUATION, open_evaluation
from models import State
from utils import option, run_main

BURST = 50  # images one at a time in a round
WARM = 10  # of which the first are not counted
BACKENDS = "eager", "openvino", "onnxruntime"
EARLY = "early exit"
EXPECTED = ["backend", "stages on a micro-batch, ms", "sum:.2f", "last exit alone:.2f", "hand-over:.2f"]
EXPECTED += ["expected, images/s:.0f", "measured:.0f", "of expected, %:.0f"]
HEADS = ["backend", "network", "images/s:.0f", "p50, ms:.2f", "p90:.2f", "p99:.2f", "top-1, %:.2f", "moved"]
HEADS += ["MACs, M:.2f", "ratio", "gain", "gain / ratio", "images/s of today's:.2f", "p50 of today's:.2f"]


@dataclass(frozen=True)
class Flags:
    """What is timed; the flags of eval_dynamic.py apply besides."""

    backends: tuple[str, ...] = option(BACKENDS, "which", choices=tuple(PRECISIONS))
    precisions: tuple[str, ...] = option(NAMES, "which", choices=NAMES)
    images: int = option(2048, "at once", low=1)
    batch: int = option(64, "images a stage runs at once", low=1)
    rounds: int = option(5, "in which all take turns", low=1)


@dataclass
class Contestant:
    """A network in a backend, with many images at once and with one, and the seconds that it takes."""

    backend: str
    name: str
    at_once: Run
    single: Run
    macs: Sequence[float]
    logits: Tensor = field(init=False)
    exits: Tensor = field(init=False)
    rounds: list[float] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)

    def answer(self, images: Tensor, batch: int) -> "Contestant":
        """Notes what it says."""
        self.logits, self.exits = (part.cpu() for part in self.at_once(images, batch))
        return self

    def right(self, targets: Tensor) -> float:
        """Accuracy, a fraction."""
        return (self.logits.argmax(-1) == targets).double().mean().item()

    @property
    def mean_macs(self) -> float:
        """Multiply-adds per image."""
        return np.asarray(self.macs)[self.exits].mean().item()

    @property
    def round_s(self) -> float:
        """Seconds for all images at once, by the median round."""
        return percentile(self.rounds, 0.5)

    def single_ms(self, share: float) -> float:
        """The percentile `share` of milliseconds for one image."""
        return 1e3 * percentile(self.singles, share)


@dataclass(frozen=True)
class Expected:
    """What early exit in a backend should take for a micro-batch, in milliseconds."""

    stages_ms: list[float]
    alone_ms: float
    hand_over_ms: float
    images_per_s: float

    def cells(self, one: Contestant, images: int) -> tuple:
        """The row of the first table, with what was measured for so many images."""
        stages = " ".join(f"{spent:.2f}" for spent in self.stages_ms)
        times = sum(self.stages_ms), self.alone_ms, self.hand_over_ms
        speed = images / one.round_s
        share = 100 * speed / self.images_per_s
        return one.backend, stages, *times, self.images_per_s, speed, share


def expected(backend: Backend, policy: Policy, images: Tensor, exits: Tensor, rounds: int) -> Expected:
    """Times stages, decisions and hand-overs on a micro-batch of images; `exits` [N] are where all leave."""
    state: State = images
    rows = torch.randperm(len(images))
    calls: dict[Any, Callable[[], Any]] = {}
    memory = None
    for place, (k, stage) in enumerate(zip(policy.on, backend.stages(policy.off), strict=True)):
        calls["stage", place] = partial(stage, state)
        logits, state = stage(state)
        calls["decide", place] = partial(policy.decide, k, logits, memory)
        memory = policy.decide(k, logits, memory).memory
        calls["hand over", place] = partial(gathered, state, rows)
    calls["alone"] = partial(backend.alone(policy.on[-1]), images, len(images))
    for call in calls.values():
        call()
    times = interleaved(calls, rounds=4 * rounds, device=images.device)

    def ms(name: str) -> np.ndarray:
        return np.array([1e3 * times[name, place] for place in range(len(reached))])

    reached = np.array([(exits >= k).double().mean().item() for k in policy.on])
    stages = ms("stage")
    over = ms("decide") @ reached + ms("hand over")[:-1] @ reached[1:]
    spent = stages @ reached + over
    return Expected(stages.tolist(), 1e3 * times["alone"], float(over), float(1e3 * len(images) / spent))


def gathered(state: Any, rows: Tensor) -> Any:
    """Rows of every tensor or array of a state, copied."""
    if isinstance(state, Tensor):
        return state[rows]
    if isinstance(state, np.ndarray):
        return state[rows.numpy()]
    parts = state.values() if isinstance(state, dict) else state or ()
    return [gathered(part, rows) for part in parts]


def contestants_of(
    backend: Backend, policy: Policy, images: Tensor, rivals: Sequence[int], costs: StageCosts, batch: int
) -> Iterator[Contestant]:
    """Early exit, and some exits alone."""
    name = f"{backend.name} {backend.precision}"
    pooled = backend.early(policy, "throughput")
    single = backend.early(policy, "latency")
    yield Contestant(name, EARLY, pooled, single, policy.leaving(costs)).answer(images, batch)
    for k in rivals:
        run = backend.alone(k)
        yield Contestant(name, f"exit {k} alone", run, run, costs.alone()).answer(images, batch)


def take_turns(contestants: Sequence[Contestant], images: Tensor, flags: Flags) -> None:
    """Times all contestants, round after round."""
    for i in range(flags.rounds):
        first = i * BURST % max(1, len(images) - BURST)
        burst = images[first : first + BURST].split(1)
        for one in contestants:
            calls = [partial(one.at_once, images, flags.batch)]
            calls += [partial(one.single, image, 1) for image in burst]
            turn = dict(enumerate(calls))
            times = round_times(turn, turn, rounds=1, device=images.device)
            whole, *singles = (seconds for (seconds,) in times.values())
            one.rounds.append(whole)
            one.singles += singles[min(WARM, len(burst) - 1) :]


def rows_of(contestants: Sequence[Contestant], targets: Tensor) -> Iterator[tuple]:
    """The rows of the second table; the first contestant is early exit, eagerly in fp32."""
    today = early = contestants[0]
    for one in contestants:
        moved = ""
        against = "", "", ""
        if one.name == EARLY:
            early = one
            moved = str(int((one.exits != today.exits).sum()))
        else:
            ratio = one.mean_macs / early.mean_macs
            gain = median_ratio(one.rounds, early.rounds)
            against = f"{ratio:.2f}", gain.text(), f"{gain.value / ratio:.2f}"
        latencies = [one.single_ms(share) for share in (0.5, 0.9, 0.99)]
        yield (
            one.backend,
            one.name,
            len(targets) / one.round_s,
            *latencies,
            100 * one.right(targets),
            moved,
            one.mean_macs / 1e6,
            *against,
            today.round_s / one.round_s,
            latencies[0] / today.single_ms(0.5),
        )


@torch.inference_mode()
def main(argv: list[str]) -> None:
    """Prints both tables."""
    flags, rest = read_known(Flags, argv, __doc__)
    subject = open_evaluation(read_command(EVALUATION, rest))
    costs = count(subject.network, subject.shape)
    exports = Exports.of(subject)
    wanted = dict.fromkeys([("eager", "fp32"), *product(flags.backends, flags.precisions)])
    pairs = [(name, precision) for name, precision in wanted if precision in PRECISIONS[name]]
    backends = [open_backend(*pair, exports) for pair in pairs]
    policy, seen = deployed_policy(subject, costs)
    some, labels = test_images(subject, flags.images)
    copies = -(-flags.images // len(some))
    images = some.repeat(copies, 1, 1, 1)[: flags.images]
    targets = labels.repeat(copies)[: flags.images].cpu()
    rivals = rivals_of(policy, seen, costs.stages)
    contestants: list[Contestant] = []
    forecasts = []
    part = images[: flags.batch]
    for backend in backends:
        found = list(contestants_of(backend, policy, images, rivals, costs.stages, flags.batch))
        contestants += found
        early = found[0]
        forecasts.append((early, expected(backend, policy, part, early.exits, flags.rounds)))
    take_turns(contestants, images, flags)
    repeated = f"{len(some)} test images" + f", {copies} times" * (copies > 1)
    print(f"{describe_machine(images.device)}; {repeated}; micro-batches of {flags.batch}")
    print(f"policy {policy.name}: thresholds {policy.thresholds} of {policy.confidence}")
    print_table(EXPECTED, [forecast.cells(one, len(images)) for one, forecast in forecasts])
    print()
    print_table(HEADS, rows_of(contestants, targets))


if __name__ == "__main__":
    run_main(main)
