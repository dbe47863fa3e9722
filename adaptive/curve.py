"""The figure of an evaluation: accuracy against cost."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from adaptive.findings import Findings
from utils import replacing

# Okabe-Ito colours, told apart under every common colour blindness and readable on light and dark paper.
CURVE, QUOTAS, EXIT, CHOSEN = "#0072b2", "#cc79a7", "#d55e00", "#009e73"
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


def plot_curve(path: Path, findings: Findings, title: str) -> None:
    """Draws top-1 accuracy against MACs in the suffix's format: .png, .svg, .pdf; ValueError for others."""
    with replacing(path) as temporary:
        _save_curve(temporary, path.suffix[1:], findings, title)


def inline_curve(findings: Findings) -> Markup:
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
    """Draws the curves, if there are any, and all markers; returns the places that have a name, by name."""
    place = partial(_places, unit)
    filled = partial(axes.scatter, edgecolors=PAPER, linewidths=0.8, zorder=3)
    hollow = partial(axes.scatter, facecolors="none")
    exits = place(*((row.macs, row.acc1) for row in findings.exits))
    named = {f"exit {k}": place for k, place in enumerate(exits)}
    _draw_policies(axes, findings, unit)
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


def _draw_policies(axes: Any, findings: Findings, unit: float) -> None:
    """Draws the front and the policies of the quota rule, which are there to compare with if there is one."""
    quotas = _places(unit, *sorted((point.macs, point.accuracy) for point in findings.points))
    front = _places(unit, *sorted((row.macs, row.accuracy.value) for row in findings.front))
    bold = partial(axes.plot, color=CURVE, linewidth=2)
    if len(front):
        bold(*front.T, label="search")
        if len(quotas):
            axes.plot(*quotas.T, color=QUOTAS, linewidth=1.5, linestyle="--", label="quotas")
    elif len(quotas):
        bold(*quotas.T, label="early exit")


def _places(unit: float, *pairs: tuple[float, float]) -> np.ndarray:
    """Where pairs of multiply-adds and accuracy are in the figure: [N, 2]."""
    return np.array([(macs / unit, 100 * accuracy) for macs, accuracy in pairs]).reshape(-1, 2)


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
