"""Deferring on a set of samples: which go beyond exit 0, what that changes, and what is the best possible.

A deferred sample is corrected or degraded by the later answer. In a cascade of two networks, exit 0 is the
student and exit 1 the teacher (EBJR, https://arxiv.org/abs/2110.10343). Tables are K exits x N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.confidence import CONFIDENCES
from adaptive.exit_tables import ExitTables
from adaptive.policy import OperatingPoint

# Answer at exit 0, then at the exit where a sample left; right_wrong is degraded, wrong_right corrected.
FOUR_WAYS = ("right_right", "right_wrong", "wrong_right", "wrong_wrong")


@dataclass(frozen=True)
class Routing:
    """What deferring did at one operating point.

    `deferred` is the share of the `samples` that goes past exit 0; `four_way` counts these by their
    correctness before and after; `oracle` is the best router's {accuracy, macs}. `auroc` maps every kind of
    confidence to how well it separates correct from wrong answers at each exit but the last. `flops` is the
    mean count of the published tools, doubled as in EBJR.
    """

    point: OperatingPoint
    samples: int
    deferred: float
    four_way: dict[str, int]
    oracle: dict[str, float]
    auroc: dict[str, list[float | None]]
    flops: float


def auroc(score: Tensor, positive: Tensor) -> float | None:
    """Probability that a positive sample scores higher than another one, ties counting half.

    `score` and `positive` (bool) are [N]. None where all samples are of one kind, or a score is not a number.
    """
    if positive.all() or not positive.any() or score.isnan().any():
        return None
    from sklearn.metrics import roc_auc_score  # takes a second to import

    return float(roc_auc_score(positive.numpy(), score.numpy()))


def oracle(correct: Tensor, costs: Sequence[float]) -> dict[str, float]:
    """Accuracy and mean cost if each sample left at its first correct exit, or at exit 0 without one."""
    exits = correct.byte().argmax(0)
    macs = torch.tensor(costs, dtype=torch.float64)[exits].mean().item()
    return {"accuracy": correct.any(0).double().mean().item(), "macs": macs}


def four_way(correct: Tensor, exits: Tensor) -> dict[str, int]:
    """Counts of the samples that did not leave at exit 0, by `FOUR_WAYS`; exits [N]."""
    wrong = ~correct
    way = 2 * wrong[0] + wrong.gather(0, exits[None])[0]  # [N], an index of FOUR_WAYS
    counts = way[exits > 0].bincount(minlength=4)
    return dict(zip(FOUR_WAYS, counts.tolist(), strict=True))


def routing(
    tables: ExitTables, point: OperatingPoint, costs: Sequence[int], papers: Sequence[int]
) -> Routing:
    """The `Routing` of one operating point; `costs` [K] are multiply-adds, `papers` [K] published counts.

    Published counts are those of the papers' tools.
    """
    exits = point.policy.exit_of(tables)
    kinds = {}
    for kind, scores in zip(CONFIDENCES, tables.scores, strict=True):
        kinds[kind] = [auroc(*pair) for pair in zip(scores[:-1], tables.correct[:-1], strict=True)]
    deferred = (exits > 0).double().mean().item()
    ways, best = four_way(tables.correct, exits), oracle(tables.correct, costs)
    flops = 2 * torch.tensor(papers, dtype=torch.float64)[exits].mean().item()
    return Routing(point, len(exits), deferred, ways, best, kinds, flops)
