"""What every exit predicts for every image of a data set, and the metrics of each exit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.confidence import CONFIDENCES, confidence_function


@dataclass(frozen=True)
class ExitTables:
    """What every exit predicts for every sample.

    [K, N] each: the confidence asked for, whether top-1 and top-5 are correct (bool), and the cross-entropy.
    `scores` [S, K, N] holds every kind of confidence in the order of `CONFIDENCES`, `targets` [N].
    """

    confidence: Tensor
    correct: Tensor
    correct5: Tensor
    loss: Tensor
    scores: Tensor
    targets: Tensor

    @classmethod
    def of(cls, exits: list[Tensor], targets: Tensor, confidence: str = "max_prob") -> "ExitTables":
        """Tables of one batch from its logits, K x [B, C], and targets, int64 [B]."""
        logits = torch.stack(exits)
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = best == targets[None, :, None]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.repeat(len(exits)), reduction="none")
        scores = torch.stack([score(logits).double() for score in CONFIDENCES.values()])
        asked = confidence_function(confidence)(logits)
        return cls(asked, hits[..., 0], hits.any(-1), loss.view(len(exits), -1), scores, targets)

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
        *tables, targets = vars(self).values()
        return ExitTables(*(table[..., list(exits), :] for table in tables), targets)

    def cpu(self) -> "ExitTables":
        """The table in main memory."""
        return ExitTables(*map(Tensor.cpu, vars(self).values()))

    def means(self) -> dict[str, list[float]]:
        """`loss`, `acc1` and `acc5` (fractions) of every exit."""
        rows = {"loss": self.loss, "acc1": self.correct, "acc5": self.correct5}
        return {name: [row.mean().item() for row in table.double()] for name, table in rows.items()}


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
