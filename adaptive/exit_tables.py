"""What every exit predicts for every image of a data set, and the metrics of each exit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.confidence import CONFIDENCES
from adaptive.reading import Reading


@dataclass(frozen=True)
class ExitTables:
    """What every exit predicts for every sample.

    [K, N] each: the confidence asked for, whether top-1 and top-5 are correct (bool), the cross-entropy, and
    the predicted class (int32). `scores` [S, K, N] holds every kind of confidence in the order of
    `CONFIDENCES`, `targets` [N]. `full` [N] is the class that the whole network predicts: the last exit's own
    answer, whatever earlier exits say.
    """

    confidence: Tensor
    correct: Tensor
    correct5: Tensor
    loss: Tensor
    answers: Tensor
    scores: Tensor
    targets: Tensor
    full: Tensor

    @classmethod
    def of(cls, exits: list[Tensor], targets: Tensor, reading: Reading | str = "max_prob") -> "ExitTables":
        """Tables of one batch from its logits, K x [B, C], as they are read, and targets, int64 [B]."""
        columns = []
        # One after another: float64 copies of all logits would take much memory.
        for answers, confidence, _ in Reading.of(reading).read_all(exits):
            likeliest = answers.topk(min(5, answers.shape[-1])).indices
            hits = likeliest == targets[:, None]
            loss = F.cross_entropy(answers.float(), targets, reduction="none")
            scores = torch.stack([score(answers).double() for score in CONFIDENCES.values()])
            columns.append((confidence, hits[:, 0], hits.any(-1), loss, likeliest[:, 0].int(), scores))
        stacked = (torch.stack(column, -2) for column in zip(*columns, strict=True))
        return cls(*stacked, targets, exits[-1].argmax(-1).int())

    @classmethod
    def cat(cls, tables: list["ExitTables"]) -> "ExitTables":
        """One table from several, their samples one after another."""
        columns = zip(*(vars(table).values() for table in tables), strict=True)
        return cls(*(torch.cat(parts, -1) for parts in columns))

    @classmethod
    def interleave(cls, tables: list["ExitTables"]) -> "ExitTables":
        """One table from the shards of a data set: sample i of shard r of n is sample r + i * n."""
        whole = cls.cat(tables)
        place = torch.cat([torch.arange(r, len(whole), len(tables)) for r in range(len(tables))])
        return whole.part(place.argsort())

    def __len__(self) -> int:
        return self.loss.shape[1]

    def part(self, samples: Tensor) -> "ExitTables":
        """The table of some samples (int64 indices)."""
        return ExitTables(*(column[..., samples] for column in vars(self).values()))

    def of_exits(self, exits: Sequence[int]) -> "ExitTables":
        """The table of some exits, in the order given."""
        *tables, targets, full = vars(self).values()
        return ExitTables(*(table[..., list(exits), :] for table in tables), targets, full)

    @property
    def full_correct(self) -> Tensor:
        """Whether the whole network is right, bool [N]."""
        return self.full == self.targets

    def means(self) -> dict[str, list[float]]:
        """`loss`, `acc1` and `acc5` (fractions) of every exit."""
        rows = {"loss": self.loss, "acc1": self.correct, "acc5": self.correct5}
        return {name: [row.mean().item() for row in table.double()] for name, table in rows.items()}


class GrowingTables:
    """The tables of all batches so far, in main memory, in columns that double when they are full.

    In a list of the batches' own tables, small tensors would stay behind between the large ones of every
    batch and leave holes in the heap that the next batch's logits do not fit into: memory would grow with
    every batch.
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.count = 0

    def add(self, batch: ExitTables) -> None:
        """Copies the table of the next batch."""
        given = list(vars(batch).values())
        end = self.count + len(batch)
        if not self.columns or end > self.columns[-1].shape[-1]:
            full = self.columns
            self.columns = [part.new_empty(*part.shape[:-1], 2 * end, device="cpu") for part in given]
            self._write(full, 0, self.count)
        self._write(given, self.count, end)
        self.count = end

    def _write(self, parts: list[Tensor], start: int, end: int) -> None:
        for column, part in zip(self.columns, parts, strict=False):  # there are no parts at first
            column[..., start:end] = part[..., : end - start]

    def table(self) -> ExitTables | None:
        """The table of them all, without spare room; None if there are none."""
        return (
            ExitTables(*(column[..., : self.count].clone() for column in self.columns))
            if self.count
            else None
        )


def first_not_finite(exits: Sequence[Tensor]) -> tuple[int, int, float] | None:
    """Exit, row and value of the first logit of K x [B, C] that is NaN or infinite, if there is one."""
    for k, logits in enumerate(exits):
        wrong = ~logits.isfinite()
        if wrong.any():
            return k, int(wrong.any(1).byte().argmax()), logits[wrong][0].item()
    return None


@dataclass(frozen=True)
class ExitFigures:
    """Metrics of one exit over all images: mean cross-entropy, top-1 and top-5 accuracy as fractions.

    `macs` are the multiply-adds of one image including all earlier heads; `alone` leaves out the heads that
    only other exits need.
    """

    exit: int
    macs: int
    alone: int
    loss: float
    acc1: float
    acc5: float


def exit_figures(tables: ExitTables, macs: Sequence[int], alone: Sequence[int]) -> list[ExitFigures]:
    """The metrics of every exit, whose costs in multiply-adds are `macs` [K] and `alone` [K]."""
    columns = zip(macs, alone, *tables.means().values(), strict=True)
    return [ExitFigures(k, *figures) for k, figures in enumerate(columns)]
