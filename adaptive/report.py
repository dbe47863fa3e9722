"""What an evaluation found as one HTML page that opens offline."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

from adaptive.classes import worst_and_best
from adaptive.curve import inline_curve
from adaptive.findings import Findings
from adaptive.policy import OperatingPoint
from adaptive.reliability_plot import panels
from adaptive.report_texts import macs_text, percent_text, threshold_texts, times_text
from adaptive.slider import slider_of
from utils import write_text


def write_report(
    path: Path, findings: Findings, *, title: str, subtitle: str, facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes the page: nothing is loaded from elsewhere, and the only script is that of the slider, without
    which all the rest can be read. `facts` are pairs of label and text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent_text, macs=macs_text, times=times_text, thresholds=threshold_texts, asdict=asdict
    )
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        record=findings,
        shown=_evenly_spaced(findings, 8),
        styles=_exit_styles(len(findings.exits)),
        curve=inline_curve(findings),
        slider=slider_of(findings),
        panels=panels(findings.reliability),
        classes=worst_and_best(findings.classes),
    )
    write_text(path, page)


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
