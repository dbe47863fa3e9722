"""Figures as the page of an evaluation shows them."""

from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.policy import Policy


def percent_text(fraction: float) -> str:
    """A fraction in per cent."""
    return f"{100 * fraction:.2f} %"


def macs_text(count: float) -> str:
    """Multiply-adds in millions or billions."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def times_text(factor: float) -> str:
    """A factor."""
    return f"{factor:.2f}×"


def threshold_texts(policy: Policy) -> list[str]:
    """Who leaves at each exit, [K]: a number is the lowest confidence that does."""
    words = {NOBODY: "nobody leaves", EVERYBODY: "everybody leaves"}
    texts = [words.get(value) or f"{value:.6g}" for value in policy.thresholds]
    texts[-1] = "all others"
    return ["off" if k in policy.off else text for k, text in enumerate(texts)]
