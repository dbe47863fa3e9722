import sys

from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY
from experiment.evaluation import command_of, without


def test_flags_are_left_out_with_their_values():
    words = ["eval_dynamic.py", "--drop", "0.1", "0.2", "--mode=all", "--router-threshold=0.5", "--row", "3"]
    assert without(words, ["drop", "router_threshold", "row"]) == ["eval_dynamic.py", "--mode=all"]
    assert without(words[:2], []) == words[:2]


def test_a_policy_of_the_front_is_asked_for_by_its_cost_read_as_before(monkeypatch):
    given = "eval_dynamic.py --temperature true --latency 5ms --harm 0.1 --guarantee crc --answer mean"
    monkeypatch.setattr(sys, "argv", given.split())
    command = command_of(Policy((0.5, EVERYBODY), macs=1234.5))
    assert command == "python eval_dynamic.py --temperature true --answer mean --budget 1235"
