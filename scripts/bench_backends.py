"""Early exit in every backend and precision, beside static networks in the same one, and its floor.

    python scripts/bench_backends.py --checkpoint FILE --data_path "$DATA" [--drop 0.005] [--policy FILE]
    python scripts/bench_backends.py --model ebjr --networks A B --data_set CIFAR10 --data_path "$DATA"

The flags of eval_dynamic.py apply: the policy is the one that it would deploy, the same in all backends.
First table: what to expect. Every stage is timed alone on a full micro-batch, in several calls in a row, and
weighted by the share of the images that reach it; so is the hand-over: deciding who leaves, and copying the
rows that stay for the next stage, as this backend does it. "expected" is what early exit would take then,
"measured" is its speed in the second table.
Second table: what is measured, early exit beside the last exit alone and the cheapest exit alone that is at
least as accurate as early exit on the test images (eagerly in fp32). All take turns in one run, with all
images at once (images/s) and with one at a time (p50, p90, p99 in ms). Test images are repeated where there
are too few; without --images there are as many as --seconds allow.
Moved: images that leave at another exit than eagerly in fp32. MACs: multiply-adds per image; ratio: those of
this row over those of early exit above it. Gain: images/s of early exit over those of this row, by median
rounds, with the 95 % interval over rounds. The last two columns compare with early exit eagerly in fp32:
images/s of this row over its, and p50 of this row over its.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from timeit import timeit
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
from deploy.backends import PRECISIONS, Exported, Exports, open_backend
from deploy.runner import Pool
from experiment.evaluation import deployed_policy
from experiment.recipe import read_command
from experiment.record import describe_machine
from experiment.samples import test_images
from experiment.subject import EVALUATION, open_evaluation
from models import take
from utils import option, run_main

BURST = 50  # images one at a time in a round
WARM = 10  # of which the first are not counted
IN_A_ROW_S = 0.1  # for which a stage is called in a row, at least twice
MOST = 2048  # images at once without --images
BACKENDS = "eager", "openvino", "onnxruntime"
EARLY = "early exit"
EXPECTED = [
    "backend",
    "stages on a micro-batch, ms",
    "sum:.2f",
    "last exit alone, ms:.2f",
    "hand-over, ms:.2f",
    "expected, images/s:.0f",
    "measured:.0f",
    "of expected, %:.0f",
]
HEADS = [
    "backend",
    "network",
    "images/s:.0f",
    "p50, ms:.2f",
    "p90:.2f",
    "p99:.2f",
    "top-1, %:.2f",
    "moved",
    "MACs, M:.2f",
    "ratio",
    "gain",
    "gain / ratio",
    "images/s / eager fp32's:.2f",
    "p50 / its:.2f",
]


@dataclass(frozen=True)
class Flags:
    """What is timed; the flags of eval_dynamic.py apply besides."""

    backends: tuple[str, ...] = option(BACKENDS, "which", choices=tuple(PRECISIONS))
    precisions: tuple[str, ...] = option(NAMES, "which", choices=NAMES)
    images: int = option(0, f"at once; default: as --seconds allow, {MOST} at most", low=0)
    seconds: float = option(100.0, "of the rounds, about; more images take longer", low=0)
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

    def answer(self, images: Tensor, batch: int) -> None:
        """Notes what it says."""
        self.logits, self.exits = (part.cpu() for part in self.at_once(images, batch))

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
        return one.backend, stages, *times, self.images_per_s, speed, 100 * speed / self.images_per_s


def expected(backend: Backend, policy: Policy, images: Tensor, exits: Tensor) -> Expected:
    """Times stages and hand-overs on a micro-batch of images; `exits` [N] are where all leave."""
    size = len(images)
    reached = np.array([(exits >= k).double().mean().item() for k in policy.on])
    left = [*reached[1:] / reached[:-1].clip(1e-9), 0]
    decides: Any = policy
    state = images
    memory = None
    exported = isinstance(backend, Exported)
    if exported:
        decides = backend.exports.policy(policy)
        memory = {}
    runs, hands = [], []
    for k, stage, share in zip(policy.on, backend.stages(policy.off), left, strict=True):
        runs.append(partial(stage, state))
        logits, state = stage(state)
        rows = torch.randperm(size)[: round(size * share)].sort().values
        if exported:
            logits = logits.numpy()
            rows = rows.numpy()
        call = partial(hand_over, decides, k, logits, memory, state, rows, Pool(size))
        memory = call()
        hands.append(call)
    *stages, alone = in_a_row([*runs, partial(backend.alone(policy.on[-1]), images, size)], images)
    over = reached @ in_a_row(hands, images)
    spent = reached @ stages + over
    return Expected([1e3 * one for one in stages], 1e3 * alone, 1e3 * over, size / spent)


def hand_over(policy: Any, k: int, logits: Any, memory: Any, state: Any, rows: Any, pool: Pool) -> Any:
    """Decides, and copies the rows that stay, in NumPy into the pool; returns what the policy remembers."""
    *_, memory = policy.decide(k, logits, memory)
    if isinstance(rows, Tensor):
        take((memory, state), rows)
    elif len(rows):
        pool.fill = 0
        pool.put(state | memory, rows)
    return memory


def in_a_row(calls: Sequence[Callable[[], Any]], images: Tensor) -> list[float]:
    """Seconds of each call, where it comes several times in a row; on the device of the images."""
    rows = {}
    for call in calls:
        call()
        count = max(2, int(IN_A_ROW_S / timeit(call, number=1)))
        rows[call, count] = partial(timeit, call, number=count)
    times = interleaved(rows, rounds=3, device=images.device)
    return [seconds / count for (_, count), seconds in times.items()]


def contestants_of(
    backend: Backend, policy: Policy, rivals: Sequence[int], costs: StageCosts
) -> Iterator[Contestant]:
    """Early exit, and some exits alone."""
    name = f"{backend.name} {backend.precision}"
    pooled = backend.early(policy, "throughput")
    single = backend.early(policy, "latency")
    yield Contestant(name, EARLY, pooled, single, policy.leaving(costs))
    for k in rivals:
        run = backend.alone(k)
        yield Contestant(name, f"exit {k} alone", run, run, costs.alone())


def enough(contestants: Iterable[Contestant], images: Tensor, flags: Flags) -> int:
    """How many images at once all contestants take through the rounds in `--seconds`: whole micro-batches."""
    spent = 0.0
    for one in contestants:
        run = partial(one.at_once, images, flags.batch)
        run()
        spent += timeit(run, number=1)
    number = min(MOST, len(images) * flags.seconds / (spent * (1 + flags.rounds)))
    return int(max(4, number // flags.batch)) * flags.batch


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
    some, labels = test_images(subject, flags.images or MOST)
    rivals = rivals_of(policy, seen, costs.stages)
    teams = [list(contestants_of(one, policy, rivals, costs.stages)) for one in backends]
    contestants = list(chain(*teams))
    number = flags.images or enough(contestants, some[: 2 * flags.batch], flags)
    copies = -(-number // len(some))
    images = some.repeat(copies, 1, 1, 1)[:number]
    targets = labels.repeat(copies)[:number].cpu()
    forecasts = []
    for backend, team in zip(backends, teams, strict=True):
        for one in team:
            one.answer(images, flags.batch)
        early = team[0]
        forecasts.append((early, expected(backend, policy, images[: flags.batch], early.exits)))
    take_turns(contestants, images, flags)
    where = f"{min(number, len(some))} test images" + f", {copies} times" * (copies > 1)
    print(f"{describe_machine(images.device)}; {where}; micro-batches of {flags.batch}")
    print(f"policy {policy.name or 'given'}: thresholds {policy.thresholds} of {policy.confidence}")
    print_table(EXPECTED, [forecast.cells(one, len(images)) for one, forecast in forecasts])
    print()
    print_table(HEADS, rows_of(contestants, targets))


if __name__ == "__main__":
    run_main(main)
