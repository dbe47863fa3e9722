"""What an evaluation found: what the figure, the page and the record of its results are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from adaptive.classes import ClassRow
from adaptive.exit_tables import ExitFigures
from adaptive.front import FrontRow
from adaptive.guarantee import Guarantee
from adaptive.headline import Headline
from adaptive.policy import OperatingPoint
from adaptive.reliability import Reliability
from adaptive.routing import Routing
from adaptive.timing import Comparison


@dataclass(frozen=True)
class Picture:
    """An image for a page: its data, what stands for it where it cannot be seen, and the lines below it."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Some images of one kind, and a note that says which."""

    title: str
    note: str
    images: Sequence[Picture]


@dataclass(frozen=True)
class Findings:
    """What an evaluation found: every exit, the most expensive last, and of policies, if any, what they do to
    test images, what deferring did at the one chosen, what it gains, and how fast it was.

    `points` are the policies of the quota rule, `front` those that a search found, by cost. `guarantee` is
    that of the chosen policy, `reliability` is of the confidence of every exit, `classes` say what the chosen
    policy does to each class, `galleries` show what it does to single images.
    """

    exits: list[ExitFigures]
    points: list[OperatingPoint] = field(default_factory=list)
    routing: Routing | None = None
    runtime: Comparison | None = None
    headline: Headline | None = None
    front: Sequence[FrontRow] = ()
    guarantee: Guarantee | None = None
    reliability: Sequence[Reliability] = ()
    classes: Sequence[ClassRow] = ()
    galleries: Sequence[Gallery] = ()
