"""What an evaluation found as a figure and as one HTML page that opens offline."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from adaptive.exit_tables import ExitFigures
from adaptive.headline import Headline
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
    for distance in (1, 2, 3, 4, 5)
    for side in [(0.7, -0.9), (0, -1.2), (0.9, 0), (-0.7, 0.9), (0, 1.2), (-0.9, 0), (-0.7, -0.9), (0.7, 0.9)]
]


@dataclass(frozen=True)
class Findings:
    """What an evaluation found: every exit, the most expensive last, and of policies, if any, what they do to
    test images, what deferring did at the one chosen, what it gains, and how fast it was."""

    exits: list[ExitFigures]
    points: list[OperatingPoint] = field(default_factory=list)
    routing: Routing | None = None
    runtime: Comparison | None = None
    headline: Headline | None = None


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
    environment.filters.update(percent=_percent, macs=_macs, times="{:.2f}×".format)
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        record=findings,
        shown=_evenly_spaced(findings, 8),
        styles=_exit_styles(len(findings.exits)),
        curve=_inline_curve(findings),
    )
    write_text(path, page)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _macs(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _evenly_spaced(findings: Findings, count: int) -> list[tuple[str, OperatingPoint]]:
    """Names and points of at most `count` rows by cost, the cheapest and the most expensive included, and of
    the one in the headline."""
    rows = [(f"row {i}", point) for i, point in enumerate(findings.points)]
    rows.sort(key=lambda row: row[1].macs)
    picked = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    chosen = findings.headline.name if findings.headline else ""
    return [row for i, row in enumerate(rows) if i in picked or row[0] == chosen]


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

    with matplotlib.rc_context(STYLE):
        figure = curve_figure(findings, title)
        # Empty metadata: no date, so equal results give equal files.
        metadata = dict.fromkeys(["Format", "Type", "Creator", "Date"]) if file_format == "svg" else None
        figure.savefig(target, format=file_format, transparent=transparent, metadata=metadata)


def curve_figure(findings: Findings, title: str) -> Any:
    """The figure (matplotlib) of top-1 accuracy against MACs."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    unit, name = (1e9, "G") if findings.exits[-1].macs >= 1e9 else (1e6, "M")
    figure = Figure(figsize=(5.2, 3.6), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    named = _draw(axes, findings, unit)
    axes.set(xlabel=f"multiply-adds per image ({name})", ylabel="top-1 accuracy (%)")
    axes.margins(0.1)
    axes.grid(color=INK, alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1)
    figure.suptitle(title, fontsize=12, parse_math=False)
    _label(axes, named)
    return figure


def _draw(axes: Any, findings: Findings, unit: float) -> dict[str, np.ndarray]:
    """Draws the curve, if there is one, and all markers; returns the places that have a name, by name."""

    def place(*pairs: tuple[float, float]) -> np.ndarray:
        return np.array([(macs / unit, 100 * accuracy) for macs, accuracy in pairs]).reshape(-1, 2)

    filled = partial(axes.scatter, edgecolors=PAPER, linewidths=0.8, zorder=3)
    hollow = partial(axes.scatter, facecolors="none")
    exits = place(*((row.macs, row.acc1) for row in findings.exits))
    named = {f"exit {k}": place for k, place in enumerate(exits)}
    if findings.points:
        curve = place(*sorted((point.macs, point.accuracy) for point in findings.points))
        axes.plot(*curve.T, color=CURVE, linewidth=2, label="early exit")
    filled(*exits.T, s=45, color=EXIT, label="exit, earlier heads run")
    spared = place(*((row.alone, row.acc1) for row in findings.exits if row.alone < row.macs))
    if len(spared):
        hollow(*spared.T, s=45, edgecolors=EXIT, label="exit alone")
    if findings.routing:
        best = place((findings.routing.oracle["macs"], findings.routing.oracle["accuracy"]))
        hollow(*best.T, s=60, marker="D", edgecolors=CHOSEN, label="oracle")
    if one := findings.headline:
        low, chosen, high = place(
            *((one.macs.value, end) for end in (one.accuracy.low, one.accuracy.value, one.accuracy.high))
        )
        filled(*chosen, s=110, marker="*", color=CHOSEN, label="chosen")
        axes.plot(*np.stack([low, high]).T, color=CHOSEN, linewidth=1, label="its 95 % interval")
        named[one.name] = chosen
    return named


def _along(line: np.ndarray) -> np.ndarray:
    """Many places on a line through some."""
    steps = np.linspace(0, len(line) - 1, 40 * len(line))
    return np.stack([np.interp(steps, np.arange(len(line)), column) for column in line.T], axis=1)


def _label(axes: Any, named: dict[str, np.ndarray]) -> None:
    """Writes each name at the nearest place with room: off all that is drawn, other names and the frame."""
    axes.figure.draw_without_rendering()  # settles the layout, hence where a point lands on paper
    to_points = 72 / axes.figure.dpi
    low, high = axes.get_window_extent().get_points() * to_points
    drawn = [np.asarray(marks.get_offsets()) for marks in axes.collections]
    drawn += [_along(line.get_xydata()) for line in axes.lines]
    taken = axes.transData.transform(np.concatenate(drawn)) * to_points

    def room(anchor: np.ndarray, offset: np.ndarray) -> float:
        """How far the nearest thing is from the middle of a name, in its sizes: from 0.5 on all is clear."""
        centre = anchor + offset
        nearest = (np.abs(taken - centre) / LABEL_SIZE).max(axis=1).min()
        inside = (np.minimum(centre - low, high - centre) / LABEL_SIZE).min()
        return min(nearest, inside, 0.6)

    for name, point in named.items():
        anchor = axes.transData.transform(point) * to_points
        offset = max(LABEL_OFFSETS, key=partial(room, anchor))
        taken = np.concatenate([taken, anchor + offset + CORNERS * LABEL_SIZE])
        leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            name,
            point,
            offset,
            textcoords="offset points",
            fontsize=9,
            ha="center",
            va="center",
            arrowprops=leader,
            in_layout=False,
        )
