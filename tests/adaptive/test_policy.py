import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adaptive.confidence import CONFIDENCES, confidence_function
from adaptive.policy import Exits, Policy, Rule, choose, content_hash, model_hash, policies_of, rules_of
from adaptive.thresholds import EVERYBODY, NOBODY, quota_thresholds

COSTS = [10, 40]


def tables(right):
    confidence = torch.linspace(0.1, 1, 10).repeat(2, 1)
    return SimpleNamespace(confidence=confidence, correct=torch.tensor([[False] * 4 + [True] * 6, right]))


CALIB = tables([True] * 10)


def sweep(confidence="max_prob", **exits):
    return policies_of(rules_of(Exits(**exits), COSTS), CALIB, COSTS, confidence)


def chosen(**exits):
    """The policies that are chosen on calib."""
    policies = sweep(**{name: value for name, value in exits.items() if name not in ("budget", "accuracy")})
    return choice_of(policies, **exits).rows, policies


def choice_of(policies, **exits):
    return choose(policies, Exits(**exits), CALIB.correct[-1].double().mean().item())


# Sweeps and choices


def test_points_given_by_hand_follow_the_sweep_and_are_used():
    rows, policies = chosen(shares=(0.7,), router_threshold=(0.55,))
    assert [policy.name for policy in policies[39:]] == ["shares 0.7", "threshold 0.55"]
    points = [policy.simulate(CALIB, COSTS) for policy in policies]
    assert [point.shares for point in points[39:]] == [pytest.approx([0.7, 0.3]), pytest.approx([0.5, 0.5])]
    assert points[-1].macs == pytest.approx(0.5 * 10 + 0.5 * 40) and policies[-1].confidence == "max_prob"
    assert rows == [39, 40]


def test_a_row_is_chosen_by_budget_or_accuracy():
    (cheap,), policies = chosen(budget=20)
    assert policies[cheap].macs <= 20
    (even,), _ = chosen()  # as good as the last exit, for least
    assert policies[even].accuracy == 1 and policies[even].macs < 40
    (modest,), _ = chosen(accuracy=0.8)
    assert policies[modest].accuracy >= 0.8 and policies[modest].macs < policies[even].macs
    assert chosen(row=(3,), budget=1)[0] == [3]


def test_a_choice_says_why():
    policies = sweep()
    judged = "; all 39 were judged on the calibration images"
    within = sum(policy.macs <= 20 for policy in policies)
    reason = choice_of(policies, budget=20).reason
    assert reason == f"the most accurate of {within} settings within 2e-05 M multiply-adds{judged}"
    reaching = sum(policy.accuracy >= 0.8 for policy in policies)
    reason = choice_of(policies, accuracy=0.8).reason
    assert reason == f"the cheapest of {reaching} settings that reach 80.00 %{judged}"
    assert "settings that reach 100.00 %, the last exit's accuracy; all" in choice_of(policies).reason
    nothing = choose(policies[:2], Exits(), 1.01).reason
    assert nothing.startswith("the most accurate setting, since none reaches 101.00 %, the last exit's")
    assert choice_of(policies, row=(3,)).reason == "given by hand"
    assert choice_of(policies, row=(3, 1)).reason == "given by hand, the first of these"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.5, 0.5)}, "shares .* for 2 exits; give one per exit but the last"),
        ({"router_threshold": (), "shares": (1.2,)}, "at most 1 in all"),
        ({"router_threshold": (1.0, 2.0)}, "2 router thresholds for 2 exits"),
        ({"row": (39,)}, "--row 39, but msdnet has rows 0 to 38"),
        ({"router_threshold": (1.5,)}, "threshold 1.5 of max_prob: accepted: from 0 to 1; 1e8: nobody"),
        ({"budget": 9}, "a budget of 9 multiply-adds is below the cheapest setting's 10"),
    ],
)
def test_numbers_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rules_of(Exits(**options), COSTS)


def test_every_row_of_a_sweep_with_equal_names_is_kept():
    policies = sweep(quota_sweep="dyn_perceiver")
    assert len(policies) == 33 and [policy.name for policy in policies[16:18]] == ["dyn_perceiver p=1"] * 2


def test_sweep_chooses_on_calib_and_judges_on_test():
    calib = SimpleNamespace(
        confidence=torch.tensor([[0.75, 0.5], [0.0, 0.0]]),
        correct=torch.tensor([[True, False], [True, True]]),
    )
    test = SimpleNamespace(
        confidence=torch.tensor([[0.875, 0.75, 0.5, 0.25], [0.0] * 4]),
        correct=torch.tensor([[True, False, False, False], [True, True, False, True]]),
    )
    rules = [
        Rule(
            "", lambda confidence, share=share: quota_thresholds(confidence, torch.tensor([share, 1 - share]))
        )
        for share in (0.5, 0.0)
    ]
    half, nobody = policies_of(rules, calib, [10, 30], "max_prob")
    assert half.thresholds == (0.75, EVERYBODY)
    assert (half.accuracy, half.macs, half.shares) == (1.0, 20, (0.5, 0.5))
    point = half.simulate(test, [10, 30])
    assert (point.accuracy, point.macs, point.shares) == (0.5, 20, [0.5, 0.5]) and point.policy is half
    assert nobody.thresholds == (NOBODY, EVERYBODY)
    point = nobody.simulate(test, [10, 30])
    assert (point.accuracy, point.macs, nobody.accuracy) == (0.75, 30, 1.0)


# Who leaves


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_simulation_and_stages_agree(kind):
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 4)
    policy = Policy.of([0.0, 0.0, 0.0], kind)
    scores = policy.scores(logits)
    policy = Policy(tuple(scores.quantile(0.6, dim=1).tolist()), kind)
    exits = policy.exit_of(scores)
    assert exits.unique().tolist() == [0, 1, 2]
    left = torch.stack([policy.leaves(k, logits[k]) for k in range(3)])
    assert left[2].all() and torch.equal(left.byte().argmax(0), exits)
    assert torch.equal(policy.exit_of(SimpleNamespace(confidence=scores)), exits)


def test_ties_at_a_threshold_leave_together():
    logits = torch.tensor([[2.0, 1.0], [0.5, 0.5], [2.0, 1.0], [1.0, 2.0]])
    policy = Policy.of([0.0, 0.0])
    tie = policy.scores(logits)[0].item()
    assert Policy((tie, 0.0)).leaves(0, logits).tolist() == [True, False, True, True]
    above = torch.nextafter(torch.tensor(tie), torch.tensor(1.0)).item()
    assert not Policy((above, 0.0)).leaves(0, logits).any()
    # A number between two of float32 is rounded the same way in a table as at a stage.
    for limit in (tie + 1e-9, tie - 1e-9):
        policy = Policy((limit, 0.0))
        exits = policy.exit_of(policy.scores(logits).expand(2, -1))
        assert torch.equal(exits == 0, policy.leaves(0, logits))


def test_plain_thresholds_become_a_policy():
    policy = Policy.of(torch.tensor([0.25, EVERYBODY]), "margin")
    assert policy == Policy((0.25, EVERYBODY), "margin") and Policy.of(policy, "entropy") is policy


@pytest.mark.parametrize(
    ("kind", "value", "accepted"),
    [
        ("max_prob", 1.5, "from 0 to 1"),
        ("max_prob", -0.5, "from 0 to 1"),
        ("margin", float("nan"), "from 0 to 1"),
        ("entropy", 0.5, "to 0"),
        ("entropy", -float("inf"), "to 0"),
        ("energy_softmax:2", -1, "from 0"),
        ("energy_logits", float("inf"), "finite numbers"),
    ],
)
def test_thresholds_that_a_confidence_never_has_are_refused(kind, value, accepted):
    line = f"threshold {value:g} of {kind}: accepted: {accepted}; 1e8: nobody leaves, -1e8: everybody"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        Policy.of([value, EVERYBODY], kind)


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_thresholds_for_everybody_and_nobody_and_what_rounding_adds_are_accepted(kind):
    assert Policy.of(torch.tensor([NOBODY, EVERYBODY]), kind).thresholds == (NOBODY, EVERYBODY)
    surest = confidence_function(kind)(torch.tensor([1000.0, 0.0])).item()
    assert Policy((surest + 1e-7, 0.0), kind).confidence == kind


def test_there_is_a_threshold_per_exit():
    with pytest.raises(ValueError, match="give a number per exit"):
        Policy.of([])


def test_an_accuracy_that_no_setting_reaches_is_refused():
    poor = tables([False] * 5 + [True] * 5)
    policies = policies_of(rules_of(Exits(), COSTS), poor, COSTS, "max_prob")
    best = max(policy.accuracy for policy in policies)
    with pytest.raises(ValueError, match=rf"^an accuracy of 0.99 is above the best setting's {best:.4g}$"):
        choose(policies, Exits(accuracy=0.99), 0.5)
    (nearest,) = choose(policies, Exits(), 0.99).rows  # nobody asked for an accuracy
    assert policies[nearest].accuracy == best


def test_a_budget_and_an_accuracy_are_not_both_wanted():
    with pytest.raises(ValueError, match=r"^--budget 2e\+07 and --accuracy 0.9: give one of them"):
        Exits(budget=2e7, accuracy=0.9)


def test_unknown_confidence_is_refused():
    with pytest.raises(ValueError, match="unknown confidence 'maxprob'"):
        Policy.of([0.5, 0.0], "maxprob")


# Files


class Network(nn.Module):
    num_exits = 2

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def made_for(network):
    return Policy(
        (0.1 + 0.2, EVERYBODY),
        "energy_logits:2",
        "p=1",
        0.75,
        12.5,
        (0.5, 0.5),
        model_hash(network),
        "abc",
    )


def test_a_policy_comes_back_from_its_file(tmp_path):
    policy = made_for(Network())
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    content = json.loads((tmp_path / "policy.json").read_text(), parse_constant=pytest.fail)
    assert content["schema"] == 1 and content["thresholds"] == [0.1 + 0.2, -1e8]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"schema": 1, "thresh', "Unterminated string"),
        ("[1]", "no policy that can be read"),
        ('{"thresholds": [0.5, 0]}', "schema"),
        ('{"schema": 2, "thresholds": [0.5, 0], "shares": []}', "its schema is 2, accepted: 1"),
        ('{"schema": 1, "thresholds": ["a", 0], "shares": []}', "no policy that can be read"),
        ('{"schema": 1, "thresholds": [0.5, 0], "shares": [], "other": 1}', "other"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text, reason):
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        Policy.load(tmp_path / "policy.json")
    assert str(error.value).startswith(f"{tmp_path / 'policy.json'} is no policy that can be read: ")
    assert "\n" not in str(error.value)


def test_a_policy_knows_its_network():
    network = Network()
    policy, opened = made_for(network), SimpleNamespace(network=network)
    assert policy.check(opened) is policy
    with torch.no_grad():
        network.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"^policy 'p=1' is for weights \w{12}, the network has \w{12}$"):
        policy.check(opened)
    assert replace(policy, model_hash="").check(opened).name == "p=1"  # made by hand
    network.num_exits = 3
    with pytest.raises(ValueError, match=r"^policy 'p=1' is for 2 exits, the network has 3$"):
        policy.check(opened)


def test_a_hash_is_of_values_not_of_how_they_lie():
    network = Network()
    before = model_hash(network)
    assert len(before) == 64 and before == model_hash(network.to(memory_format=torch.channels_last))
    assert before != model_hash(network.to(torch.bfloat16))
    assert content_hash({"a": torch.zeros(2, 3)}) != content_hash({"a": torch.zeros(3, 2)})
    assert content_hash({"a": torch.tensor(True)}) != content_hash({"b": torch.tensor(True)})
