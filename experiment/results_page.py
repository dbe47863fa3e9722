"""All results as one page that opens offline: a table, filters and plots; published points are marked."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader

from experiment.published_points import Curve, Paper
from experiment.results import Result, Spread, by_setting
from models.registry import model_class
from utils import UserError

STEPS = 30  # between the costs of a front
HERE = Path(__file__).parent
STYLES = HERE.parent / "adaptive"  # of the report of an evaluation, which this page shares


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to answer: multiply-adds per image in millions, top-1 in percent, and speed where it was timed.

    `top1` is the mean and `std` the standard deviation (None for one) over `n` trainings of a setting;
    published ones have no `n`. `images` are those that it was tested on. Rows of one `curve` share a colour,
    and `kind` says how they are drawn: an "exit" is joined to the one before, "front" is the best within a
    cost, which is drawn but not in the table, "point" stands alone. `record` is the name that the records of
    a curve share, and `origin` their folder, or "published".
    """

    curve: str
    kind: str
    family: str
    network: str
    regime: str
    data_set: str
    way: str
    macs: float
    top1: float
    source: str
    std: float | None = None
    n: int | None = None
    images: int | None = None
    ms: float | None = None
    images_per_s: float | None = None
    record: str = ""
    origin: str = "published"
    url: str = ""

    @property
    def title(self) -> str:
        """Folder and record, by which settings are told apart; published ones have none."""
        return f"{self.origin}/{self.record}" if self.record else ""

    @property
    def published(self) -> bool:
        """If a paper says so."""
        return self.origin == "published"


def family_of(network: str) -> str:
    """The family of a registered network, the file that it is in: "msdnet"; an unknown name is its own."""
    inner = network.removeprefix("boosted/")
    if inner.startswith("timm/"):
        return "timm"
    try:
        return model_class(inner).__module__.rpartition(".")[2]
    except UserError:
        return inner


def measured_rows(results: Sequence[Result]) -> Iterator[Row]:
    """The exits of every setting, what it reaches within a cost, and every way that a record has timed."""
    for i, group in enumerate(by_setting(results).values()):
        first = group[0]
        about = _about(first) | {"curve": f"measured {i}"}
        commits = sorted({one.origin.made.commit[:7] or "no commit" for one in group})
        about_all = about | {"source": f"commit {', '.join(commits)}", "images": first.about.num_test}
        for k, column in enumerate(zip(*(one.exits for one in group), strict=True)):
            spread = Spread.of([100 * point.accuracy for point in column])
            std = spread.std if spread.n > 1 else None
            shown = {"way": f"exit {k}", "macs": column[0].macs / 1e6, "top1": spread.mean}
            yield Row(**about_all, **shown, kind="exit", std=std, n=spread.n)
        for macs, accuracy in front_of(group):
            yield Row(**about_all, kind="front", way="", macs=macs / 1e6, top1=100 * accuracy, n=len(group))
        for one in (one for one in results if one.setting == first.setting):
            yield from _timed_rows(one, about)


def front_of(group: Sequence[Result]) -> Iterator[tuple[float, float]]:
    """Costs, evenly spaced in their logarithm, and the mean accuracy of a setting's policies within them."""
    if not all(one.front for one in group):
        return
    low, high = max(one.front[0].macs for one in group), max(one.front[-1].macs for one in group)
    costs = [low * (high / low) ** (i / STEPS) for i in range(STEPS)] if low < high else []
    for cost in (*costs, high):
        yield cost, mean(one.at(cost) for one in group)


def _about(one: Result) -> dict[str, str]:
    name, data_set = one.about.network, one.about.data_set
    about = {"family": family_of(name), "network": name, "regime": one.regime, "data_set": data_set}
    return about | {"record": one.stem, "origin": one.folder}


def _timed_rows(one: Result, about: dict[str, str]) -> Iterator[Row]:
    runtime = one.record.runtime
    for way in runtime.table if runtime else ():
        yield Row(
            **about,
            kind="point",
            way=way.policy,
            macs=way.macs / 1e6,
            top1=100 * way.accuracy,
            n=1,
            images=runtime.num_images,
            ms=way.p50_ms,
            images_per_s=way.images_per_s,
            source=one.origin.made.machine,
        )


def published_rows(papers: Sequence[Paper]) -> Iterator[Row]:
    """The points of papers, marked as published."""
    for paper in papers:
        for i, curve in enumerate(paper.curves):
            about = {"curve": f"{paper.url} {i}", "url": paper.url, "source": _source(paper, curve)}
            about |= {"family": curve.family, "network": curve.network, "regime": curve.regime}
            for point in curve.points:
                yield Row(
                    **about,
                    kind="exit" if curve.joined else "point",
                    data_set=curve.data_set,
                    way=point.way,
                    macs=point.macs_m,
                    top1=point.top1,
                    ms=point.latency_ms,
                )


def _source(paper: Paper, curve: Curve) -> str:
    timed = f"; latency on {curve.machine}" if curve.machine else ""
    return f"published: {paper.paper}, {curve.table}; cost: {curve.costs}{timed}"


def page_of(results: Sequence[Result], papers: Sequence[Paper]) -> str:
    """The page as HTML; it loads nothing and may not, and all data are text in it."""
    rows = [*measured_rows(results), *published_rows(papers)]
    environment = Environment(
        loader=FileSystemLoader([HERE, STYLES]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    data = list(changes(rows))
    listed = [(i, row) for i, row in enumerate(rows) if row.kind != "front"]
    return environment.get_template("results.html").render(
        rows=listed, data=data, records=len(results), papers=papers, shown=first_shown(rows)
    )


def changes(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of every row what differs from the one before, which keeps the page small; numbers to six digits."""
    before: dict[str, Any] = {}
    for row in rows:
        digits = {key: _six_digits(value) for key, value in asdict(row).items()}
        yield {key: value for key, value in digits.items() if key not in before or before[key] != value}
        before = digits


def _six_digits(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def first_shown(rows: Sequence[Row]) -> dict[str, str]:
    """What the page opens with: data set and folder of the first measured row, or all."""
    first = next((row for row in rows if not row.published), None)
    return {"data_set": first.data_set, "origin": first.origin} if first else {}
