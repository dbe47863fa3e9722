"""Confidence of an exit in its answer: one number per sample, where higher means more confident."""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from models import nearest
from utils import UserError

# The published tools write these thresholds for "nobody leaves here" and "everybody leaves here".
NOBODY, EVERYBODY = 1e8, -1e8
# The kind that counts exits which agree: it needs their history, so it is no function of one exit's logits.
AGREEMENT = "agreement"


def max_prob(logits: Tensor) -> Tensor:
    """Largest softmax probability (MSDNet, L2W, Dyn-Perceiver): [..., C] to [...]."""
    return _probabilities(logits).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """Largest softmax probability less the second largest: [..., C] to [...]; ValueError for one class."""
    if logits.shape[-1] < 2:
        raise UserError(
            f"margin compares the two likeliest classes: 2 or more are needed, there is {logits.shape[-1]}"
        )
    first, second = _probabilities(logits).topk(2, dim=-1).values.unbind(-1)
    return first - second


def entropy(logits: Tensor) -> Tensor:
    """Negated entropy of the softmax, in nats: [..., C] to [...]."""
    probabilities = _probabilities(logits)
    return torch.xlogy(probabilities, probabilities).sum(-1)


def energy_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Negated free energy T log sum exp(f / T) of the logits (EBJR's formula), float64: [..., C] to [...]."""
    return temperature * (logits.double() / temperature).logsumexp(-1)


def energy_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T log sum exp(p / T) of the softmax p (EBJR, the published code): [..., C] to [...].

    Computed in float64: for 10 classes the values span only 0.0586, and in float32 many samples of a test set
    would share the top value.
    """
    return temperature * (logits.double().softmax(-1) / temperature).logsumexp(-1)


def _probabilities(logits: Tensor) -> Tensor:
    # In half precision most confident samples would share a few values and could not be ranked.
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


CONFIDENCES: dict[str, Callable[..., Tensor]] = {
    "max_prob": max_prob,
    "margin": margin,
    "entropy": entropy,
    "energy_logits": energy_logits,
    "energy_softmax": energy_softmax,
}

# What a kind of confidence can be; any number where it is not here.
RANGES = {
    "max_prob": (0.0, 1.0),
    "margin": (0.0, 1.0),
    "entropy": (-math.inf, 0.0),
    "energy_softmax": (0.0, math.inf),
    AGREEMENT: (1.0, math.inf),
}
ROUNDING = 1e-6  # a probability may come out as much above 1


def confidence_function(kind: str) -> Callable[[Tensor], Tensor]:
    """The confidence function of this name; "energy_logits:2" is an energy with temperature 2.

    Raises ValueError for an unknown name or a bad temperature.
    """
    name, colon, temperature = kind.partition(":")
    if name not in CONFIDENCES:
        raise UserError(f"unknown confidence {kind!r}; {nearest(name, CONFIDENCES)}")
    if not colon:
        return CONFIDENCES[name]
    with suppress(ValueError):
        value = float(temperature)
        if name.startswith("energy") and 0 < value < math.inf:
            return partial(CONFIDENCES[name], temperature=value)
    wanted = "a temperature is a number above 0, behind energy_logits or energy_softmax"
    raise UserError(f"confidence {kind!r}: {wanted}")


def check_threshold(value: float, kind: str) -> None:
    """Raises ValueError for a threshold that is not finite or that confidence of this kind never has."""
    low, high = RANGES.get(kind.partition(":")[0], (-math.inf, math.inf))
    if abs(value) != NOBODY and not (math.isfinite(value) and low - ROUNDING <= value <= high + ROUNDING):
        ends = {"from": low, "to": high}.items()
        limits = " ".join(f"{word} {end:g}" for word, end in ends if math.isfinite(end))
        accepted = f"{limits or 'finite numbers'}; 1e8: nobody leaves, -1e8: everybody"
        raise UserError(f"threshold {value:g} of {kind}: accepted: {accepted}")
