import os
import re
from dataclasses import replace

import pytest
import torch

from adaptive.exit_tables import ExitFigures
from adaptive.policy import OperatingPoint, Policy
from adaptive.report import Findings, cheapest_match, plot_curve, write_report
from adaptive.routing import Routing
from adaptive.timing import Comparison, Measurement, TimedPoint

EXITS = [
    ExitFigures(exit=0, loss=1.5, acc1=0.60, acc5=0.85, macs=10_000_000, alone=10_000_000),
    ExitFigures(exit=1, loss=1.2, acc1=0.72, acc5=0.92, macs=25_000_000, alone=25_000_000),
    ExitFigures(exit=2, loss=1.1, acc1=0.70, acc5=0.95, macs=1_200_000_000, alone=1_200_000_000),
]


def row(name, accuracy, macs):
    policy = Policy((0.9, 0.8, 0.0), "energy_softmax", name)
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
        ),
    ],
    table=[
        Measurement("exit 2 alone", 64, 100.04, 9.5, 11, 1.2e9, 0.7, NOWHERE),
        Measurement("early & fast", 64, 234.6, None, None, 4e8, 0.701, NOWHERE),
    ],
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
        ["exit 0", "10.00 M", "0.01", "60.00 %"],
        ["exit 2", "1.20 G", "1.00", "70.00 %", "95.00 %", "1.1000"],
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


def test_headline_takes_the_cheapest_row_that_reaches_the_last_exit(tmp_path):
    assert cheapest_match(Findings(EXITS, ROWS)).policy.name == "match"
    best, same = cards_of(page_of(tmp_path))
    assert best[1:] == ("72.00 %", "exit 1, 25.00 M MACs per image")
    assert same[1] == "3.00×" and same[2].startswith(
        "match: 70.00 % for 400.00 M, against exit 2 (70.00 %, 1.20 G)"
    )


def test_headline_says_when_no_row_reaches_the_last_exit(tmp_path):
    rows = [row("close", 0.699, 200e6), row("no cheaper", 0.70, 1200e6)]
    assert cheapest_match(Findings(EXITS, rows)) is None
    _, (_, figure, detail) = cards_of(page_of(tmp_path, points=rows))
    assert figure == "not reached" and "exit 2 (70.00 %, 1.20 G)" in detail


def test_runtime_is_shown(tmp_path):
    page = page_of(tmp_path, runtime=RUNTIME)
    assert cards_of(page)[2][1] == "2.35×" and "3.00× fewer MACs, 70.10 % accuracy" in cards_of(page)[2][2]
    assert (
        "<td>early &amp; fast</td><td>234.6</td><td>–</td><td>–</td><td>70.10 %</td><td>400.00 M</td>" in page
    )
    assert (
        "row 4: thresholds 0.75 0.5 -1e+08; of 1,797 images, 2 (latency order) and 3 (throughput order)"
        in page
    )
    assert "Measured speed" not in page_of(tmp_path)


def test_shares_show_eight_evenly_spaced_rows_by_cost(tmp_path):
    page = page_of(tmp_path, points=[row(f"p={i}", 0.5, (20 - i) * 1e6) for i in range(15)])
    assert re.findall(r"<span>(p=\d+)<br>", page) == [f"p={i}" for i in range(14, -1, -2)]
    assert page.count("width:50.00%") == 16 and "width:0.00%" not in page


@pytest.mark.parametrize(("exits", "rows"), [(EXITS[:1], []), (EXITS, []), (EXITS[:1], [row("a", 0.6, 1e7)])])
def test_one_exit_and_no_rows(tmp_path, exits, rows):
    page = page_of(tmp_path, exits=exits, points=[replace(item, shares=[1.0]) for item in rows])
    assert ("No dynamic evaluation" in page) == (not rows)
    assert cards_of(page)[1][1] == "not reached"


def test_plot_writes_png_and_svg(tmp_path):
    for name in ("curve.png", "curve.svg"):
        plot_curve(tmp_path / name, Findings(EXITS, ROWS, runtime=RUNTIME), "a $b$ <c>")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "curve.svg").read_text()
    for text in ("exit 0", "exit 1", "exit 2", "measured, 1797 images", "per image (G)", "a $b$ &lt;c&gt;"):
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


ROUTING = Routing(
    point=ROWS[1],
    samples=100,
    deferred=0.27,
    four_way={"right_right": 11, "right_wrong": 2, "wrong_right": 13, "wrong_wrong": 1},
    oracle={"accuracy": 0.81, "macs": 20e6},
    auroc={"max_prob": [0.912, 0.856], "margin": [0.9, None]},
    flops=1e9,
)


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
    assert "oracle" in page and "the exit alone" in page
    assert "oracle" not in page_of(tmp_path)
