"""What an evaluation found as a figure and as one HTML page that opens offline."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from adaptive.exit_tables import ExitFigures
from adaptive.policy import OperatingPoint
from adaptive.routing import Routing
from adaptive.timing import Comparison
from utils import replacing, write_text

# Okabe-Ito colours, told apart under every common colour blindness and readable on light and dark paper.
CURVE, EXIT, CHOSEN = "#0072b2", "#d55e00", "#009e73"
INK, PAPER = "#24292f", "#ffffff"
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: searchable, and small files
    "svg.hashsalt": "report",  # equal input gives equal bytes
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}
LABEL_SIZE = np.array([38.0, 12.0])  # points; room for "exit 10" in 9 pt
CORNERS = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])  # of a name, in its size
LABEL_OFFSETS = [
    np.array(side) * distance * LABEL_SIZE
    for distance in (1, 2, 3)
    for side in [(0.7, -0.9), (0, -1.2), (0.9, 0), (-0.7, 0.9), (0, 1.2), (-0.9, 0), (-0.7, -0.9), (0.7, 0.9)]
]


@dataclass(frozen=True)
class Findings:
    """What an evaluation found: every exit, the most expensive last, and of policies, if any, what they do to
    test images, what deferring did at the one chosen, and how fast it was."""

    exits: list[ExitFigures]
    points: list[OperatingPoint] = field(default_factory=list)
    routing: Routing | None = None
    runtime: Comparison | None = None


def plot_curve(path: Path, findings: Findings, title: str) -> None:
    """Draws top-1 accuracy against MACs in the suffix's format: .png, .svg, .pdf; ValueError for others."""
    with replacing(path) as temporary:
        _save_curve(temporary, path.suffix[1:], findings, title)


def write_report(
    path: Path, findings: Findings, *, title: str, subtitle: str, facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes the page: no script, nothing loaded from elsewhere. `facts` are pairs of label and text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, macs=_macs)
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        record=findings,
        match=cheapest_match(findings),
        shown=_evenly_spaced(findings.points, 8),
        styles=_exit_styles(len(findings.exits)),
        curve=_inline_curve(findings),
    )
    write_text(path, page)


def cheapest_match(findings: Findings) -> OperatingPoint | None:
    """The cheapest point as accurate as the last exit for fewer MACs than it takes, or None."""
    last = findings.exits[-1]
    matches = [point for point in findings.points if point.accuracy >= last.acc1 and point.macs < last.macs]
    return min(matches, key=lambda point: point.macs, default=None)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _macs(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _evenly_spaced(points: list[OperatingPoint], count: int) -> list[OperatingPoint]:
    """At most `count` points, cheapest and most expensive included."""
    by_cost = sorted(points, key=lambda point: point.macs)
    picked = np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int)
    return [by_cost[i] for i in picked]


def _exit_styles(num_exits: int) -> list[str]:
    """Cheap exits dark, expensive ones light: an order that survives colour blindness and grey print."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    styles = []
    for place in np.linspace(0.2, 1, num_exits):  # darker ones drown in a dark page
        text = "#fff" if place < 0.45 else "#000"
        styles.append(f"background:{to_hex(colormaps['viridis'](place))};color:{text}")
    return styles


def _inline_curve(findings: Findings) -> Markup:
    """The figure as an `<svg>` element in the colours of the page, light or dark."""
    buffer = io.StringIO()
    _save_curve(buffer, "svg", findings, transparent=True)
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--card)"))


def _save_curve(
    target: Any, file_format: str, findings: Findings, title: str = "", transparent: bool = False
) -> None:
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    unit, name = (1e9, "G") if findings.exits[-1].macs >= 1e9 else (1e6, "M")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        exits, line = _draw(axes, findings, unit)
        axes.set(xlabel=f"multiply-adds per image ({name})", ylabel="top-1 accuracy (%)")
        axes.margins(0.1)
        axes.grid(color=INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1)
        figure.suptitle(title, fontsize=12, parse_math=False)
        _label_exits(axes, exits, line)
        # Empty metadata: no date, so equal results give equal files.
        metadata = dict.fromkeys(["Format", "Type", "Creator", "Date"]) if file_format == "svg" else None
        figure.savefig(target, format=file_format, transparent=transparent, metadata=metadata)


def _draw(axes: Any, findings: Findings, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws the curve, if there is one, and all markers; returns the places of the exits, and of the line
    that their names should not cover."""

    def place(pairs: Iterable[tuple[float, float]]) -> np.ndarray:
        return np.array([(macs / unit, 100 * accuracy) for macs, accuracy in pairs]).reshape(-1, 2)

    filled = {"edgecolors": PAPER, "linewidths": 0.8, "zorder": 3}
    curve = place(sorted((point.macs, point.accuracy) for point in findings.points))
    exits = place((row.macs, row.acc1) for row in findings.exits)
    if len(curve):
        axes.plot(*curve.T, color=CURVE, linewidth=2, label="early exit")
    axes.scatter(*exits.T, s=45, color=EXIT, label="one exit for all images", **filled)
    if findings.routing:
        hollow = partial(axes.scatter, facecolors="none")
        spared = place((row.alone, row.acc1) for row in findings.exits if row.alone < row.macs)
        if len(spared):
            hollow(*spared.T, s=45, edgecolors=EXIT, label="the exit alone")
        best = place([(findings.routing.oracle["macs"], findings.routing.oracle["accuracy"])])
        hollow(*best.T, s=60, marker="D", edgecolors=CHOSEN, label="oracle")
    if findings.runtime:
        chosen = place((point.macs, point.accuracy) for point in findings.runtime.points)
        timed = f"measured, {findings.runtime.num_images} images"
        axes.scatter(*chosen.T, s=150, marker="*", color=CHOSEN, label=timed, **filled)
    return exits, curve if len(curve) else exits


def _label_exits(axes: Any, points: np.ndarray, line: np.ndarray) -> None:
    """Writes each exit's name at the nearest place with room: off line, markers, other names and frame."""
    axes.figure.draw_without_rendering()  # settles the layout, hence where a point lands on paper
    to_points = 72 / axes.figure.dpi
    anchors = axes.transData.transform(points) * to_points
    x = np.linspace(line[0, 0], line[-1, 0], 400)
    drawn = axes.transData.transform(np.stack([x, np.interp(x, *line.T)], axis=1)) * to_points
    low, high = axes.get_window_extent().get_points() * to_points
    taken = np.concatenate([drawn, anchors])

    def room(anchor: np.ndarray, offset: np.ndarray) -> float:
        """How far the nearest thing is from the middle of a name, in its sizes: from 0.5 on all is clear."""
        centre = anchor + offset
        nearest = (np.abs(taken - centre) / LABEL_SIZE).max(axis=1).min()
        inside = (np.minimum(centre - low, high - centre) / LABEL_SIZE).min()
        return min(nearest, inside, 0.55)

    for k, (point, anchor) in enumerate(zip(points, anchors, strict=True)):
        offset = max(LABEL_OFFSETS, key=partial(room, anchor))
        taken = np.concatenate([taken, anchor + offset + CORNERS * LABEL_SIZE])
        leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            f"exit {k}",
            point,
            offset,
            textcoords="offset points",
            fontsize=9,
            ha="center",
            va="center",
            arrowprops=leader,
            in_layout=False,
        )
