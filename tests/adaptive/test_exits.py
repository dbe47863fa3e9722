import pytest

from adaptive.exits import Exits
from adaptive.goals import Goal

ASSURED = {"drop": (0.01,), "confidence_level": 0.9}


def test_every_goal_counts_and_without_any_no_accuracy_is_to_be_lost():
    assert Exits().goals == [Goal("drop", 0.0)]
    assert Exits(row=(3,)).goals == Exits(shares=(0.5,)).goals == Exits(mapped_accuracy=(0.9,)).goals == []
    wanted = Exits(budget=(2e7, 3e7), latency=("5ms",), accuracy=(0.9,), drop=(0.01,), row=(3,))
    assert wanted.goals == [
        Goal("budget", 2e7),
        Goal("budget", 3e7),
        Goal("latency", 5.0),
        Goal("accuracy", 0.9),
        Goal("drop", 0.01),
    ]


def test_a_guarantee_is_asked_for_by_its_level_or_its_method():
    assert not Exits().assures
    assert Exits(drop=(0.01,), confidence_level=0.95).assures
    assert Exits(drop=(0.01,), guarantee="crc").assures
    assert Exits(disagreement=(0.02,), confidence_level=0.9).goals == [Goal("disagreement", 0.02)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"exit_error": (0.1,)}, "^--exit_error is met with a guarantee only: add --confidence_level 0.95$"),
        ({"disagreement": (0.1,)}, "^--disagreement is met with a guarantee only"),
        (
            {"latency": ("5ms",), "guarantee": "crc"},
            "^--latency cannot be guaranteed; accepted: --budget, --d",
        ),
        ({"accuracy": (0.9,), "confidence_level": 0.9}, "^--accuracy cannot be guaranteed"),
        (ASSURED | {"row": (3,)}, "^policies given by hand carry no guarantee; give goals: --drop 0.01$"),
        (ASSURED | {"temperature": True}, "^--temperature true is fitted on images that test a guarantee"),
        (ASSURED | {"calib": "train_augmented"}, "^--calib train_augmented: a guarantee needs images that"),
        (ASSURED | {"calib": "none"}, "^--calib none: a guarantee needs images that the network was not"),
        ({"policy": "p.json", "guarantee": "crc"}, "^--policy p.json and --guarantee: give one of them$"),
        ({"latency": ("junk",), "mode": "anytime"}, "^--latency junk: accepted: times above 0"),
        (
            {"drop": (0.0,), "confidence_level": 0.9},
            "^--drop 0 cannot be guaranteed; accepted: numbers above",
        ),
        ({"harm": (0.1, 1.0), "guarantee": "crc"}, "^--harm 1 cannot be guaranteed"),
        ({"exit_error": (0.1,), "guarantee": "crc"}, "^--guarantee crc cannot bound --exit_error"),
        ({"guarantee": "crc"}, "^--guarantee crc: give what to guarantee"),
        ({"policy": "p.json", "budget": (1e6,)}, "^--policy p.json and --budget: give one of them$"),
        ({"policy": "p.json", "guarantee": "crc"}, "^--policy p.json and --guarantee: give one of them$"),
        ({"policy": "p.json", "temperature": True}, "^--policy p.json and --temperature: give one of them$"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Exits(**flags)
