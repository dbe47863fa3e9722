"""What a router does to a set of samples: who is handed on, whether that helped, and what the best router
would do.

Pure functions of the tables that evaluation makes, K exits x N samples; for a cascade of two networks exit 0
is the student and exit 1 the teacher (EBJR, https://arxiv.org/abs/2110.10343).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive.confidence import CONFIDENCES
from adaptive.thresholds import exit_of


def auroc(score: Tensor, positive: Tensor) -> float | None:
    """Chance that a positive sample has the higher score than another, ties counting half; score and bool
    [N].

    None where all samples are of one kind.
    """
    _, rank, counts = score.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_rank = (ends - (counts - 1) / 2)[rank]  # of equal scores, from 1
    above, below = int(positive.sum()), int((~positive).sum())
    if not above or not below:
        return None
    return ((mean_rank[positive].sum() - above * (above + 1) / 2) / (above * below)).item()


def oracle(correct: Tensor, costs: Sequence[float]) -> dict[str, float]:
    """Accuracy and mean cost if each sample left at the first exit that is right, or at exit 0 where none
    is."""
    exits = correct.byte().argmax(0)
    macs = torch.tensor(costs, dtype=torch.float64)[exits].mean().item()
    return {"accuracy": correct.any(0).double().mean().item(), "macs": macs}


def four_way(correct: Tensor, exits: Tensor) -> dict[str, int]:
    """Of the samples that did not leave at exit 0, how many exit 0 and the exit where they left know; exits
    [N].

    Keys say it of both: right_right, right_wrong (spoilt), wrong_right (mended), wrong_wrong.
    """
    routed = exits > 0
    first, final = correct[0, routed], correct.gather(0, exits[None])[0, routed]
    words = ((True, "right"), (False, "wrong"))
    return {f"{a}_{b}": int(((first == x) & (final == y)).sum()) for x, a in words for y, b in words}


def routing(
    tables: Any, thresholds: Sequence[float], costs: Sequence[int], papers: Sequence[int]
) -> dict[str, Any]:
    """All of it for one set of thresholds [K]: {samples, routed, four_way, oracle, auroc, flops}.

    `routed` is the share past exit 0; `auroc` maps every kind of confidence to how well it tells, at each
    exit but the last, the samples that the exit knows. `flops` is the mean of `papers`, the published tools'
    count, doubled as EBJR has it.
    """
    exits = exit_of(tables.confidence, torch.tensor(thresholds, dtype=torch.float64))
    kinds = {
        kind: [auroc(s, c) for s, c in zip(score[:-1], tables.correct[:-1], strict=True)]
        for kind, score in zip(CONFIDENCES, tables.scores, strict=True)
    }
    return {
        "samples": len(exits),
        "routed": (exits > 0).double().mean().item(),
        "four_way": four_way(tables.correct, exits),
        "oracle": oracle(tables.correct, costs),
        "auroc": kinds,
        "flops": 2 * torch.tensor(papers, dtype=torch.float64)[exits].mean().item(),
    }


def under_mix(values: Tensor, popular: Tensor, share: float) -> float:
    """Mean of values [N] when `share` of the traffic are the samples marked `popular` (bool [N]), evenly."""
    return (
        share * values[popular].double().mean().item() + (1 - share) * values[~popular].double().mean().item()
    )
