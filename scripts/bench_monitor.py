"""False alarms and delays of the drift monitor, on streams drawn from the images of an evaluation.

    python scripts/bench_monitor.py --shifted_path FILE [--streams 1000] WHAT TO EVALUATE

What to evaluate is as for eval_dynamic.py: --checkpoint FILE --data_path PATH, or the networks of a cascade.
The policy is the one that it would choose. References and streams are drawn anew for every stream, with
replacement, from the test images that are reported on; after the change, images are drawn from the test
images in --shifted_path, a folder or .npz file as for --eval_data_path. The delay is the number of images
from the change to the alarm.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from common import percents, print_table, read_known

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from adaptive.exit_tables import ExitTables
from adaptive.flops import count
from adaptive.monitor import Monitor
from adaptive.policy import Policy
from adaptive.reference import Reference, numbers
from datasets import open_splits
from experiment.evaluation import deployed_policy
from experiment.recipe import read_command
from experiment.samples import tables
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import UserError, option, run_main

HEADS = ["test", "change after", "streams", "alarms before, %:.1f", "found, %:.1f"]
HEADS += ["delay p50:.0f", "p90:.0f", "p99:.0f"]


@dataclass(frozen=True)
class Flags:
    """How streams are drawn."""

    shifted_path: str = option("", "test images of the same classes after the change")
    shifted_images: int = option(3000, "how many of them, drawn once", low=1)
    streams: int = option(1000, "without a change, and for every change", low=1)
    length: int = option(5000, "images of a stream without a change", low=1)
    changes: tuple[int, ...] = option((0, 500, 2000, 10000), "images before the change", low=0)
    after: int = option(2000, "images after the change", low=1)
    reference: int = option(500, "images of a reference", low=2)
    labels: float = option(1.0, "share of the images whose label becomes known", low=0, high=1)
    alarm_rate: float = option(0.05, "false alarms accepted, a fraction of the streams", low=0, high=1)
    per_exit: bool = option(False, "also a test of the error at every exit")


@dataclass(frozen=True)
class Pool:
    """What streams are drawn from: where images leave, with which confidence, answered right or not, [N]."""

    exits: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, policy: Policy, images: ExitTables) -> "Pool":
        """Of the images of tables."""
        met = policy.outcome(images)
        return cls(*map(numbers, (met.exits, met.confidence, met.correct)))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Columns [3, count] of images drawn with replacement."""
        picks = rng.integers(len(self.exits), size=count)
        return np.stack([self.exits[picks], self.confidence[picks], self.correct[picks]])

    def text(self, num_exits: int) -> str:
        """How many images leave where, and how many answers are wrong."""
        count = len(self.exits)
        shares = np.bincount(self.exits.astype(int), minlength=num_exits) / count
        error = 100 * (1 - self.correct.mean())
        return f"{count} images, {percents(shares, 1)} % by exit, error {error:.2f} %"


def shifted_images(subject: Subject, flags: Flags) -> Dataset:
    """The images after the change, evenly drawn."""
    if not flags.shifted_path:
        raise UserError("name the images after the change: --shifted_path PATH")
    data = replace(subject.recipe.data, eval_data_path=flags.shifted_path)
    images = open_splits(data, subject.splits.view, subject.recipe.transform, subject.held_out).test
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Subset(images, order[: flags.shifted_images].tolist())


def first_alarms(
    flags: Flags, num_exits: int, before: Pool, after: Pool, counts: tuple[int, int]
) -> dict[str, np.ndarray]:
    """After how many images [S] each test gives an alarm in each stream, infinite where it does not.

    A stream has `counts` images of the pools before and after the change.
    """
    columns: dict[str, np.ndarray] = {}
    for number in range(flags.streams):
        rng = np.random.default_rng([number, *counts])
        reference = Reference.of(*before.draw(flags.reference, rng), num_exits=num_exits, seed=number)
        monitor = Monitor(reference, alarm_rate=flags.alarm_rate, per_exit=flags.per_exit, seed=number)
        drawn = zip((before, after), counts, strict=True)
        stream = np.concatenate([pool.draw(count, rng) for pool, count in drawn], axis=1)
        known = rng.random(stream.shape[1]) < flags.labels
        stream[2, ~known] = np.nan
        status = monitor.update(*stream)
        # A test of risk counts the images whose label it has seen.
        places = {"mix": np.arange(stream.shape[1]), "risk": np.flatnonzero(known)}
        for k in range(num_exits):
            places[f"risk at exit {k}"] = np.flatnonzero(known & (stream[0] == k))
        for one in status.verdicts:
            column = columns.setdefault(one.test, np.full(flags.streams, np.inf))
            if one.alarm_at is not None:
                column[number] = places[one.test][one.alarm_at - 1] + 1
    return columns | {"any": np.min(list(columns.values()), axis=0)}


def rows_of(change: int | None, alarms: dict[str, np.ndarray]) -> Iterator[tuple]:
    """The rows of a table: how often and how late each test finds a change after so many images."""
    for test, at in alarms.items():
        if change is None:
            yield test, "never", len(at), 100 * np.isfinite(at).mean(), *"----"
            continue
        delays = at[at > change] - change
        known = delays if len(delays) else [np.nan]
        late = np.quantile(known, (0.5, 0.9, 0.99), method="inverted_cdf")
        before = 100 * (at <= change).mean()
        found = 100 * np.isfinite(delays).sum() / max(len(delays), 1)
        yield test, str(change), len(at), before, found, *late


def main(argv: list[str]) -> None:
    """Prints how the pools differ, then a row for every test and every change."""
    flags, words = read_known(Flags, argv, __doc__)
    subject = open_evaluation(read_command(EVALUATION, words))
    shifted = shifted_images(subject, flags)  # a wrong path fails before images are read
    policy, seen = deployed_policy(subject, count(subject.network, subject.shape))
    before = Pool.of(policy, seen.read_by(policy))
    after = Pool.of(policy, tables(subject, shifted, "shifted", policy.reading))
    num_exits = len(policy.thresholds)
    print(f"{policy.name}; thresholds from {seen.origin}")
    print(f"before the change: {before.text(num_exits)}")
    print(f"after the change: {after.text(num_exits)}")
    print(f"references of {flags.reference} images, alarm rate {100 * flags.alarm_rate:g} %")
    rows = list(rows_of(None, first_alarms(flags, num_exits, before, after, (flags.length, 0))))
    for change in flags.changes:
        alarms = first_alarms(flags, num_exits, before, after, (change, flags.after))
        rows += rows_of(change, alarms)
    print_table(HEADS, rows)


if __name__ == "__main__":
    run_main(main)
