"""Published figures: points of papers, one file per paper, never mixed with what was measured here."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from experiment.layout import Name, Part, Positive, Text, checked
from experiment.results import PUBLISHED, read_as

Long = Annotated[str, Field(min_length=1, max_length=400)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Published(Part):
    """A point of a curve: the exit or policy, multiply-adds per image in millions, and top-1 in percent."""

    way: Text
    macs_m: Positive
    top1: Percent
    latency_ms: Positive | None = None


class Curve(Part):
    """The points of one network; `costs` says how its multiply-adds were counted, `machine` what timed it.

    Points are `joined` by a line where they are one after the other on one network.
    """

    family: Name
    network: Text
    data_set: Name
    regime: Text
    table: Text
    costs: Long
    machine: str = ""
    joined: bool = True
    points: Annotated[list[Published], Field(min_length=1)]


class Paper(Part):
    """A file of results/published: what a paper says."""

    paper: Long
    url: Annotated[str, Field(pattern=r"^https://[\w./-]+$")]
    label: Literal["published"]
    curves: Annotated[list[Curve], Field(min_length=1)]


def read_published(folder: Path) -> list[Paper]:
    """The papers below a folder of results. Raises ValueError that names file and field for what is none."""
    paths = sorted((folder / PUBLISHED).glob("*.json"))
    return [read_as(path, "published results", lambda content: checked(Paper, content)) for path in paths]
