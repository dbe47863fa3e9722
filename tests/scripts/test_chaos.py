"""Runs that are broken go on as if they were not, and the bench sees those that do not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiment.checkpoint import save


@pytest.fixture(scope="module")
def runs(script):
    return script("chaos_runs")


def test_broken_runs_survive(forked):
    words = "--faults kill damage --trials 1 --regimes accumulation-2 --seed 1"
    code, text, error = forked("scripts/chaos.py", *words.split())
    assert (code, error) == (0, ""), text
    lines = text.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [[name, "1", "1"] for name in words.split()[1:3]]


def test_a_run_that_is_stopped_goes_on_exactly(forked):
    words = "--matrix true --regimes plain --workers 0 --processes 1 --stops middle"
    code, text, error = forked("scripts/chaos.py", *words.split())
    assert (code, error) == (0, ""), text
    assert text.splitlines()[1].split() == ["plain", "0", "1", "same"]


def a_run(runs, folder, **changes):
    """A run that has ended, with a checkpoint and a log."""
    folder.mkdir()
    record = {"epoch": 1, "seconds": len(folder.name)}
    state = {"model": {"w": torch.ones(2)}, "record": record, "partial": {}, "args": {"x": folder.name}}
    save(folder / "checkpoint-last.pth", state | changes)
    (folder / "log.txt").write_text(json.dumps(record) + "\n")
    return runs.Story(folder, [])


def test_what_two_runs_leave_is_compared_bit_by_bit(runs, tmp_path):
    one, other = a_run(runs, tmp_path / "a"), a_run(runs, tmp_path / "other")
    assert one.left() == other.left()
    changed = a_run(runs, tmp_path / "c", model={"w": torch.tensor([1, 1 + 2e-7])})
    assert changed.left()["log.txt"] == one.left()["log.txt"] and changed.left() != one.left()
    (other.folder / ".checkpoint-last.pth.tmp").touch()
    assert one.left() != other.left()


def test_steps_that_are_done_again_are_lost(runs, tmp_path):
    story = runs.Story(tmp_path / "run", [])
    for steps in ([1, 2, 3, 4], [], [3], [3, 4, 5, 6]):
        launch = runs.Launch(tmp_path, tmp_path / f"{len(story.launches)}", began=10.0)
        launch.log.write_text("".join(f"{10 + step} {step}\n" for step in steps))
        story.launches.append(launch)
    assert story.losses() == ([2], [5.0])


@pytest.mark.parametrize("seed", range(8))
def test_harm_changes_bytes(runs, tmp_path, seed):
    path, before = tmp_path / "x.pth", bytes(range(1, 256)) * 40
    path.write_bytes(before)
    runs.harm(path, np.random.default_rng(seed))
    assert path.read_bytes() != before and len(path.read_bytes()) <= len(before)


def test_faults_take_turns_until_time_is_up(script, monkeypatch, capsys):
    chaos, order = script("chaos"), []

    def fault(name, bench):
        order.append(name)
        return script("chaos_runs").Result("a-1: other bits" if order == ["b"] else "", [2, 0], [0.25])

    for name, count in (("a", 1), ("b", 3)):
        monkeypatch.setitem(chaos.FAULTS, name, (lambda bench, name=name: fault(name, bench), count, 0))
    flags = SimpleNamespace(faults=("b", "a"), trials=0, preset="full", seconds=60)
    results = chaos.survey(None, flags)
    assert order == ["b", "a", "b", "b"]
    chaos.show(results)
    failure, _, *rows = capsys.readouterr().out.splitlines()
    assert failure == "b: a-1: other bits"
    assert [row.split() for row in rows] == [
        ["b", "3", "2", "1.00", "2", "0.25"],
        ["a", "1", "1", "1.00", "2", "0.25"],
    ]
    flags.seconds = -1
    assert chaos.survey(None, flags) == {}
