"""The front as a slider of the page: what it shows at every stop, and where that is in its small figure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive.exit_tables import ExitFigures
from adaptive.findings import Findings
from adaptive.front import FrontRow, decide_alike
from adaptive.headline import Headline
from adaptive.report_texts import macs_text, percent_text, threshold_texts, times_text

WIDTH, HEIGHT, EDGE = 640, 220, 14  # of the small figure, in its own units


@dataclass(frozen=True)
class Stop:
    """Everything that the page shows at one stop of the slider, as text, and its place in the small figure.

    `x` is that of the cost, `y` that of the accuracy, `low` and `high` those of its interval. `thresholds`,
    `shares` (in per cent) and `widths` (the same for style sheets) are one per exit.
    """

    accuracy: str
    cost: str
    latency: str
    expected: str
    note: str
    command: str
    spoken: str
    thresholds: list[str]
    shares: list[str]
    widths: list[str]
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Slider:
    """The stops by cost, the first one shown, which is the `chosen` policy's or the nearest to it in cost,
    and what the figure's ends stand for."""

    stops: list[Stop]
    start: int
    chosen: int | None
    cheapest: str
    dearest: str
    lowest: str
    highest: str
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def line(self) -> str:
        """The corners of the curve."""
        return _corners((stop.x, stop.y) for stop in self.stops)

    @property
    def band(self) -> str:
        """The corners of the area of all intervals."""
        there = [(stop.x, stop.high) for stop in self.stops]
        back = [(stop.x, stop.low) for stop in reversed(self.stops)]
        return _corners(there + back)


def slider_of(findings: Findings) -> Slider | None:
    """The slider over the front, if that has two policies or more."""
    rows = findings.front
    headline = findings.headline
    if len(rows) < 2:
        return None
    chosen = None
    start = len(rows) - 1
    if headline:
        policy = headline.point.policy
        chosen = next((i for i, row in enumerate(rows) if decide_alike(row.policy, policy)), None)
        distances = [abs(row.macs - headline.point.macs) for row in rows]
        start = distances.index(min(distances)) if chosen is None else chosen
    bounds = [(row.accuracy.low, row.accuracy.high) for row in rows]
    floor = min(low for low, _ in bounds)
    ceiling = max(high for _, high in bounds)
    left = rows[0].macs
    right = rows[-1].macs
    across = [EDGE + (WIDTH - 2 * EDGE) * (row.macs - left) / ((right - left) or 1) for row in rows]
    estimates = np.array([(row.accuracy.value, row.accuracy.low, row.accuracy.high) for row in rows])
    down = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (estimates - floor) / ((ceiling - floor) or 1)
    places = np.column_stack([across, down]).round(1).tolist()
    stops = [
        _stop(row, place, findings.exits[-1], headline if i == chosen else None)
        for i, (row, place) in enumerate(zip(rows, places, strict=True))
    ]
    ends = macs_text(left), macs_text(right), percent_text(floor), percent_text(ceiling)
    return Slider(stops, start, chosen, *ends)


def _stop(row: FrontRow, place: Sequence[float], last: ExitFigures, headline: Headline | None) -> Stop:
    """One stop; `headline` is given where it is about this very policy."""
    policy = row.policy
    # Both intervals are drawn at random: the page must not show two of one policy.
    accuracy = headline.accuracy if headline else row.accuracy
    ratio = last.alone / row.macs
    beside = f"{times_text(ratio)} fewer" if ratio >= 1 else f"{times_text(1 / ratio)} more"
    expected = "unknown"
    if policy.accuracy is not None and policy.macs is not None:
        expected = f"{percent_text(policy.accuracy)} for {macs_text(policy.macs)}"
    return Stop(
        accuracy=accuracy.text(100, " %"),
        cost=f"{macs_text(row.macs)}, {beside} than exit {last.exit} alone",
        latency="" if policy.latency_ms is None else f"{policy.latency_ms:.3g} ms",
        expected=expected,
        note="This is the policy chosen above." if headline else "",
        command=row.command,
        spoken=f"{macs_text(row.macs)} multiply-adds, {percent_text(accuracy.value)} top-1",
        thresholds=threshold_texts(policy),
        shares=[f"{100 * share:.1f} %" for share in row.shares],
        widths=[f"{100 * share:.2f}%" for share in row.shares],
        x=place[0],
        y=place[1],
        low=place[2],
        high=place[3],
    )


def _corners(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)
