"""What bf16 and int8 change: every exit, where images leave and with which answers, and speed.

    python scripts/measure_precision.py --checkpoint FILE --data_path "$DATA" [--drop 0.005]
    python scripts/measure_precision.py --model ebjr --networks A B --data_set CIFAR10 --data_path "$DATA"

The flags of eval_dynamic.py apply. In every precision early exit runs twice: with the thresholds of fp32, and
with those that an evaluation in this precision chooses on its own tables of the same calibration images.
Expected: on the calibration images; measured: on the test images, by tables. Moved: images that leave at
another exit than in fp32; other answers: that early exit gives another class. Images/s: real early exit in
full micro-batches, all rows in turn, median of the rounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from common import percents, print_table, read_known, warm_times

import torch

from adaptive.backend import Run
from adaptive.costs import StageCosts
from adaptive.flops import Costs, count
from adaptive.policy import Policy
from deploy.backends import PRECISIONS, Exports, open_backend
from experiment.evaluation import deployed_policy
from experiment.recipe import read_command
from experiment.record import describe_machine
from experiment.samples import Seen, test_images
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import UserError, option, run_main

HEADS = ["precision", "thresholds", "exits, top-1, %", "expected top-1, %:.2f", "measured:.2f"]
HEADS += ["expected MACs, M:.2f", "measured:.2f", "moved, %:.2f", "other answers, %:.2f", "images/s:.0f"]


@dataclass(frozen=True)
class Flags:
    """What is measured; the flags of eval_dynamic.py apply besides."""

    on: str = option("openvino", "backend", choices=("openvino", "onnxruntime"))
    images: int = option(2048, "at once", low=1)
    batch: int = option(64, "images a stage runs at once", low=1)
    rounds: int = option(3, "in which all take turns", low=1)


@dataclass(frozen=True)
class Case:
    """Early exit in a precision by a policy: the tables of the test images, and what runs it."""

    precision: str
    thresholds: str
    policy: Policy
    seen: Seen
    run: Run


def cells(case: Case, base: Case, costs: StageCosts, images_per_s: float) -> tuple:
    """The row of the table; `base` is fp32."""
    policy = case.policy
    tables = case.seen.read_by(policy)
    exits = percents(case.seen.own.means()["acc1"])
    point = policy.simulate(tables, costs)
    found = policy.outcome(tables)
    expected = base.policy.outcome(base.seen.read_by(base.policy))
    moved = 100 * (found.exits != expected.exits).double().mean().item()
    other = 100 * (found.answers != expected.answers).double().mean().item()
    assert policy.accuracy is not None and policy.macs is not None
    accuracies = 100 * policy.accuracy, 100 * point.accuracy
    macs = policy.macs / 1e6, point.macs / 1e6
    return case.precision, case.thresholds, exits, *accuracies, *macs, moved, other, images_per_s


def cases_of(subject: Subject, flags: Flags, costs: Costs) -> Iterator[Case]:
    """Early exit in every precision of the backend, by the thresholds of fp32 and by its own."""
    exports = Exports.of(subject)
    base = None
    for precision in PRECISIONS[flags.on]:
        backend = open_backend(flags.on, precision, exports)
        own, seen = deployed_policy(replace(subject, backend=backend), costs)
        if base:
            yield Case(precision, "of fp32", base, seen, backend.early(base, "throughput"))
        yield Case(precision, "its own", own, seen, backend.early(own, "throughput"))
        base = base or own


@torch.inference_mode()
def main(argv: list[str]) -> None:
    """Prints the table."""
    flags, words = read_known(Flags, argv, __doc__)
    subject = open_evaluation(read_command(EVALUATION, words))
    if subject.policy:
        raise UserError("--policy: here thresholds are made in every precision")
    costs = count(subject.network, subject.shape)
    cases = list(cases_of(subject, flags, costs))
    images, _ = test_images(subject, flags.images)
    calls = {k: partial(one.run, images, flags.batch) for k, one in enumerate(cases)}
    times = warm_times(calls, flags.rounds, images.device)
    base = cases[0]
    print(f"{describe_machine(images.device)}; {flags.on}, micro-batches of {flags.batch}")
    print(f"{len(base.seen.test)} test images; policy {base.policy.name} by {base.policy.confidence}")
    speeds = [len(images) / seconds for seconds in times.values()]
    rows = [cells(one, base, costs.stages, speed) for one, speed in zip(cases, speeds, strict=True)]
    print_table(HEADS, rows)


if __name__ == "__main__":
    run_main(main)
