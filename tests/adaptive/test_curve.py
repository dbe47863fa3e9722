import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from adaptive.curve import plot_curve
from adaptive.exit_tables import ExitFigures
from adaptive.findings import Findings
from adaptive.front import FrontRow
from adaptive.headline import Headline
from adaptive.intervals import Estimate
from adaptive.policy import OperatingPoint, Policy
from adaptive.routing import Routing
from adaptive.timing import Comparison, TimedPoint

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
    table=[],
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


def front_of(points, gain=0.004):
    """A front somewhat above and left of some points."""
    return [
        FrontRow(
            point.policy, Estimate(point.accuracy + gain, 0, 1), 0.95 * point.macs, point.shares, "deploy"
        )
        for point in points
    ]


@pytest.mark.parametrize(
    ("exits", "points", "front"),
    [
        (exits_at([0.944, 0.95, 0.972, 0.964, 0.961], [5.9, 12.6, 24.5, 40.1, 58]), STEEP, front_of(STEEP)),
        (exits_at([0.6, 0.75, 0.85, 0.88, 0.9], [5, 12, 24, 33, 43]), SMOOTH, []),
        (exits_at([0.7 + 0.01 * k for k in range(12)], range(5, 65, 5)), ZIGZAG, front_of(ZIGZAG)),
        (exits_at([0.79, 0.87, 0.74], [35, 50, 50], [35, 38, 28]), WALL, []),
        (exits_at([0.6, 0.63, 0.72], [7, 13, 48], [7, 6, 39]), BESIDE, []),
    ],
    ids=["steep", "smooth", "zigzag", "wall", "beside other markers"],
)
def test_legend_and_names_do_not_cover_the_curve(tmp_path, monkeypatch, exits, points, front):
    chosen = replace(HEADLINE, accuracy=Estimate(0.75, 0.72, 0.78), macs=Estimate(25e6, 24e6, 26e6))
    found = Findings(exits, points, ROUTING, headline=chosen, front=front)
    figure = drawn(found, tmp_path, monkeypatch)
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


def test_plot_refuses_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="txt"):
        plot_curve(tmp_path / "curve.txt", Findings(EXITS, ROWS), "")
    assert not list(tmp_path.iterdir())


def test_the_front_is_beside_the_quota_rule(tmp_path, monkeypatch):
    """Each curve is of its own policies, by cost; a legend names them. Alone, quotas need no name."""
    front = front_of(ROWS)
    figure = drawn(Findings(EXITS, ROWS, front=front), tmp_path, monkeypatch)
    search, quotas = figure.axes[0].lines
    assert [line.get_label() for line in (search, quotas)] == ["search", "quotas"]
    costs = sorted(row.macs / 1e9 for row in front)
    assert search.get_xdata() == pytest.approx(costs) and quotas.get_xdata() == pytest.approx(
        [0.2, 0.4, 0.9, 1.2]
    )
    assert search.get_ydata() == pytest.approx([70.3, 70.4, 73.4, 70.4])
    assert search.get_color() != quotas.get_color() and search.get_linestyle() != quotas.get_linestyle()
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"search", "quotas"}
    (alone,) = drawn(Findings(EXITS, ROWS), tmp_path, monkeypatch).axes[0].lines
    assert alone.get_label() == "early exit"
