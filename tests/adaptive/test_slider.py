from dataclasses import replace

import pytest

from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.exit_tables import ExitFigures
from adaptive.findings import Findings
from adaptive.front import FrontRow
from adaptive.headline import Headline
from adaptive.intervals import Estimate
from adaptive.policy import OperatingPoint, Policy
from adaptive.report_texts import macs_text, threshold_texts
from adaptive.slider import EDGE, HEIGHT, WIDTH, slider_of

EXITS = [ExitFigures(k, 10**7 * (k + 1), 10**7 * (k + 1), 1.0, 0.6 + k / 10, 0.9) for k in range(3)]


def row(limit, top1, cost, **known):
    policy = Policy((NOBODY, limit, EVERYBODY), off=(0,), latency_ms=cost / 1e7, **known)
    interval = Estimate(top1, top1 - 0.01, top1 + 0.02)
    return FrontRow(policy, interval, cost, [0.0, 0.25, 0.75], f"deploy {limit}")


FRONT = [
    row(0.2, 0.7, 12e6, accuracy=0.71, macs=11e6),
    row(0.5, 0.75, 18e6),
    row(0.9, 0.8, 32e6),
]


def headline_of(policy, macs):
    interval = Estimate(0.75, 0.70, 0.79)
    point = OperatingPoint(policy, 0.75, macs, [0, 0.25, 0.75])
    names = ("macs", "static_accuracy", "difference", "fewer_macs", "fewer_than_all")
    about = {"name": "row 1", "reason": "", "num_images": 9, "static_macs": 30_000_000}
    return Headline(point=point, accuracy=interval, **dict.fromkeys(names, interval), **about)


def test_a_stop_tells_all_of_its_policy():
    slider = slider_of(Findings(EXITS, front=FRONT))
    assert len(slider.stops) == 3 and slider.start == 2 and slider.chosen is None
    first, _, last = slider.stops
    assert first.accuracy == "70.00 % [69.00, 72.00]" and first.latency == "1.2 ms"
    assert first.cost == "12.00 M, 2.50× fewer than exit 2 alone"
    assert last.cost == "32.00 M, 1.07× more than exit 2 alone"
    assert (first.expected, last.expected) == ("71.00 % for 11.00 M", "unknown")
    assert first.thresholds == ["off", "0.2", "all others"]
    assert first.shares == ["0.0 %", "25.0 %", "75.0 %"] and first.widths == ["0.00%", "25.00%", "75.00%"]
    assert first.spoken == "12.00 M multiply-adds, 70.00 % top-1" and first.command == "deploy 0.2"


def test_places_are_in_proportion_to_cost_and_accuracy():
    slider = slider_of(Findings(EXITS, front=FRONT))
    first, middle, last = slider.stops
    assert (first.x, last.x) == (EDGE, WIDTH - EDGE) and (first.low, last.high) == (HEIGHT - EDGE, EDGE)
    assert (middle.x - first.x) / (last.x - first.x) == pytest.approx(6 / 20, abs=0.001)
    assert (first.low - middle.y) / (first.low - last.high) == pytest.approx(0.06 / 0.13, abs=0.001)
    assert slider.line.split()[1] == f"{middle.x},{middle.y}" and len(slider.band.split()) == 6
    assert (slider.cheapest, slider.dearest) == ("12.00 M", "32.00 M")
    assert (slider.lowest, slider.highest) == ("69.00 %", "82.00 %")


def test_the_chosen_policy_is_where_the_slider_starts_with_the_headlines_interval():
    signed = replace(FRONT[1].policy, model_hash="abc", accuracy=0.7)
    slider = slider_of(Findings(EXITS, front=FRONT, headline=headline_of(signed, 18e6)))
    assert (slider.start, slider.chosen) == (1, 1)
    assert slider.stops[1].accuracy == "75.00 % [70.00, 79.00]"
    assert [bool(stop.note) for stop in slider.stops] == [False, True, False]


def test_with_another_policy_chosen_the_slider_starts_at_the_nearest_in_cost():
    other = Policy((0.3, 0.4, EVERYBODY))
    slider = slider_of(Findings(EXITS, front=FRONT, headline=headline_of(other, 13e6)))
    assert (slider.start, slider.chosen) == (0, None) and not any(stop.note for stop in slider.stops)


def test_no_slider_over_less_than_two_policies_and_one_over_equal_ones():
    assert slider_of(Findings(EXITS)) is None and slider_of(Findings(EXITS, front=FRONT[:1])) is None
    same = replace(FRONT[0], accuracy=Estimate(1, 1, 1))
    assert {(stop.x, stop.y) for stop in slider_of(Findings(EXITS, front=[same, same])).stops} == {
        (EDGE, HEIGHT - EDGE)
    }


def test_texts_of_figures():
    assert (macs_text(1.5e6), macs_text(2e9)) == ("1.50 M", "2.00 G")
    policy = Policy((EVERYBODY, NOBODY, 0.999963, EVERYBODY))
    assert threshold_texts(policy) == ["everybody leaves", "nobody leaves", "0.999963", "all others"]
