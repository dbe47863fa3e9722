"""How far confidence can be trusted: a small figure per exit, whose diagonal is confidence that is right."""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive.reliability import Bin, Reliability

SIDE = 100  # of a figure, in its own units
BIGGEST = 7  # radius of a dot that stands for all images


@dataclass(frozen=True)
class Dot:
    """The images of one bin: at their mean confidence `x` and accuracy `y`, larger the more there are."""

    x: float
    y: float
    diagonal: float
    radius: float
    text: str


@dataclass(frozen=True)
class Panel:
    """The figure of one exit."""

    exit: int
    text: str
    dots: list[Dot]


def panels(reliability: Sequence[Reliability]) -> list[Panel]:
    """A figure for each exit, of its bins (`count`, mean `confidence`, `accuracy`) that are not empty."""
    return [Panel(k, _summary(row), _dots(row.bins)) for k, row in enumerate(reliability)]


def _summary(row: Reliability) -> str:
    auroc = "" if row.auroc is None else f", AUROC\N{NO-BREAK SPACE}{row.auroc:.3f}"
    return f"ECE {100 * row.ece:.2f} %{auroc}"


def _dots(bins: Sequence[Bin]) -> list[Dot]:
    filled = [one for one in bins if one.count]
    total = sum(one.count for one in filled)
    return [
        Dot(
            x=round(SIDE * one.confidence, 1),
            y=round(SIDE * (1 - one.accuracy), 1),
            diagonal=round(SIDE * (1 - one.confidence), 1),
            radius=round(1.5 + (BIGGEST - 1.5) * (one.count / total) ** 0.5, 1),
            text=f"{one.count:,} images: confidence {one.confidence:.3f}, accuracy {one.accuracy:.3f}",
        )
        for one in filled
    ]
