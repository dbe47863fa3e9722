import os
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from adaptive.exit_tables import ExitFigures
from adaptive.headline import Headline
from adaptive.intervals import Estimate
from adaptive.policy import OperatingPoint, Policy
from adaptive.report import Findings, plot_curve, write_report
from adaptive.routing import Routing
from adaptive.timing import Comparison, Measurement, TimedPoint

EXITS = [
    ExitFigures(exit=0, loss=1.5, acc1=0.60, acc5=0.85, macs=10_000_000, alone=10_000_000),
    ExitFigures(exit=1, loss=1.2, acc1=0.72, acc5=0.92, macs=25_000_000, alone=25_000_000),
    ExitFigures(exit=2, loss=1.1, acc1=0.70, acc5=0.95, macs=1_200_000_000, alone=900_000_000),
]


def row(name, accuracy, macs):
    policy = Policy((0.9, 0.8, 0.0), "energy_softmax", name, accuracy=accuracy - 0.01, macs=macs + 1e6)
    return OperatingPoint(policy, accuracy, macs, [0.5, 0.5, 0])


ROWS = [
    row("dear", 0.73, 900e6),
    row("match", 0.70, 400e6),
    row("close", 0.699, 200e6),
    row("last", 0.70, 1200e6),
]
NOWHERE = torch.zeros(0)
RUNTIME = Comparison(
    num_images=1797,
    points=[
        TimedPoint(
            point="row 4",
            thresholds=[0.75, 0.5, -1e8],
            accuracy=0.701,
            macs=400e6,
            shares=[0.25, 0.25, 0.5],
            mismatches={"latency": 2, "throughput": 3},
            speedup=2.345,
            macs_ratio=3.0,
            speedup_over_plain=4.0,
            static_accuracy=0.7,
            speedup_interval=(2.2, 2.4),
            speedup_over_plain_interval=(3.8, 4.1),
        ),
    ],
    table=[
        Measurement("exit 2 alone", 64, 100.04, 9.5, 11, 1.2e9, 0.7, NOWHERE),
        Measurement("early & fast", 64, 234.6, None, None, 4e8, 0.701, NOWHERE),
    ],
)


HEADLINE = Headline(
    name="row 2",
    reason="the cheapest of 3 settings",
    num_images=5000,
    point=ROWS[2],
    accuracy=Estimate(0.699, 0.69, 0.71),
    macs=Estimate(200e6, 190e6, 210e6),
    static_accuracy=Estimate(0.70, 0.69, 0.72),
    static_macs=900_000_000,
    difference=Estimate(-0.001, -0.004, 0.003),
    fewer_macs=Estimate(4.5, 4.3, 4.7),
    fewer_than_all=Estimate(6.0, 5.7, 6.3),
)


ROUTING = Routing(
    point=ROWS[1],
    samples=100,
    deferred=0.27,
    four_way={"right_right": 11, "right_wrong": 2, "wrong_right": 13, "wrong_wrong": 1},
    oracle={"accuracy": 0.81, "macs": 20e6},
    auroc={"max_prob": [0.912, 0.856], "margin": [0.9, None]},
    flops=1e9,
)


def page_of(path, *, title="t", subtitle="s", facts=(), **found):
    findings = Findings(**{"exits": EXITS, "points": ROWS, **found})
    write_report(path / "report.html", findings, title=title, subtitle=subtitle, facts=facts)
    return (path / "report.html").read_text(encoding="utf-8")


def cards_of(page):
    return re.findall(r'class="card">(.*?)<b>(.*?)</b><p class="soft">(.*?)</p>', page)


def test_page_shows_every_exit_in_percent_and_macs(tmp_path):
    page = page_of(tmp_path)
    for cells in (
        ["exit 0", "10.00 M", "0.01", "10.00 M", "60.00 %"],
        ["exit 2", "1.20 G", "1.00", "900.00 M", "70.00 %", "95.00 %", "1.1000"],
    ):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page


def test_text_is_escaped(tmp_path):
    facts = [("<i>label", "a < b & $c")]
    page = page_of(
        tmp_path, title="<b>net</b> $x", subtitle="<u>", points=[row("<s>", 0.5, 1e6)], facts=facts
    )
    assert not re.search("<b>net|<u>|<s>|<i>label", page)
    assert "&lt;b&gt;net&lt;/b&gt; $x" in page and "a &lt; b &amp; $c" in page


def test_page_loads_nothing(tmp_path):
    page = page_of(tmp_path, runtime=RUNTIME, facts=[("a", "b")])
    assert not re.search(r"<script|<link|<img|@import|<metadata", page)
    references = re.findall(r"""(?:src|href)\s*=\s*["'](.*?)["']|url\((.*?)\)""", page)
    assert references and all((one or two).startswith("#") for one, two in references)
    assert all(
        url.startswith("http://www.w3.org/") for url in re.findall(r"https?://[^\"' ]+", page)
    )  # xmlns names


def test_inline_curve_takes_the_colours_of_the_page(tmp_path):
    svg = re.search("<svg.*</svg>", page_of(tmp_path), re.DOTALL).group()
    assert "currentColor" in svg and "#24292f" not in svg and "#ffffff" not in svg


@pytest.mark.usefixtures("no_pictures")
def test_headline_is_the_policy_chosen_on_calib_against_the_static_network(tmp_path):
    """Row 1 is as accurate as the last exit on the test images and cheaper than row 3; it was not chosen."""
    accuracy, macs = cards_of(page := page_of(tmp_path, headline=HEADLINE))
    assert accuracy == (
        "Top-1 accuracy",
        "69.90 %",
        "69.90 % [69.00, 71.00]; the static network has 70.00 % [69.00, 72.00], the difference is "
        "-0.10 points [-0.40, +0.30]",
    )
    assert macs == (
        "Fewer MACs",
        "4.50×",
        "4.50× [4.30, 4.70] fewer than the static network, exit 2 alone (900.00 M); 6.00× [5.70, 6.30] fewer "
        "than all exits (1.20 G)",
    )
    assert "picked by test accuracy" not in page
    assert "<h2>row 2 (close)</h2>" in page and "It is the cheapest of 3 settings." in page
    assert "Thresholds of energy_softmax: 0.9 0.8 at exits 0 to 1." in page
    assert "calibration images: 68.90 % for 201.00 M; on 5,000 test images: 69.90 % for 200.00 M" in page


@pytest.mark.usefixtures("no_pictures")
def test_speed_is_told_with_the_accuracy_on_the_images_it_was_measured_on(tmp_path):
    page = page_of(tmp_path, runtime=RUNTIME, headline=HEADLINE)
    title, figure, text = cards_of(page)[2]
    assert (title, figure) == ("Measured speed-up", "2.35×")
    assert text.startswith(
        "2.35× [2.20, 2.40] the images/s of the static network, 4.00× [3.80, 4.10] those of all"
    )
    assert "on 1,797 test images, with 70.10 % top-1 and 3.00× fewer MACs (static network: 70.00 %)" in text
    assert (
        "<td>early &amp; fast</td><td>234.6</td><td>–</td><td>–</td><td>70.10 %</td><td>400.00 M</td>" in page
    )
    assert (
        "row 4: thresholds 0.75 0.5 -1e+08; of 1,797 images, 2 (latency order) and 3 (throughput order)"
        in page
    )
    assert "Measured speed" not in page_of(tmp_path)


def drawn(findings, tmp_path, monkeypatch):
    """The figure of the findings, as it is saved."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure) or path.touch())
        plot_curve(tmp_path / "curve.png", findings, "title")
    figures[0].draw_without_rendering()
    return figures[0]


def test_the_curve_shows_no_figures_of_some_of_the_images(tmp_path, monkeypatch):
    """Speeds are of 1,797 images, the curve of all 5,000."""
    (axes,) = drawn(Findings(EXITS, ROWS, runtime=RUNTIME, headline=HEADLINE), tmp_path, monkeypatch).axes
    places = np.concatenate([one.get_offsets() for one in axes.collections])

    def near(macs, accuracy):
        return np.isclose(places, (macs, accuracy)).all(axis=1).any()

    assert near(0.2, 69.9) and not near(0.4, 70.1)


def sweep(accuracies, costs):
    return [
        row(f"p={i}", accuracy, 1e6 * cost)
        for i, (accuracy, cost) in enumerate(zip(accuracies, costs, strict=True))
    ]


def exits_at(accuracies, costs, alone=None):
    rows = zip(accuracies, costs, alone or [0.8 * cost for cost in costs], strict=True)
    figures = [(round(1e6 * cost), round(1e6 * single), 1, accuracy, 1) for accuracy, cost, single in rows]
    return [ExitFigures(k, *row) for k, row in enumerate(figures)]


STEEP = sweep([0.944, 0.95, 0.95, 0.964, 0.964, *[0.961] * 34], [6.4, 7.5, 8.8, 9.2, 10, *range(12, 46)])
SMOOTH = sweep([0.6 + 0.3 * (1 - 0.9**i) for i in range(39)], range(5, 44))
ZIGZAG = sweep([0.7 + 0.1 * (i % 2) for i in range(10)], range(5, 55, 5))
WALL = sweep([0.79, 0.87, 0.74], [35, 50, 50])
BESIDE = sweep([0.6, 0.63, 0.72], [7, 13, 48])


@pytest.mark.parametrize(
    ("exits", "points"),
    [
        (exits_at([0.944, 0.95, 0.972, 0.964, 0.961], [5.9, 12.6, 24.5, 40.1, 58]), STEEP),
        (exits_at([0.6, 0.75, 0.85, 0.88, 0.9], [5, 12, 24, 33, 43]), SMOOTH),
        (exits_at([0.7 + 0.01 * k for k in range(12)], range(5, 65, 5)), ZIGZAG),
        (exits_at([0.79, 0.87, 0.74], [35, 50, 50], [35, 38, 28]), WALL),
        (exits_at([0.6, 0.63, 0.72], [7, 13, 48], [7, 6, 39]), BESIDE),
    ],
    ids=["steep", "smooth", "zigzag", "wall", "beside other markers"],
)
def test_legend_and_names_do_not_cover_the_curve(tmp_path, monkeypatch, exits, points):
    chosen = replace(HEADLINE, accuracy=Estimate(0.75, 0.72, 0.78), macs=Estimate(25e6, 24e6, 26e6))
    figure = drawn(Findings(exits, points, ROUTING, headline=chosen), tmp_path, monkeypatch)
    (axes,) = figure.axes
    names = [one for one in axes.texts if isinstance(one, Annotation)]
    assert {one.get_text() for one in names} == {"row 2"} | {f"exit {k}" for k in range(len(exits))}
    # Of a name with a leader line, the name alone.
    boxes = [*map(Text.get_window_extent, names), figure.legends[0].get_window_extent()]
    steps = np.linspace(0, 1, 500)[:, None]
    places = [axes.transData.transform(one.get_offsets()) for one in axes.collections]
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        places += [start + steps * (end - start) for start, end in pairwise(corners)]
    everything = np.concatenate(places)
    for box in boxes:
        inside = (everything >= box.min) & (everything <= box.max)
        assert not inside.all(axis=1).any(), box
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.usefixtures("no_pictures")
def test_shares_show_eight_evenly_spaced_rows_by_cost(tmp_path):
    page = page_of(tmp_path, points=[row(f"p={i}", 0.5, (20 - i) * 1e6) for i in range(15)])
    shown = re.findall(r"<span>(row \d+: p=\d+)<br>", page)
    assert shown == [f"row {i}: p={i}" for i in range(14, -1, -2)]
    assert page.count("width:50.00%") == 16 and "width:0.00%" not in page
    page = page_of(tmp_path, headline=HEADLINE, points=[row(f"p={i}", 0.5, i * 1e6) for i in range(30)])
    names = re.findall(r"<span>(row \d+): p=\d+<br>", page)
    assert len(names) == 9 and "row 2" in names  # the chosen one is shown, too


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("exits", "rows"), [(EXITS[:1], []), (EXITS, []), (EXITS[:1], [row("a", 0.6, 1e7)])])
def test_one_exit_and_no_rows(tmp_path, exits, rows):
    page = page_of(tmp_path, exits=exits, points=[replace(item, shares=[1.0]) for item in rows])
    assert ("No dynamic evaluation" in page) == (not rows)
    cards = cards_of(page)
    assert [card[:2] for card in cards] == [("Top-1 accuracy", f"{100 * exits[-1].acc1:.2f} %")]


def test_plot_writes_png_and_svg(tmp_path):
    for name in ("curve.png", "curve.svg"):
        plot_curve(tmp_path / name, Findings(EXITS, ROWS, runtime=RUNTIME, headline=HEADLINE), "a $b$ <c>")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "curve.svg").read_text()
    for text in (
        "exit 0",
        "exit 1",
        "exit 2",
        "row 2",
        "chosen",
        "per image (G)",
        "a $b$ &lt;c&gt;",
    ):
        assert f"{text}</text>" in svg
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "curve.svg"]


def test_labels_keep_apart(tmp_path):
    exits = [replace(EXITS[0], exit=k, acc1=0.6 + 0.001 * k, macs=10_000_000 + 100_000 * k) for k in range(3)]
    exits.append(replace(EXITS[0], exit=3, acc1=0.9, macs=90_000_000))
    plot_curve(tmp_path / "curve.svg", Findings(exits), "")
    svg = (tmp_path / "curve.svg").read_text()
    places = [
        tuple(map(float, found)) for found in re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>exit \d<', svg)
    ]
    assert len(places) == 4
    pairs = [(a, b) for i, a in enumerate(places) for b in places[:i]]
    assert all(abs(a[0] - b[0]) > 30 or abs(a[1] - b[1]) > 10 for a, b in pairs)


def test_equal_results_give_equal_files(tmp_path):
    assert page_of(tmp_path) == page_of(tmp_path)


def test_plot_refuses_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="txt"):
        plot_curve(tmp_path / "curve.txt", Findings(EXITS, ROWS), "")
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        page_of(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_page_says_what_deferring_does(tmp_path):
    exits = [replace(row, alone=row.macs - 5_000_000 * row.exit) for row in EXITS]
    page = page_of(tmp_path, exits=exits, routing=ROUTING)
    for cells in (
        ["right at exit 0", "11", "2"],
        ["wrong at exit 0", "13", "1"],
        ["max_prob", "0.912", "0.856"],
        ["margin", "0.900", "–"],
    ):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "27.00 % of 100 images go beyond exit 0" in page and "81.00 % at 20.00 M" in page
    assert "which corrects 13 answers and degrades 2." in page
    assert "oracle" in page and "exit alone</text>" in page
    assert "oracle" not in page_of(tmp_path)
