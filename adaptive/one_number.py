"""Policies that one number for all exits describes: the accuracy wanted of an answer, or patience."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.calibration import accuracy_map
from adaptive.confidence import AGREEMENT, EVERYBODY, NOBODY
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from adaptive.reading import Reading


def mapped_thresholds(
    confidence: Tensor, correct: Tensor, accuracy: float, *, everybody: bool = False
) -> Tensor:
    """Thresholds [K] by which samples leave where an answer is right with at least `accuracy` (a fraction).

    From `confidence` and `correct` (bool), [K, N] each, of calibration images. Each exit has a map from
    confidence to accuracy (PCEE, https://arxiv.org/abs/2412.19325), here of the samples that still reach it:
    of `everybody`, as published, it is too high, since easy samples have left. Nobody leaves where no
    confidence is worth that accuracy; the last exit takes whoever is left.
    """
    thresholds = confidence.new_full((len(confidence),), NOBODY)
    thresholds[-1] = EVERYBODY
    left = torch.ones(confidence.shape[1], dtype=torch.bool, device=confidence.device)
    for k in range(len(confidence) - 1):
        seen = torch.ones_like(left) if everybody else left
        if seen.any():
            thresholds[k] = accuracy_map(confidence[k, seen], correct[k, seen]).threshold(accuracy)
        left = left & (confidence[k] < thresholds[k])
    return thresholds


def mapped_policies(
    calib: ExitTables, reading: Reading | str, accuracies: Sequence[float], *, everybody: bool = False
) -> list[Policy]:
    """A policy per accuracy (a fraction) wanted of every answer, from tables that were read by `reading`."""
    policies = []
    for wanted in accuracies:
        limits = mapped_thresholds(calib.confidence, calib.correct, wanted, everybody=everybody)
        name = f"mapped accuracy {100 * wanted:g} %"
        policies.append(Policy.by(Reading.of(reading), limits.tolist(), name))
    return policies


def patience_policies(num_exits: int, answer: str = "exit") -> list[Policy]:
    """Policies by which samples leave where 2, 3 ... K exits in a row predict the same class.

    PABEE's rule (https://arxiv.org/abs/2006.04152). For p = K nobody leaves early. `answer` as in `Reading`.
    """
    return [
        Policy((float(patience),) * (num_exits - 1) + (EVERYBODY,), AGREEMENT, f"patience {patience}", answer)
        for patience in range(2, num_exits + 1)
    ]
