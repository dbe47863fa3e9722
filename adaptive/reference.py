"""What a monitor compares a stream with: how samples leave, and how often they are wrong, in calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaptive.evidence import Floats
from adaptive.exit_tables import ExitTables
from adaptive.mix import Ints, Keys, Samples, bins_of, keys_of, ordered
from adaptive.plain import read_plain, write_plain
from adaptive.policy import Policy
from utils import UserError

Values = Sequence[Any] | NDArray[Any] | Tensor
SCHEMA = 1
TIES = 1  # marks the random numbers of a reference, which must not be those of the monitor


@dataclass(frozen=True)
class Reference:
    """How samples leave when nothing has changed: a summary, of a few kilobytes, of N samples.

    Samples are put in order of hardness: early exits first, and at one exit high confidence first. `edges`
    are some of them, evenly spread, as (exit, confidence, a random number for ties). `weights` say how many
    of the N + 1 gaps between samples lie between the edges; each gap is equally likely for a new sample.
    `left`, `labelled` and `wrong` [K] count all samples, those with known labels, and the errors by exit.
    Raises ValueError for what contradicts itself.
    """

    edges: tuple[tuple[int, float, float], ...]
    weights: tuple[int, ...]
    left: tuple[int, ...]
    labelled: tuple[int, ...]
    wrong: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.edges) + 1 or len(self.weights) < 2 or min(self.weights) < 1:
            raise UserError(f"{len(self.edges)} edges with the weights {list(self.weights)}")
        counts = np.array([self.left, self.labelled, self.wrong])  # ValueError for unequal lengths
        if counts.min() < 0 or (np.diff(counts, axis=0) > 0).any():
            raise UserError(f"samples, labels and errors {counts.tolist()} do not go together")
        if counts[0].sum() != len(self):
            raise UserError(f"{counts[0].sum()} samples by exit, {len(self)} by edge")
        exits, confidence, _ = zip(*self.edges, strict=True)
        hardness(exits, confidence, len(self.left))  # which refuses what is none
        if not (np.diff(self.keys[1]) > 0).all():
            raise UserError("its edges are out of order")

    def __len__(self) -> int:
        return sum(self.weights) - 1

    @classmethod
    def of(
        cls,
        exits: Values,
        confidence: Values,
        correct: Values | None = None,
        *,
        num_exits: int,
        bins: int = 100,
        seed: int = 0,
    ) -> "Reference":
        """The reference of samples that leave at `exits` [N], with `confidence` [N].

        `correct` [N] is NaN or None where it is not known. There are `bins` - 1 edges, fewer for few samples.
        Raises ValueError without samples, and for columns of different lengths.
        """
        samples = hardness(exits, confidence, num_exits)
        if not len(samples):
            raise UserError("a reference needs samples")
        ties = np.random.default_rng([seed, TIES]).random(len(samples))
        order = np.lexsort((ties, samples))
        gaps = len(samples) + 1
        ranks = np.unique(np.arange(1, bins) * gaps // bins)
        ranks = ranks[ranks > 0]
        edges = [
            (int(samples[i].real), -float(samples[i].imag), float(ties[i])) for i in order[ranks - 1].tolist()
        ]
        weights = np.diff([0, *ranks, gaps]).tolist()
        counts = counts_by_exit(exits, correct, num_exits)
        return cls(tuple(edges), tuple(weights), *(tuple(row) for row in counts.tolist()))

    @classmethod
    def of_policy(cls, policy: Policy, tables: ExitTables, **options: int) -> "Reference":
        """The reference of the samples of tables, which leave where the policy says.

        The rate of false alarms is guaranteed for samples on which the policy's thresholds were not chosen.
        Those leave where the policy was made to fit them, and new samples do so a little less.
        """
        met = policy.outcome(tables)
        num_exits = len(policy.thresholds)
        return cls.of(met.exits, met.confidence, met.correct, num_exits=num_exits, **options)

    @cached_property
    def keys(self) -> Keys:
        """The edges as `bins_of` wants them."""
        return keys_of(self.edges)

    def bins(self, samples: Samples, ties: Floats) -> Ints:
        """Between which edges samples [T] fall; equal ones are ordered by random `ties` [T]."""
        return bins_of(self.keys, samples, ties)

    def save(self, path: str | Path) -> None:
        """Writes the reference as JSON."""
        write_plain(Path(path), self, SCHEMA)

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Reads what `save` wrote; ValueError for a damaged file or one of another schema."""
        return read_plain(Path(path), cls, [SCHEMA], "reference")


def numbers(values: Values) -> Floats:
    """Float64 [N] of a list, array or tensor on any device; None becomes NaN."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()  # by torch, since NumPy knows no bfloat16
    return np.asarray(values, dtype=np.float64).reshape(-1)


def exit_numbers(exits: Values, num_exits: int) -> Ints:
    """Int64 [N]; ValueError for what is no exit."""
    found = numbers(exits)
    wrong = ~((found >= 0) & (found < num_exits) & (found % 1 == 0))
    if wrong.any():
        raise UserError(f"exit {found[wrong][0]:g}; accepted: 0 to {num_exits - 1}")
    return found.astype(np.int64)


def hardness(exits: Values, confidence: Values, num_exits: int) -> Samples:
    """Samples [N] as numbers that NumPy sorts by hardness, exit first; ValueError for what is not finite."""
    places = exit_numbers(exits, num_exits)
    values = numbers(confidence)
    if len(places) != len(values):
        raise UserError(f"{len(places)} exits with {len(values)} values of confidence")
    if not np.isfinite(values).all():
        raise UserError(f"confidence {values[~np.isfinite(values)][0]}; accepted: finite numbers")
    return ordered(places, values)


def counts_by_exit(exits: Values, correct: Values | None, num_exits: int) -> Ints:
    """How many samples left at each exit, how many of them have labels, and are wrong, [3, K]."""
    places = exit_numbers(exits, num_exits)
    answers = labels(correct, len(places))
    groups = places, places[~np.isnan(answers)], places[answers == 0]
    return np.stack([np.bincount(group, minlength=num_exits) for group in groups])


def labels(correct: Values | None, count: int) -> Floats:
    """1 for right, 0 for wrong, NaN for not known, [N]; ValueError for anything else."""
    if correct is None:
        return np.full(count, np.nan)
    found = numbers(correct)
    if len(found) != count:
        raise UserError(f"{count} exits with {len(found)} values of correct")
    wrong = ~(np.isnan(found) | (found == 0) | (found == 1))
    if wrong.any():
        raise UserError(f"correct {found[wrong][0]:g}; accepted: true, false, and none where not known")
    return found
