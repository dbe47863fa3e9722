import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adaptive.classes import ClassRow
from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.exit_tables import ExitFigures
from adaptive.findings import Findings
from adaptive.front import FrontRow
from adaptive.headline import Headline
from adaptive.intervals import Estimate
from adaptive.policy import OperatingPoint, Policy
from adaptive.report import write_report
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
    assert "Thresholds of energy_softmax: 0.9, 0.8 at exits 0 to 1." in page
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


def test_equal_results_give_equal_files(tmp_path):
    assert page_of(tmp_path) == page_of(tmp_path)


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


HOSTILE = "</script><b>x"
POLICIES = [
    Policy((NOBODY, 0.5 + i / 100, EVERYBODY), "energy_softmax", off=(0,), accuracy=0.7, macs=2e7)
    for i in range(4)
]
FRONT = [
    FrontRow(policy, Estimate(0.7 + i / 50, 0.69, 0.8), 1e7 * (i + 1), [0.0, 0.4, 0.6], f"{HOSTILE} {i}")
    for i, policy in enumerate(POLICIES)
]


@pytest.mark.usefixtures("no_pictures")
def test_the_slider_starts_at_the_chosen_policy_and_needs_no_script_to_show_it(tmp_path):
    point = OperatingPoint(POLICIES[1], 0.72, 2e7, [0.0, 0.4, 0.6])
    page = page_of(tmp_path, front=FRONT, headline=replace(HEADLINE, point=point))
    assert (
        'min="0" max="3" step="1" value="1"' in page and '<div class="control" id="control" hidden>' in page
    )
    assert '<code data-show="command">&lt;/script&gt;&lt;b&gt;x 1</code>' in page
    for cells in (
        ["exit 0", "off", "0.0 %"],
        ["exit 1", "0.51", "40.0 %"],
        ["exit 2", "all others", "60.0 %"],
    ):
        name, threshold, share = cells
        assert f"<td>{name}</td><td data-threshold>{threshold}</td><td data-share>{share}</td>" in page
    assert "Thresholds of energy_softmax: off, 0.51 at exits 0 to 1" in page
    assert "the circle the policy chosen above" in page and "This is the policy chosen above." in page
    assert "latency" not in page.split("<script")[0]  # it is not known
    elsewhere = page_of(tmp_path, front=FRONT, headline=HEADLINE)
    assert "is none of them: shown first is the nearest in cost" in elsewhere


@pytest.mark.usefixtures("no_pictures")
def test_the_stops_are_json_that_ends_no_script(tmp_path):
    page = page_of(tmp_path, front=FRONT)
    assert page.count("</script>") == page.count("<script") == 2 and HOSTILE not in page
    stops = json.loads(re.search(r'id="stops">(.*?)</script>', page).group(1))
    assert [stop["command"] for stop in stops] == [row.command for row in FRONT]
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "<script" not in page_of(tmp_path, front=FRONT[:1])


@pytest.mark.usefixtures("no_pictures")
def test_the_guarantee_is_told_with_its_assumption(tmp_path):
    facts = {"risk": "drop", "bound": 0.01, "method": "ltt", "images": 2500, "observed": 0.0043}
    given = SimpleNamespace(
        **facts, delta=0.05, smallest_bound=0.0012, feasible=True, statement="So < much.", assumption="If."
    )
    page = page_of(tmp_path, guarantee=given)
    assert '<h2>Guarantee</h2>\n<p>So &lt; much.</p>\n<p class="soft">If.</p>' in page
    for text in ("1.00 %", "0.43 % of 2,500 calibration images that only test it", "Learn then Test"):
        assert f"<dd>{text}</dd>" in page
    assert "at most 5.00 %" in page and "<dd>0.12 %</dd>" in page
    given = SimpleNamespace(**{**vars(given), "delta": None, "method": "crc", "feasible": False})
    page = page_of(tmp_path, guarantee=given)
    assert "<h2>No guarantee</h2>" in page and "Chance that it fails" not in page
    assert "conformal risk control" in page


@pytest.mark.usefixtures("no_pictures")
def test_calibration_of_every_exit_is_drawn(tmp_path):
    bins = [SimpleNamespace(count=30, confidence=0.8, accuracy=0.6)]
    page = page_of(tmp_path, reliability=[SimpleNamespace(ece=0.2, auroc=None, bins=bins)] * 3)
    assert page.count('<circle class="dot" cx="80.0" cy="40.0"') == 3
    assert "30 images: confidence 0.800, accuracy 0.600" in page and "of exit 2: ECE 20.00 %" in page
    assert "How far confidence" not in page_of(tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_classes_are_ranked_and_many_are_shortened(tmp_path):
    rows = [ClassRow(f"<c{i}>", 1000 + i, [0.5, 0.6, 0.7], [0.1, 0.0, 0.9], 1 - i / 100) for i in range(25)]
    page = page_of(tmp_path, classes=rows[:3])
    assert "All 3 classes, by accuracy" in page
    shown = re.findall(r"<td>&lt;(c\d+)&gt;</td><td>([\d,]+)</td><td>(.*?)</td>", page)
    assert shown[0] == ("c2", "1,002", "98.00 %") and [row[0] for row in shown] == ["c2", "c1", "c0"]
    page = page_of(tmp_path, classes=rows)
    assert "The 10 classes with the lowest and the 10 with the highest accuracy of 25" in page
    shown = [row[0] for row in re.findall(r"<td>&lt;(c\d+)&gt;</td>()", page)]
    assert shown == [f"c{i}" for i in [*range(24, 14, -1), *range(9, -1, -1)]]
