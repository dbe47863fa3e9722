"""The guard of a refactor sees the same bits twice, and a changed one."""

import json
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def check(script):
    return script("check_identity")


def test_the_digest_sees_every_bit_and_no_order_of_keys(check):
    state = {"a": torch.arange(3.0), "b": [torch.ones(2, dtype=torch.bfloat16), None, 1]}
    assert check.digest_of(state) == check.digest_of(dict(reversed(state.items())))
    changed = [
        {**state, "a": torch.tensor([0, 1, 2.0000002])},
        {**state, "a": torch.arange(3)},
        {**state, "c": 1},
    ]
    assert len({check.digest_of(other) for other in [state, *changed]}) == 4


def test_needed_runs_come_first(check):
    assert check.chosen(["heads", "resumed"]) == ["plain", "heads", "unbroken", "resumed"]
    assert check.chosen([]) == list(check.RUNS)


def test_a_run_is_compared_with_an_earlier_one(check, tmp_path, capsys, monkeypatch, forked):
    def run(command, **_):  # without the seconds that a new process imports
        _, *words = command
        return CompletedProcess(words, *forked(*words))

    monkeypatch.setattr(check, "subprocess", SimpleNamespace(run=run))
    file = tmp_path / "before.json"
    assert check.main(["--only", "plain", "--save", str(file)]) == 0
    before = json.loads(file.read_text())
    assert before["plain"].keys() == {"loss", "log", "model", "model_ema", "optimizer"}
    found = dict(before["plain"])
    monkeypatch.setattr(check, "train", lambda root, name, folders: found)  # a second time the same
    assert check.main(["--only", "plain", "--against", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("yes")
    before["plain"]["model"] = "other"
    file.write_text(json.dumps(before))
    assert check.main(["--only", "plain", "--against", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("NO: model")


def test_mistakes_are_one_line(check, error_of):
    assert error_of(check.main, "--only", "plane").startswith("--only: 'plane' is not one of plain, kd, ")
    assert error_of(check.main, "--against", "nowhere.json") == "--against nowhere.json: no such file"


def test_a_run_that_fails_is_a_difference(check, tmp_path, capsys):
    (tmp_path / "main_earlyExit.py").write_text("raise SystemExit('no')")
    assert check.main(["--only", "plain", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("NO: ended with 1: no")
