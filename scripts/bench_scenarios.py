"""An exported network as its users ask it: one image, eight, all at once, or as they come; beside its rivals.

    python scripts/bench_scenarios.py --checkpoint FILE --data_path "$DATA" [--precision bf16] [--loadgen]
    python scripts/bench_scenarios.py --model ebjr --networks A B --data_set CIFAR10 --data_path "$DATA"

The flags of eval_dynamic.py apply, with --backend openvino unless another is given: the policy is the one
that it would deploy. Rivals are the last exit alone, and the cheapest exit alone that is at least as accurate
on the same images, in the same backend and precision. Scenarios are those of MLPerf's inference rules, the
figures are not MLPerf's: single stream and multi-stream (the next request when the last is answered), offline
(all images in one request), and server (the highest rate of random arrivals at which p99 is within
--bound_ms). "below" holds with 99 % confidence, by the number of requests. With --loadgen, MLCommons' load
generator sends the same requests, in turn with ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import percents, print_table, read_known, rivals_of

import numpy as np
import torch
from torch.utils.data import Subset

from adaptive import loadgen
from adaptive.costs import StageCosts
from adaptive.flops import count
from adaptive.percentiles import Latencies, fewest
from adaptive.policy import Policy
from adaptive.scenarios import SHARE, Asked, Samples, Served, highest_rate, serve, stream
from datasets import Split, ordered_loader
from deploy.backends import Exported, with_backend
from deploy.decide import Array
from deploy.queued import Queued
from deploy.runner import Runner
from experiment.evaluation import deployed_policy
from experiment.recipe import read_command
from experiment.record import describe_machine
from experiment.samples import Seen
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import UserError, option, run_main

GROUP = 8  # images of a request in multi-stream
Figures = Sequence[Sequence[float]]  # of every round
WARM = 10  # requests that are not counted, where systems take turns
SHARE_OF_HIGHEST = 0.8  # of the highest rate, at which the load generator sends its requests
LATENCIES = ["p50, ms:.2f", "p90, ms:.2f", "p99, ms:.2f"]
STREAM = ["requests", *LATENCIES, "p99 below, ms", "mean, ms:.2f", "accuracy, %:.2f"]
OFFLINE = ["images/s:.0f", "times the last exit:.2f", "by multiply-adds:.2f", "accuracy, %:.2f"]
SERVER = ["requests/s:.0f", "times the last exit:.2f", *LATENCIES, "goodput/s:.0f", "lost", "accuracy, %:.2f"]
COMPARED = ["system and figure", "here:.2f", "loadgen:.2f", "difference, %:+.1f", "spread here, %:.1f"]


@dataclass(frozen=True)
class Flags:
    """How it is asked; the flags of eval_dynamic.py apply besides."""

    micro_batch: int = option(64, "images a stage runs at once", low=1)
    threads: int = option(0, "default: all", low=0)
    images: int = option(1000, "test images that are asked for", low=1)
    requests: int = option(700, "in the streams, and at least at each rate; 662 confirm p99", low=64)
    offline: int = option(4096, "images in a request", low=1)
    bound_ms: float = option(50.0, "of p99 of a server", low=0)
    seconds: float = option(2.0, "that requests come at each rate", low=0)
    rounds: int = option(3, "in which systems take turns", low=1)
    loadgen: bool = option(False, "early exit and the last exit with MLCommons' load generator too")


@dataclass(frozen=True)
class System:
    """A runner of an exported folder, and the multiply-adds of an image."""

    runner: Runner
    macs: float

    def one(self, images: Array) -> Array:
        """Classes of a few images."""
        return self.runner.answer(images, "latency").classes

    def many(self, images: Array) -> Array:
        """Classes of many."""
        return self.runner.answer(images, "throughput").classes


def samples_of(subject: Subject, seen: Seen, number: int) -> Samples:
    """Evenly spread test images that no threshold was chosen on."""
    if not isinstance(subject.splits.test, Split):
        raise UserError("the test images are a stream; give a data set with images by index")
    known = len(seen.places)
    even = torch.linspace(0, known - 1, min(number, known)).long()
    images = Subset(subject.splits.test, seen.places[even].tolist())
    batches = ordered_loader(images, subject.recipe.runtime, subject.compute)
    pixels, labels = map(torch.cat, zip(*batches, strict=True))
    return Samples(pixels.cpu().contiguous().numpy(), labels.cpu().numpy())


def systems_of(
    backend: Exported, policy: Policy, seen: Seen, costs: StageCosts, flags: Flags
) -> dict[str, System]:
    """Early exit, the last exit alone, and the best static network, as exported."""
    exports = backend.exports
    precision = backend.precision
    early = policy.simulate(seen.read_by(policy), costs)
    rivals = rivals_of(policy, seen, costs)
    right = percents(seen.own.means()["acc1"])
    print(f"exits alone, %: {right}")
    print(f"the best static network at {100 * early.accuracy:.2f} % is exit {rivals[-1]}")

    def system(folder: Path, cost: float) -> System:
        runner = Runner(
            folder,
            backend.name,
            precision,
            micro_batch=flags.micro_batch,
            threads=flags.threads,
        )
        return System(runner, cost)

    own = system(exports.without(policy.off, precision), early.macs)
    own.runner.policy = exports.policy(policy)
    found = {"early exit": own}
    macs = costs.alone()
    for k in rivals:
        found[f"exit {k} alone"] = system(exports.alone(k, precision), macs[k])
    return found


def stream_row(name: str, asked: Asked) -> tuple:
    """A row of `STREAM`."""
    found = Latencies.of(asked.latencies_ms)
    below = "-" if found.p99_below_ms is None else f"{found.p99_below_ms:.2f}"
    return name, found.requests, *found.quantiles_ms, below, found.mean_ms, 100 * asked.accuracy


def report_streams(systems: dict[str, System], samples: Samples, flags: Flags) -> dict[str, float]:
    """Prints the tables of single stream, multi-stream and offline; returns images/s of the last."""
    ones = {name: one.one for name, one in systems.items()}
    for title, size in {"single stream": 1, f"multi-stream, {GROUP} images a request": GROUP}.items():
        found = stream(ones, samples, flags.requests, size, rounds=flags.rounds, warm=WARM)
        print(f"\n{title}")
        print_table(["system", *STREAM], [stream_row(*one) for one in found.items()])
    many = {name: one.many for name, one in systems.items()}
    found = stream(many, samples, flags.rounds, flags.offline, rounds=flags.rounds)
    speeds = {name: one.images_per_s for name, one in found.items()}
    last = list(systems)[1]
    print(f"\noffline, {flags.offline} images a request, median of {flags.rounds}")
    rows = []
    for name, one in systems.items():
        gain = speeds[name] / speeds[last]
        ideal = systems[last].macs / one.macs
        rows.append((name, speeds[name], gain, ideal, 100 * found[name].accuracy))
    print_table(["system", *OFFLINE], rows)
    return speeds


def report_server(
    queues: dict[str, Queued], speeds: dict[str, float], samples: Samples, flags: Flags
) -> dict[str, Served | None]:
    """Prints and returns what each system serves within the bound."""
    found = {}
    for name, queue in queues.items():

        def trial(rate: float, seed: int, queue: Queued = queue) -> Served:
            requests = int(rate * flags.seconds * (1 + 2 * seed))  # the last for longer
            requests = max(flags.requests, fewest(SHARE), requests)
            return serve(queue.submit, samples, rate, requests, bound_ms=flags.bound_ms, seed=seed)

        found[name] = highest_rate(trial, speeds[name])
    print(f"\nserver, p99 within {flags.bound_ms:g} ms")
    last = found[list(queues)[1]]
    rows = []
    for name, one in found.items():
        if one is None:
            rows.append((name, *["-"] * len(SERVER)))
            continue
        gain = one.rate / last.rate if last else float("nan")
        answers = one.goodput, one.lost, 100 * one.accuracy
        rows.append((name, one.rate, gain, *one.latencies.quantiles_ms, *answers))
    print_table(["system", *SERVER], rows)
    return found


def compared(name: str, system: System, samples: Samples, flags: Flags) -> Iterator[tuple]:
    """Rows of figures found here and by the load generator, which take turns."""
    here, there = [], []
    for _ in range(flags.rounds):
        asked = stream({name: system.one}, samples, flags.requests, 1, rounds=1, warm=WARM)[name]
        own = Latencies.of(asked.latencies_ms)
        whole = stream({name: system.many}, samples, 1, flags.offline, rounds=1)[name]
        here.append((own.p50_ms, own.p90_ms, own.mean_ms, whole.images_per_s))
        other = loadgen.single_stream(system.one, samples, flags.requests)
        whole = loadgen.offline(system.many, samples, flags.offline)
        there.append((other.p50_ms, other.p90_ms, other.mean_ms, whole.images_per_s))
    titles = ["single stream, p50 ms", "p90 ms", "mean ms", "offline, images/s"]
    return rows_of(name, titles, here, there)


def rows_of(name: str, titles: Sequence[str], here: Figures, there: Figures) -> Iterator[tuple]:
    """Rows of `COMPARED`, one for each title, of the figures of all rounds."""
    for k, title in enumerate(titles):
        own = [figures[k] for figures in here]
        middle = np.median(own)
        other = np.median([figures[k] for figures in there])
        yield f"{name}: {title}", middle, other, 100 * (other / middle - 1), 100 * np.ptp(own) / middle


def compared_server(name: str, queue: Queued, rate: float, samples: Samples, flags: Flags) -> Iterator[tuple]:
    """Rows of a server's latencies at a rate, found here and by the load generator."""
    here, there = [], []
    requests = max(flags.requests, int(rate * flags.seconds))
    for seed in range(flags.rounds):
        own = serve(queue.submit, samples, rate, requests, bound_ms=flags.bound_ms, seed=seed).latencies
        here.append((own.p50_ms, own.p90_ms))
        other = loadgen.server(queue.submit, samples, rate, requests, flags.bound_ms)
        there.append((other.p50_ms, other.p90_ms))
    return rows_of(f"{name}: {rate:.0f} requests/s", ["p50 ms", "p90 ms"], here, there)


def measure(systems: dict[str, System], samples: Samples, flags: Flags) -> None:
    """Measures and prints everything."""
    queues = {name: Queued(one.runner, samples.images[0]) for name, one in systems.items()}
    speeds = report_streams(systems, samples, flags)
    served = report_server(queues, speeds, samples, flags)
    if flags.loadgen:
        rows: list[tuple] = []
        for name, one in list(systems.items())[:2]:
            rows += compared(name, one, samples, flags)
            if highest := served[name]:
                rate = SHARE_OF_HIGHEST * highest.rate
                rows += compared_server(name, queues[name], rate, samples, flags)
        print("\nthe same by MLCommons' load generator")
        print_table(COMPARED, rows)
    for queue in queues.values():
        queue.close()


def main(argv: list[str]) -> None:
    """Prints a table for every scenario."""
    flags, words = read_known(Flags, argv, __doc__)
    given = read_command(EVALUATION, ["--backend", "openvino", *words])
    subject, line = with_backend(open_evaluation(given))
    backend = subject.backend
    if not isinstance(backend, Exported):
        raise UserError(f"--backend {subject.recipe.exits.backend}; accepted here: openvino, onnxruntime")
    costs = count(subject.network, subject.shape)
    policy, seen = deployed_policy(subject, costs)
    samples = samples_of(subject, seen, flags.images)
    machine = describe_machine(torch.device("cpu"))
    print(f"{machine}; {line or backend.name}, {backend.precision}; {len(samples.labels)} images")
    measure(systems_of(backend, policy, seen, costs.stages, flags), samples, flags)


if __name__ == "__main__":
    run_main(main)
