from dataclasses import replace

import pytest

from adaptive.goals import Goal, Menu, milliseconds
from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY

# Accuracy, multiply-adds, milliseconds.
SETTINGS = [(0.7, 10e6, 1.0), (0.8, 20e6, 3.0), (0.85, 30e6, 2.0), (0.85, 40e6, 4.0)]
POLICIES = [
    Policy((0.5, EVERYBODY), accuracy=accuracy, macs=macs, latency_ms=latency)
    for accuracy, macs, latency in SETTINGS
]
MENU = Menu(POLICIES, 0.85, "point")


@pytest.mark.parametrize(
    ("goal", "chosen"),
    [
        (Goal("budget", 20e6), 1),
        (Goal("budget", 100e6), 2),  # the cheaper one of two that are equally accurate
        (Goal("latency", 2.5), 2),
        (Goal("accuracy", 0.75), 1),
        (Goal("drop", 0.0), 2),
        (Goal("drop", 0.06), 1),
    ],
)
def test_the_best_policy_for_a_goal(goal, chosen):
    choice = MENU.choose(goal)
    assert choice.name == f"point {chosen}" and choice.policy is POLICIES[chosen]


def test_a_choice_says_why():
    judged = "; all 4 were judged on the calibration images"
    reasons = {
        Goal("budget", 20e6): "the most accurate of 2 settings within 20 M multiply-adds",
        Goal("latency", 3): "the most accurate of 3 settings within 3 ms",
        Goal("accuracy", 0.8): "the cheapest of 3 settings that reach 80.00 %",
        Goal("drop", 0): "the cheapest of 2 settings that reach 85.00 %, the last exit's accuracy",
        Goal(
            "drop", 0.05
        ): "the cheapest of 3 settings that reach 80.00 %, 5 points below the last exit's accuracy",
    }
    reasons |= {
        Goal("latency", 3, "p95"): "the most accurate of 3 settings within 3 ms (p95)",
        Goal(
            "drop", 1
        ): "the cheapest of 4 settings that reach 0.00 %, 100 points below the last exit's accuracy",
    }
    for goal, reason in reasons.items():
        assert MENU.choose(goal).reason == reason + judged


def test_without_a_policy_as_accurate_as_the_whole_network_the_most_accurate_is_taken():
    choice = replace(MENU, full=0.9).choose(Goal("drop", 0.01))
    assert choice.policy is POLICIES[2]
    assert choice.reason.startswith("the most accurate setting, since none reaches 89.00 %, 1 point below")


def test_half_an_image_of_accuracy_is_not_worth_a_higher_cost():
    flat = [replace(policy, accuracy=0.85 - 0.001 * i) for i, policy in enumerate(POLICIES[::-1])]
    assert Menu(flat, 0.9, images=1000).choose(Goal("drop", 0)).policy is flat[0]
    assert Menu(flat, 0.9, images=300).choose(Goal("drop", 0)).policy is flat[1]
    assert Menu(flat, 0.9, images=100).choose(Goal("drop", 0)).policy is flat[3]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal("budget", 9e6), "^a budget of 9e[+]06 multiply-adds is below the cheapest setting's 1e[+]07$"),
        (Goal("latency", 0.5), "^a latency of 0.5 ms is below the cheapest setting's 1$"),
        (Goal("accuracy", 0.99), "^an accuracy of 0.99 is above the best setting's 0.85$"),
    ],
)
def test_a_goal_that_nothing_meets_is_refused(goal, message):
    with pytest.raises(ValueError, match=message):
        MENU.choose(goal)


@pytest.mark.parametrize(
    ("text", "value"), [("5ms", 5), ("0.005s", 5), ("5", 5), ("250us", 0.25), ("1e-3 s", 1), (" 5 MS ", 5)]
)
def test_times_have_units(text, value):
    assert milliseconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "5 min", "-1ms", "0", "1e999s", "5ms5", "e", "--"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="^--latency .*: accepted: times above 0 such as 5ms"):
        milliseconds(text)
