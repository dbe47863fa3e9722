"""Tables of settings say what differs by more than chance."""

import math

import pytest
from scipy.stats import ttest_ind

from experiment.comparison import Group, comparison, holm, significance, welch
from experiment.results import Point, Result


def test_chances_are_corrected_for_their_number():
    found = holm([0.03, 0.01, math.nan, 0.5])
    assert [found[i] for i in (1, 0, 3)] == pytest.approx([0.03, 0.06, 0.5]) and math.isnan(found[2])
    assert holm([0.4, 0.39]) == [0.78, 0.78]
    assert significance(0.5) == "0.5, not significant" and significance(0.01) == "0.01"
    values, others = [0.5, 0.6, 0.55], [0.7, 0.71]
    assert welch(values, others) == ttest_ind(values, others, equal_var=False).pvalue
    assert math.isnan(welch([0.5, 0.5], [0.7, 0.7]))
    assert math.isnan(welch(values, [0.7])) and math.isnan(welch(values, [0.7, math.nan]))


def result(*exits):
    points = tuple(Point(macs, accuracy, k) for k, (macs, accuracy) in enumerate(exits))
    return Result("a", "joint", "a setting", exits=points, front=(), record=None)


def test_a_group_is_tested_against_the_first_by_what_the_first_has():
    joint = Group("joint", [result((1e6, 0.5), (4e6, 0.7)), result((1e6, 0.51), (4e6, 0.72))])
    better = Group("better", [result((1e6, 0.8), (4e6, 0.9)), result((1e6, 0.81), (4e6, 0.91))])
    alone = Group("alone", [result((3e6, 0.6)), result((3e6, 0.62))])
    heads, rows = comparison([joint, better, alone])
    assert heads[:4] == ["", "last exit, %", "area, 1.00 to 4.00 M, %", "within 1.59 M, %"]
    assert heads[-1] == "p against joint: area" and rows[0][2] == "50.50 ± 0.71 (n = 2)"
    assert "not significant" not in rows[1][-1] and rows[2][2:4] == ["–", "–"] and rows[2][-1] == "–"
    heads, rows = comparison([alone, joint, better])
    assert heads[-1] == "p against alone: within 4.00 M" and rows[1][-1] != "–"
    heads, _ = comparison([alone])
    assert heads == ["", "last exit, %", "p against alone: last exit"]
