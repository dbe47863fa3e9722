"""Evaluation results as a figure and as one HTML page that opens offline. Plain data in, files out:

exits:    [{"exit": k, "loss": float, "acc1": fraction, "acc5": fraction, "macs": int}], k from 0, most
expensive last
rows:     [{"policy": str, "thresholds": [...], "accuracy": fraction, "macs": float, "shares": [K fractions]}]
runtime:  as `adaptive.latency.compare_orders` returns it: {"num_images", "points": [...],
          "table": [{"policy", "images_per_s", "p50_ms", "p95_ms", "macs", "accuracy"}]}; a latency may be
          None
router:   a row as above with what `adaptive.routing.routing` says of it

`exits` may have "alone": multiply-adds of that exit without what only other exits need.
"""

import io
from functools import partial
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from utils import replacing

PAGE = Path(__file__).with_name("report.html")

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
LABEL_OFFSETS = [
    np.array(side) * distance * LABEL_SIZE
    for distance in (1, 2, 3)
    for side in [(0.7, -0.9), (0, -1.2), (0.9, 0), (-0.7, 0.9), (0, 1.2), (-0.9, 0), (-0.7, -0.9), (0.7, 0.9)]
]


def plot_curve(path, exits, rows, *, title, runtime=None, router=None):
    """Draw top-1 accuracy against MACs to ``path``; the suffix picks the format (``.png``, ``.svg``,
    ``.pdf``).

    Raises:
        ValueError: matplotlib cannot write files of that suffix.
    """
    path = Path(path)
    with replacing(path) as temporary:
        _save_curve(temporary, path.suffix[1:], exits, rows, title=title, runtime=runtime, router=router)


def write_report(path, *, title, subtitle, exits, rows, runtime=None, router=None, facts=()):
    """Write the page to ``path``: no script, nothing loaded from elsewhere. ``facts`` are (label, text)
    pairs."""
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        cards="".join(_cards(exits, rows, runtime)),
        curve=_inline_curve(exits, rows, runtime, router),
        exits=_exit_table(exits),
        shares=_share_bars(_evenly_spaced(rows, 8)),
        runtime=(_router_section(router) if router else "") + (_runtime_section(runtime) if runtime else ""),
        facts=_facts_section(facts) if facts else "",
    )
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def cheapest_match(exits, rows):
    """The cheapest row as accurate as the last exit for fewer MACs than it takes, or None."""
    last = exits[-1]
    matches = [row for row in rows if row["accuracy"] >= last["acc1"] and row["macs"] < last["macs"]]
    return min(matches, key=lambda row: row["macs"], default=None)


def _percent(fraction):
    return f"{100 * fraction:.2f} %"


def _macs(count):
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _save_curve(target, file_format, exits, rows, *, title="", runtime=None, router=None, transparent=False):
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    unit, name = (1e9, "G") if exits[-1]["macs"] >= 1e9 else (1e6, "M")
    points = np.array([(row["macs"] / unit, 100 * row["acc1"]) for row in exits])
    curve = np.array(sorted((row["macs"] / unit, 100 * row["accuracy"]) for row in rows)).reshape(-1, 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        if rows:
            axes.plot(*curve.T, color=CURVE, linewidth=2, label="early exit")
        marker = {"edgecolors": PAPER, "linewidths": 0.8, "zorder": 3}
        axes.scatter(*points.T, s=45, color=EXIT, label="one exit for all images", **marker)
        spared = [
            (row["alone"] / unit, 100 * row["acc1"])
            for row in exits
            if row.get("alone", np.inf) < row["macs"]
        ]
        if router and spared:
            axes.scatter(
                *np.array(spared).T, s=45, facecolors="none", edgecolors=EXIT, label="the exit alone"
            )
        if router:
            best = (router["oracle"]["macs"] / unit, 100 * router["oracle"]["accuracy"])
            axes.scatter(*best, s=60, marker="D", facecolors="none", edgecolors=CHOSEN, label="oracle")
        if runtime:
            chosen = np.array(
                [(point["macs"] / unit, 100 * point["accuracy"]) for point in runtime["points"]]
            )
            timed = f"measured, {runtime['num_images']} images"
            axes.scatter(*chosen.T, s=150, marker="*", color=CHOSEN, label=timed, **marker)
        axes.set(xlabel=f"multiply-adds per image ({name})", ylabel="top-1 accuracy (%)")
        axes.margins(0.1)
        axes.grid(color=INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle(title, fontsize=12, parse_math=False)
        _label_exits(axes, exits, points, curve if rows else points)
        # Empty metadata: no date, so equal results give equal files.
        metadata = dict.fromkeys(["Format", "Type", "Creator", "Date"]) if file_format == "svg" else None
        figure.savefig(target, format=file_format, transparent=transparent, metadata=metadata)


def _label_exits(axes, exits, points, line):
    """Write each exit's name where it covers least of the line, the markers, other names and the frame."""
    axes.figure.draw_without_rendering()  # settles the layout, hence where a point lands on paper
    to_points = 72 / axes.figure.dpi
    anchors = axes.transData.transform(points) * to_points
    x = np.linspace(line[0, 0], line[-1, 0], 400)
    drawn = axes.transData.transform(np.stack([x, np.interp(x, *line.T)], axis=1)) * to_points
    low, high = axes.get_window_extent().get_points() * to_points
    centres = np.empty((0, 2))

    def clutter(anchor, offset):
        centre = anchor + offset
        distances = np.linalg.norm(anchors - centre, axis=1)
        mistaken = distances < np.linalg.norm(offset) - 1e-6  # would read as the name of that marker
        outside = (centre - LABEL_SIZE / 2 < low) | (centre + LABEL_SIZE / 2 > high)
        clashes = (np.abs(centres - centre) < LABEL_SIZE).all(axis=1)
        covered = (np.abs(np.concatenate([drawn, anchors]) - centre) < LABEL_SIZE / 2).all(axis=1)
        return covered.sum() + 100 * (mistaken.sum() + clashes.sum() + outside.sum())

    for row, point, anchor in zip(exits, points, anchors, strict=True):
        offset = min(LABEL_OFFSETS, key=partial(clutter, anchor))
        centres = np.concatenate([centres, [anchor + offset]])
        leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
        text = {"fontsize": 9, "ha": "center", "va": "center", "arrowprops": leader}
        label = axes.annotate(f"exit {row['exit']}", point, offset, textcoords="offset points", **text)
        label.set_in_layout(False)


def _inline_curve(exits, rows, runtime, router):
    """The figure as an ``<svg>`` element in the colours of the page, light or dark."""
    buffer = io.StringIO()
    _save_curve(buffer, "svg", exits, rows, runtime=runtime, router=router, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--card)")


def _cards(exits, rows, runtime):
    best, last = max(exits, key=lambda row: row["acc1"]), exits[-1]
    yield _card(
        "Best exit", _percent(best["acc1"]), f"exit {best['exit']}, {_macs(best['macs'])} MACs per image"
    )
    match = cheapest_match(exits, rows)
    target = f"exit {last['exit']} ({_percent(last['acc1'])}, {_macs(last['macs'])})"
    if match:
        figure = f"{last['macs'] / match['macs']:.2f}×"
        detail = (
            f"{match['policy']}: {_percent(match['accuracy'])} for {_macs(match['macs'])}, against {target}; "
        )
        detail += f"picked by test accuracy among {len(rows)} operating points"
    else:
        figure, detail = "not reached", f"no operating point is as accurate as {target} for fewer MACs"
    yield _card("Same accuracy for fewer MACs", figure, detail)
    if runtime:
        point = runtime["points"][0]
        detail = (
            f"over the network that stops at exit {last['exit']}; {point['macs_ratio']:.2f}× fewer MACs, "
        )
        detail += f"{_percent(point['accuracy'])} accuracy, throughput order, {point['point']}"
        yield _card("Measured speed-up", f"{point['speedup']:.2f}×", detail)


def _card(label, figure, detail):
    return (
        f'<div class="card">{escape(label)}<b>{escape(figure)}</b><p class="soft">{escape(detail)}</p></div>'
    )


def _table(head, body):
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in body]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def _exit_table(exits):
    largest = exits[-1]["macs"]
    body = [
        [f"exit {row['exit']}", _macs(row["macs"]), f"{row['macs'] / largest:.2f}"]
        + [_percent(row["acc1"]), _percent(row["acc5"]), f"{row['loss']:.4f}"]
        for row in exits
    ]
    return _table(["", "MACs", "of last", "top-1", "top-5", "loss"], body)


def _evenly_spaced(rows, count):
    """At most ``count`` rows, cheapest and most expensive included."""
    rows = sorted(rows, key=lambda row: row["macs"])
    picked = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[i] for i in picked]


def _share_bars(rows):
    """One stacked bar per row: the fraction of images that left at each exit."""
    if not rows:
        return "<p>No dynamic evaluation was run.</p>"
    styles = _exit_styles(len(rows[0]["shares"]))
    key = "".join(f'<span><i style="{style}"></i>exit {k}</span>' for k, style in enumerate(styles))
    return f'<div class="key">{key}</div>' + "\n".join(_share_bar(row, styles) for row in rows)


def _share_bar(row, styles):
    name = f"{escape(row['policy'])}<br>{_percent(row['accuracy'])}, {_macs(row['macs'])}"
    parts = "".join(
        f'<span style="{style};width:{100 * share:.2f}%" title="exit {k}: {_percent(share)}">'
        f"{f'{share:.0%}' if share >= 0.1 else ''}</span>"
        for k, (share, style) in enumerate(zip(row["shares"], styles, strict=True))
        if share > 0
    )
    return f'<div class="share"><span>{name}</span><div class="bar">{parts}</div></div>'


def _exit_styles(num_exits):
    """Cheap exits dark, expensive ones light: an order that survives colour blindness and grey print."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    places = np.linspace(0.2, 1, num_exits)  # darker ones drown in a dark page
    return [
        f"background:{to_hex(colormaps['viridis'](x))};color:{'#fff' if x < 0.45 else '#000'}" for x in places
    ]


def _router_section(router):
    met = router["four_way"]
    both = ("right", "wrong")
    body = [[f"{a} at exit 0", *(f"{met[f'{a}_{b}']:,}" for b in both)] for a in both]
    table = _table([f"{sum(met.values()):,} images that went on", "then right", "then wrong"], body)
    kinds = [
        [kind, *("–" if value is None else f"{value:.3f}" for value in values)]
        for kind, values in router["auroc"].items()
    ]
    heads = [f"exit {k}" for k in range(len(kinds[0]) - 1)]
    text = (
        f"{router['policy']}, {router['confidence']}: {_percent(router['routed'])} of {router['samples']:,} images go "
        f"beyond exit 0. {_percent(router['accuracy'])} are right at {_macs(router['macs'])}; an oracle that knows the "
        f"answers would have {_percent(router['oracle']['accuracy'])} at {_macs(router['oracle']['macs'])}."
    )
    ranks = _table(["AUROC of knowing the answer", *heads], kinds)
    return f"<section><h2>What handing on does</h2><p>{escape(text)}</p>{table}<br>{ranks}</section>"


def _runtime_section(runtime):
    body = []
    for row in runtime["table"]:
        latencies = ["–" if row[key] is None else f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms")]
        speed = f"{row['images_per_s']:.1f}"
        body.append([row["policy"], speed, *latencies, _percent(row["accuracy"]), _macs(row["macs"])])
    table = _table(["", "images/s", "p50 ms", "p95 ms", "top-1", "MACs"], body)
    notes = ""
    for point in runtime["points"]:
        differ = " and ".join(f"{n:,} ({order} order)" for order, n in point["mismatches"].items())
        thresholds = " ".join(f"{value:.4g}" for value in point["thresholds"])
        note = f"{point['point']}: thresholds {thresholds}; of {runtime['num_images']:,} images, {differ} left elsewhere "
        notes += f"<p class='soft'>{escape(note + 'than simulated.')}</p>"
    bars = _share_bars([{**point, "policy": point["point"]} for point in runtime["points"]])
    return f"<section><h2>Measured speed</h2>{table}<br>{bars}{notes}</section>"


def _facts_section(facts):
    items = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in facts)
    return f"<section><h2>How each number was obtained</h2><dl>{items}</dl></section>"
