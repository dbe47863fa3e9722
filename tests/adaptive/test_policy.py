import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adaptive.confidence import CONFIDENCES, confidence_function
from adaptive.policy import Policy, content_hash, model_hash
from adaptive.thresholds import EVERYBODY, NOBODY

# Who leaves


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_simulation_and_stages_agree(kind):
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 4)
    policy = Policy.of([0.0, 0.0, 0.0], kind)
    scores = policy.reading.confidences(logits)
    policy = Policy(tuple(scores.quantile(0.6, dim=1).tolist()), kind)
    exits = policy.exit_of(scores)
    assert exits.unique().tolist() == [0, 1, 2]
    left = torch.stack([policy.decide(k, logits[k]).leaves for k in range(3)])
    assert left[2].all() and torch.equal(left.byte().argmax(0), exits)
    assert torch.equal(policy.exit_of(SimpleNamespace(confidence=scores)), exits)


def test_ties_at_a_threshold_leave_together():
    logits = torch.tensor([[2.0, 1.0], [0.5, 0.5], [2.0, 1.0], [1.0, 2.0]])
    policy = Policy.of([0.0, 0.0])
    tie = policy.reading.confidences(logits)[0].item()
    assert Policy((tie, 0.0)).decide(0, logits).leaves.tolist() == [True, False, True, True]
    above = torch.nextafter(torch.tensor(tie), torch.tensor(1.0)).item()
    assert not Policy((above, 0.0)).decide(0, logits).leaves.any()
    # A number between two of float32 is rounded the same way in a table as at a stage.
    for limit in (tie + 1e-9, tie - 1e-9):
        policy = Policy((limit, 0.0))
        exits = policy.exit_of(policy.reading.confidences(logits).expand(2, -1))
        assert torch.equal(exits == 0, policy.decide(0, logits).leaves)


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


def test_unknown_confidence_is_refused():
    with pytest.raises(ValueError, match="unknown confidence 'maxprob'"):
        Policy.of([0.5, 0.0], "maxprob")


# Files


class Network(nn.Module):
    num_exits = 3

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def made_for(network):
    return Policy(
        (0.1 + 0.2, NOBODY, EVERYBODY),
        "energy_logits:2",
        "p=1",
        temperatures=(1.0, 2.5, 0.5),
        off=(1,),
        accuracy=0.75,
        macs=12.5,
        shares=(0.5, 0.0, 0.5),
        model_hash=model_hash(network),
        calib_hash="abc",
    )


def test_a_policy_comes_back_from_its_file(tmp_path):
    policy = made_for(Network())
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    content = json.loads((tmp_path / "policy.json").read_text(), parse_constant=pytest.fail)
    assert content["schema"] == 2 and content["thresholds"] == [0.1 + 0.2, 1e8, -1e8]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"schema": 1, "thresh', "Unterminated string"),
        ("[1]", "no policy that can be read"),
        ('{"thresholds": [0.5, 0]}', "schema"),
        ('{"schema": 3, "thresholds": [0.5, 0], "shares": []}', "its schema is 3, accepted: 1, 2"),
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


def test_a_policy_of_the_first_schema_is_read(tmp_path):
    (tmp_path / "policy.json").write_text('{"schema": 1, "thresholds": [0.5, 0], "name": "p", "shares": []}')
    assert Policy.load(tmp_path / "policy.json") == Policy((0.5, 0), name="p")


def test_a_policy_knows_its_network():
    network = Network()
    policy, opened = made_for(network), SimpleNamespace(network=network)
    assert policy.check(opened) is policy
    with torch.no_grad():
        network.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"^policy 'p=1' is for weights \w{12}, the network has \w{12}$"):
        policy.check(opened)
    assert replace(policy, model_hash="").check(opened).name == "p=1"  # made by hand
    network.num_exits = 2
    with pytest.raises(ValueError, match=r"^policy 'p=1' is for 3 exits, the network has 2$"):
        policy.check(opened)


def test_a_hash_is_of_values_not_of_how_they_lie():
    network = Network()
    before = model_hash(network)
    assert len(before) == 64 and before == model_hash(network.to(memory_format=torch.channels_last))
    assert before != model_hash(network.to(torch.bfloat16))
    assert content_hash({"a": torch.zeros(2, 3)}) != content_hash({"a": torch.zeros(3, 2)})
    assert content_hash({"a": torch.tensor(True)}) != content_hash({"b": torch.tensor(True)})
