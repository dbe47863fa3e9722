"""Bets on the exits where samples leave and on their confidence: the test of a monitor without labels.

NumPy is enough, so that what serves a network can watch its stream without PyTorch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive.evidence import Evidence, Floats

Ints = NDArray[np.int64]
Samples = NDArray[np.complex128]
Keys = tuple[Samples, Floats]
CHUNK = 2048  # samples at once, for which a table of samples x bins is made
TILTS = 0.5, 1, 2, 4
STEPS = 8
# From where to where on the scale of hardness samples may become rarer or more frequent, for example those
# of one exit. What reaches the end of the scale is the complement of what does not.
BLOCKS = np.array([(i, j) for i in range(STEPS) for j in range(i + 1, STEPS)]) / STEPS
BLOCK_ODDS = 0.6, 1 / 0.6


def _changes() -> tuple[str, ...]:
    """What wins each of the bets that `mix_factors` makes."""
    harder = "harder images than in calibration"
    easier = "easier images than in calibration"
    each = len(TILTS) + 1
    found = [harder] * each + [easier] * each
    found += [f"{word} easy and {word} hard images than in calibration" for word in ("more", "fewer")]
    for word, whole in (("fewer", harder), ("more", easier)):
        for start, stop in (100 * BLOCKS).tolist():
            part = f"{word} images of medium hardness (calibration's {start:g} to {stop:g} %)"
            found.append(part if start else whole)
    return tuple(found)


CHANGES = _changes()


def ordered(exits: NDArray[Any], confidence: Floats) -> Samples:
    """Complex numbers, which NumPy compares by their real and then by their imaginary parts."""
    pairs = np.empty(len(exits), dtype=np.complex128)
    pairs.real = exits
    pairs.imag = -confidence
    return pairs


def keys_of(edges: Sequence[tuple[int, float, float]]) -> Keys:
    """The different edges, sorted, and a number for every edge that orders them with their ties.

    An edge is a sample: exit, confidence, a random number for ties.
    """
    exits, confidence, ties = (np.array(column) for column in zip(*edges, strict=True))
    different, group = np.unique(ordered(exits, confidence), return_inverse=True)
    return different, 2 * group + 1 + ties


def bins_of(keys: Keys, samples: Samples, ties: Floats) -> Ints:
    """Between which edges samples [T] fall, of which equal ones are ordered by random `ties` [T]."""
    different, places = keys
    # Twice the number of edges below, plus one where the sample equals an edge.
    below = different.searchsorted(samples, "left") + different.searchsorted(samples, "right")
    return places.searchsorted(below + ties)


def bet(evidence: Evidence, urn: Ints, bins: Ints) -> None:
    """Bets on the bins [T] of the next samples, and puts those into the urn [G]."""
    for start in range(0, len(bins), CHUNK):
        part = bins[start : start + CHUNK]
        evidence.update(mix_factors(*intervals(urn, part)))
        urn += np.bincount(part, minlength=len(urn))


def intervals(urn: Ints, bins: Ints) -> tuple[Floats, Floats]:
    """The part of 0..1 that is each sample's, [T] each, if a bin is as wide as it is likely then.

    `bins` [T] are those of the next samples, `urn` [G] the weights before them, to which each one adds 1.
    """
    rows = np.arange(len(bins))
    drawn = np.zeros((len(bins), len(urn)), dtype=np.int64)
    drawn[rows[1:], bins[:-1]] = 1
    weights = urn + drawn.cumsum(0)  # [T, G]
    upper = weights.cumsum(1)
    total = upper[:, -1]
    high = upper[rows, bins]
    low = high - weights[rows, bins]
    return low / total, high / total


def mix_factors(lower: Floats, upper: Floats) -> Floats:
    """Logarithms of the factors [T, E] of all bets for samples at lower..upper [T] of 0 (easy) to 1 (hard).

    A factor is the mean of a density there. Exponential tilts suit shifts, roots the ends of the scale; the
    arcsine distribution and the parabola suit spreads that grow or shrink, blocks the share of some exits.
    """
    ends = np.stack([lower, upper])[..., None]  # [2, T, 1]
    harder = [np.expm1(tilt * ends) / np.expm1(tilt) for tilt in TILTS]
    harder.append(1 - np.sqrt(1 - ends))
    easier = [np.expm1(-tilt * ends) / np.expm1(-tilt) for tilt in TILTS]
    easier.append(np.sqrt(ends))
    wider = 2 / np.pi * np.arcsin(np.sqrt(ends))
    narrower = (3 - 2 * ends) * ends**2
    start = BLOCKS[:, 0]
    width = BLOCKS[:, 1] - BLOCKS[:, 0]
    inside = np.clip(ends - start, 0, width)
    blocks = []
    for odds in BLOCK_ODDS:
        share = odds * width / (1 - width + odds * width)
        within = share / width * inside
        outside = (1 - share) / (1 - width) * (ends - inside)
        blocks.append(within + outside)
    below, above = np.concatenate([*harder, *easier, wider, narrower, *blocks], axis=-1)
    return np.log((above - below) / (upper - lower)[:, None])
