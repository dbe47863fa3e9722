"""How far the confidence of every exit can be trusted: is it calibrated, and does it rank samples well?

Tables are K exits x N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptive.confidence import CONFIDENCES
from adaptive.exit_tables import ExitTables
from adaptive.routing import auroc

BINS = 15  # of equal width, as in https://arxiv.org/abs/1706.04599
MAX_PROB = list(CONFIDENCES).index("max_prob")


@dataclass(frozen=True)
class Bin:
    """The samples of a range of confidence: how many, their mean confidence, the fraction that is right.

    The two means are NaN where there are no samples.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How well the confidence of an exit, a probability of being right, agrees with what is right.

    `ece` is the expected calibration error: the mean over samples of how far accuracy and mean confidence of
    their bin are apart. `gap` is mean confidence less accuracy, above 0 if the exit is overconfident. `auroc`
    is how well confidence ranks right answers above wrong ones (0.5: not at all), None where all are of one
    kind. `brier` is the mean squared difference of confidence and being right.
    """

    ece: float
    gap: float
    auroc: float | None
    brier: float
    bins: list[Bin]


def reliability(confidence: Tensor, correct: Tensor) -> list[Reliability]:
    """The `Reliability` of every exit by `confidence`, probabilities, and `correct` (bool), [K, N] each."""
    num_exits, num_samples = confidence.shape
    values = confidence.double()
    right = correct.double()
    edges = (BINS * values).ceil().long().clamp(1, BINS) - 1  # a bin has its upper end
    cells = (edges + BINS * torch.arange(num_exits)[:, None]).flatten()

    def by_bin(weights: Tensor) -> Tensor:
        return cells.bincount(weights.flatten(), num_exits * BINS).view(num_exits, BINS)

    counts, sums, hits = (by_bin(table) for table in (torch.ones_like(values), values, right))
    ece = (sums - hits).abs().sum(1) / num_samples
    gap = (values - right).mean(1)
    brier = (values - right).square().mean(1)
    columns = torch.stack([counts, sums / counts, hits / counts], 2).tolist()  # [K, BINS, 3]
    rows = []
    for k, row in enumerate(columns):
        bins = [Bin(int(count), *means) for count, *means in row]
        ranked = auroc(values[k], correct[k])
        rows.append(Reliability(ece[k].item(), gap[k].item(), ranked, brier[k].item(), bins))
    return rows


@dataclass(frozen=True)
class FailurePrediction:
    """How well low confidence of an exit tells that deferring pays: it is wrong and a later exit is right.

    `rate` is the fraction of the samples for which that is so; `auroc` the probability that one of
    these has a lower confidence than another sample, None where all are of one kind. That it
    differs from the AUROC of being right is the point: a sample that no exit gets right need not be deferred.
    """

    rate: float
    auroc: float | None


def failure_prediction(confidence: Tensor, correct: Tensor) -> list[FailurePrediction]:
    """For every exit but the last, by `confidence` and `correct` (bool), [K, N] each."""
    rows = []
    for k in range(len(confidence) - 1):
        pays = ~correct[k] & correct[k + 1 :].any(0)
        rows.append(FailurePrediction(pays.double().mean().item(), auroc(-confidence[k], pays)))
    return rows


@dataclass(frozen=True)
class ConfidenceFigures:
    """What the confidence of one exit is worth.

    `nll` is the mean cross-entropy, `ece` the expected calibration error and `gap` the mean confidence less
    the accuracy, all three also with the logits divided by the `temperature`, None without one. `auroc` is
    of confidence and right answers, `failure_auroc` of low confidence and answers that a later exit corrects,
    which a fraction `failure_rate` of the samples has; None where that cannot be said, as of the last exit.
    """

    exit: int
    nll: float
    ece: float
    gap: float
    auroc: float | None
    failure_rate: float | None
    failure_auroc: float | None
    temperature: float | None = None
    nll_scaled: float | None = None
    ece_scaled: float | None = None
    gap_scaled: float | None = None


def confidence_figures(
    tables: ExitTables,
    scaled: ExitTables | None = None,
    temperatures: Sequence[float] = (),
) -> list[ConfidenceFigures]:
    """The figures of every exit, by the largest probability of its answers, whatever confidence policies use.

    `scaled` are the tables of the same samples read with `temperatures` [K]; both or neither are given.
    """
    kinds = failure_prediction(tables.scores[MAX_PROB], tables.correct)
    losses = tables.means()["loss"]
    rows = []
    for k, found in enumerate(reliability(tables.scores[MAX_PROB], tables.correct)):
        failure = (kinds[k].rate, kinds[k].auroc) if k < len(kinds) else (None, None)
        rows.append(ConfidenceFigures(k, losses[k], found.ece, found.gap, found.auroc, *failure))
    if scaled is None:
        return rows
    after = reliability(scaled.scores[MAX_PROB], scaled.correct)
    columns = zip(rows, temperatures, scaled.means()["loss"], after, strict=True)
    return [
        replace(row, temperature=value, nll_scaled=loss, ece_scaled=one.ece, gap_scaled=one.gap)
        for row, value, loss, one in columns
    ]
