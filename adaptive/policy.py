"""Exit policies: a `Policy` is a value that decides where samples leave."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive.confidence import NOBODY, check_threshold
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.guarantee import Guarantee
from adaptive.plain import read_plain, write_plain
from adaptive.reading import Reading
from adaptive.thresholds import exit_of, simulate
from utils import UserError

SCHEMAS = 1, 2  # the last one is written; the first one had fewer entries


class Decision(NamedTuple):
    """Answers of an exit [B, C] as logits, which samples leave (bool [B]), what to remember of the others."""

    answers: Tensor
    leaves: Tensor
    memory: Any


@dataclass(frozen=True)
class Made:
    """Where a policy comes from; what is not known is empty.

    `data_set` and `images` say what its thresholds were chosen on, `num_images` images in all. `command` is
    the shell line, `commit` that of this repository, `versions` those of the packages, `precision` that in
    which the network ran. There is no date: equal results give equal files.
    """

    command: str = ""
    data_set: str = ""
    images: str = ""
    num_images: int = 0
    machine: str = ""
    commit: str = ""
    versions: tuple[str, ...] = ()
    precision: str = "fp32"


@dataclass(frozen=True)
class Policy:
    """Decides where a sample leaves: at the first exit whose confidence is at least its threshold.

    `thresholds` [K], of which the last always passes. `confidence`, `answer` and `temperatures` say how
    logits are read (`Reading`). The exits in `off` are switched off: nobody leaves there, and their heads
    do not run. `accuracy` (a fraction), `macs` (multiply-adds per image) and `shares` [K] (fraction of the
    samples that leaves at each exit) are those on the calibration images. `model_hash` and `calib_hash`
    identify weights and images; they are empty where unknown. `made` says where it comes from, `guarantee`
    what holds for it on new images. Raises ValueError for what cannot be read, for no thresholds, for one
    that the confidence never reaches, and for exits that cannot be switched off.
    """

    thresholds: tuple[float, ...]
    confidence: str = "max_prob"
    name: str = ""
    answer: str = "exit"
    temperatures: tuple[float, ...] = ()
    off: tuple[int, ...] = ()
    accuracy: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    shares: tuple[float, ...] = ()
    model_hash: str = ""
    calib_hash: str = ""
    made: Made | None = None
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        reading = self.reading  # which refuses what it does not know
        if not self.thresholds:
            raise UserError("thresholds []: give a number per exit")
        if self.temperatures and len(self.temperatures) != len(self.thresholds):
            raise UserError(
                f"{len(self.temperatures)} temperatures for {len(self.thresholds)} exits; give one per exit"
            )
        for value in self.thresholds:
            check_threshold(value, self.confidence)
        if self.off and reading.remembers:
            raise UserError(f"exits {self.off} are off, but what later exits say depends on all before them")
        for k in self.off:
            if k not in range(len(self.thresholds) - 1) or self.thresholds[k] != NOBODY:
                last = len(self.thresholds) - 1
                raise UserError(
                    f"exit {k} is off; accepted: exits 0 to {last - 1} whose threshold is {NOBODY:g}"
                )

        self._check_figures()

    def _check_figures(self) -> None:
        if len(self.shares) not in (0, len(self.thresholds)):
            raise UserError(f"{len(self.shares)} shares for {len(self.thresholds)} exits; give one per exit")
        shares = [("share", value, 1) for value in self.shares]
        for name, value, high in (("accuracy", self.accuracy, 1), ("macs", self.macs, math.inf), *shares):
            if value is not None and not 0 <= value <= high:
                accepted = "0 and more" if high > 1 else "from 0 to 1"
                raise UserError(f"{name} {value:g}: accepted: {accepted}")

    @classmethod
    def of(cls, thresholds: "Policy | Tensor | Sequence[float]", confidence: str = "max_prob") -> "Policy":
        """A policy of plain thresholds [K]; a policy is returned as it is."""
        if isinstance(thresholds, Policy):
            return thresholds
        values = thresholds.tolist() if isinstance(thresholds, Tensor) else thresholds
        return cls(tuple(values), confidence)

    @classmethod
    def by(cls, reading: Reading, thresholds: Iterable[float], name: str = "", **known: Any) -> "Policy":
        """The policy with thresholds [K] that reads logits this way; `known` are its other fields."""
        limits = tuple(thresholds)
        kind = reading.confidence
        return cls(limits, kind, name, reading.answer, reading.temperatures, **known)

    @cached_property
    def reading(self) -> Reading:
        """How it reads logits."""
        return Reading(self.confidence, self.answer, self.temperatures)

    @property
    def on(self) -> list[int]:
        """The exits that are not switched off."""
        return [k for k in range(len(self.thresholds)) if k not in self.off]

    def decide(self, k: int, logits: Tensor, memory: Any = None) -> Decision:
        """Which samples, whose logits at exit k are [B, C], leave there with which answers.

        `memory` is what it remembered of the exits before, None at the first.
        """
        answers, confidence, memory = self.reading.read(k, logits, memory)
        return Decision(answers, self.leaves(k, confidence), memory)

    def leaves(self, k: int, confidence: Tensor) -> Tensor:
        """Which samples leave at exit k, bool [B], by their confidence [B] there."""
        if k == len(self.thresholds) - 1:
            return torch.ones_like(confidence, dtype=torch.bool)
        return confidence >= self.thresholds[k]

    def exit_of(self, tables: ExitTables | Tensor) -> Tensor:
        """The exit, int64 [N], where each sample of tables, or of a confidence [K, N], leaves."""
        confidence = tables if isinstance(tables, Tensor) else tables.confidence
        return exit_of(confidence, self._limits(confidence))

    def outcome(self, tables: ExitTables) -> "Outcome":
        """What becomes of every sample of tables, which must be read as the policy reads."""
        exits = self.exit_of(tables)
        columns = tables.answers, tables.confidence, tables.correct
        return Outcome(exits, *(column.gather(0, exits[None])[0] for column in columns))

    def simulate(self, tables: ExitTables, costs: StageCosts | Sequence[float]) -> "OperatingPoint":
        """Accuracy, cost and shares on the samples of tables.

        `costs` are multiply-adds of stages, or of an image that leaves at each exit, [K].
        """
        limits = self._limits(tables.confidence)
        found = simulate(tables.confidence, tables.correct, limits, self.leaving(costs))
        return OperatingPoint(self, found.accuracy, found.cost, found.shares)

    def leaving(self, costs: StageCosts | Sequence[float]) -> Sequence[float]:
        """The cost of an image that leaves at each exit, [K]."""
        return costs.leaving(self.off) if isinstance(costs, StageCosts) else costs

    def _limits(self, confidence: Tensor) -> Tensor:
        # In the precision of the confidence, as `decide` compares.
        return torch.tensor(self.thresholds, dtype=confidence.dtype, device=confidence.device)

    def save(self, path: str | Path) -> None:
        """Writes the policy as JSON."""
        write_plain(Path(path), self, SCHEMAS[-1])

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Reads what `save` wrote; ValueError for a damaged file or one of another schema."""
        return read_plain(Path(path), cls, SCHEMAS, "policy")

    def check(self, opened: Any) -> "Policy":
        """The policy itself, if it was made for `opened.network`; ValueError for another network."""
        return self.check_network(opened.network)

    def check_network(self, network: Any) -> "Policy":
        """`check` for a module with `num_exits`."""
        expected = len(self.thresholds)
        found = network.num_exits
        if expected != found:
            raise UserError(f"policy {self.name!r} is for {expected} exits, the network has {found}")
        if self.model_hash and self.model_hash != (found := model_hash(network)):
            raise UserError(
                f"policy {self.name!r} is for weights {self.model_hash[:12]}, the network has {found[:12]}"
            )
        return self


@dataclass(frozen=True)
class Outcome:
    """Where each sample leaves, and there the class predicted, how confident the exit is of it, and whether
    it is right: [N] each."""

    exits: Tensor
    answers: Tensor
    confidence: Tensor
    correct: Tensor


@dataclass(frozen=True)
class OperatingPoint:
    """What a policy achieves on images: accuracy (a fraction), multiply-adds per image, share per exit."""

    policy: Policy
    accuracy: float
    macs: float
    shares: list[float]


def model_hash(network: nn.Module) -> str:
    """SHA-256 of a network's state dict: names, types, shapes, values; not device or memory format."""
    return content_hash(network.state_dict())


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
