"""What confidence is worth, learned on calibration images: temperatures, and maps to accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from adaptive.confidence import EVERYBODY, NOBODY

# Temperatures at which slopes are known: a quarter octave apart, since softmaxes at each of them cost time.
GRID = [2 ** (step / 4) for step in range(-16, 17)]
# So many samples at least stand behind the highest step of a map: of a few, all may be right by chance.
TOP = 50


class TemperatureFit:
    """The temperature T > 0 of every exit that makes calibration images likeliest, without keeping logits.

    softmax(f / T) has the least cross-entropy where its slope in 1 / T, the sum over samples of E[f] - f_y,
    is zero; it rises with 1 / T, since the cross-entropy is convex in it (Guo et al.,
    https://arxiv.org/abs/1706.04599). The slopes at the temperatures of `GRID` are summed batch by batch.
    """

    def __init__(self) -> None:
        self.slopes: Tensor | None = None  # [K, G] in float64, None before the first batch

    def add(self, exits: Sequence[Tensor], targets: Tensor) -> None:
        """Takes a batch: logits K x [B, C] and targets, int64 [B]. It can `watch` an evaluation."""
        slopes = torch.stack([_slopes(logits, targets) for logits in exits]).cpu()
        self.slopes = slopes if self.slopes is None else self.slopes + slopes

    @classmethod
    def merged(cls, fits: Sequence["TemperatureFit"]) -> "TemperatureFit":
        """One fit from those of several processes, some of which may have seen no images."""
        whole = cls()
        seen = [fit.slopes for fit in fits if fit.slopes is not None]
        whole.slopes = torch.stack(seen).sum(0) if seen else None
        return whole

    def temperatures(self) -> tuple[float, ...]:
        """The temperature of every exit [K], at most the highest and at least the lowest of `GRID`.

        The lowest is that of an exit that is always right, which is never confident enough. Needs a batch.
        """
        assert self.slopes is not None, "no images were seen"
        return tuple(_root(row) for row in self.slopes)


def _slopes(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    above = logits - logits.gather(1, targets[:, None])  # [B, C], f - f_y, which small differences survive
    sums = [((above / value).softmax(1) * above).sum(1).double().sum() for value in GRID]
    return torch.stack(sums)  # [G]


def _root(slopes: Tensor) -> float:
    """The temperature at which slopes [G], which fall along `GRID`, are zero."""
    after = int((slopes > 0).sum())  # the first of the grid whose slope is not above zero
    if after in (0, len(GRID)):
        return GRID[max(after - 1, 0)]
    first = min(max(after - 2, 0), len(GRID) - 4)
    near = slopes[first : first + 4].numpy()
    octaves = np.log2(GRID[first : first + 4])
    roots = Polynomial.fit(octaves, near, 3).roots()  # one is between the two neighbours at least
    real = roots.real[np.isclose(roots.imag, 0)]
    low, high = np.log2(GRID[after - 1 : after + 1])
    between = real[np.abs(real - (low + high) / 2).argmin()]
    return float(2 ** np.clip(between, low, high))


@dataclass(frozen=True)
class AccuracyMap:
    """Steps from confidence to accuracy, both rising: from confidence `starts[i]` up to the next start, a
    fraction `accuracy[i]` of the `counts[i]` samples is right. [S] each."""

    starts: Tensor
    accuracy: Tensor
    counts: Tensor

    def of(self, confidence: Tensor) -> Tensor:
        """The accuracy expected at a confidence, of any shape."""
        steps = torch.searchsorted(self.starts, confidence.contiguous(), right=True) - 1
        return self.accuracy[steps.clamp_min(0)]

    def threshold(self, accuracy: float) -> float:
        """The smallest confidence from which on this accuracy is expected; EVERYBODY if it is of any
        confidence, NOBODY if of none."""
        if accuracy <= self.accuracy[0]:
            return EVERYBODY
        enough = self.starts[self.accuracy >= accuracy]
        return enough[0].item() if len(enough) else NOBODY


def accuracy_map(confidence: Tensor, correct: Tensor, *, top: int = TOP) -> AccuracyMap:
    """The rising map closest to what samples of `confidence` and `correct` (bool), [N] each, show.

    Samples are taken from the most confident down in groups of about `top`, of which equal confidences are
    never split; isotonic regression then joins the groups whose accuracy does not rise.
    """
    from sklearn.isotonic import isotonic_regression  # takes a second to import

    values, place, counts = confidence.unique(return_inverse=True, return_counts=True)
    above = counts.flip(0).cumsum(0).flip(0) - counts  # samples that are more confident
    group = (above // top).unique_consecutive(return_inverse=True)[1]  # [values], rising
    sizes = group.bincount(weights=counts.double())
    hits = group[place].bincount(weights=correct.double())
    rising = isotonic_regression((hits / sizes).numpy(), sample_weight=sizes.numpy())
    accuracy, step = torch.from_numpy(rising).unique_consecutive(return_inverse=True)
    first = (step.diff(prepend=step.new_tensor([-1])) > 0).nonzero()[:, 0]  # groups that begin a step
    starts = values[(group.diff(prepend=group.new_tensor([-1])) > 0)][first]
    return AccuracyMap(starts, accuracy, step.bincount(weights=sizes).long())
