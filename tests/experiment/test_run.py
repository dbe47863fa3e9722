import json

import pytest
import torch
from torch import nn

from experiment.run import Run, Saving


class Counter:
    """A part whose state is a number."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def make(folder, scores=None, **options):
    """A run with two parts, whose epochs score as `scores` say."""
    counter, layer = Counter(), nn.Linear(1, 1)
    score = (lambda figures: scores[figures["epoch"]]) if scores else (lambda figures: None)
    run = Run(
        {"model": layer, "counter": counter}, lambda: {"seen": counter.count}, folder, score=score, **options
    )

    def one_epoch(epoch):
        counter.count += 1
        return {"epoch": epoch}

    return run, counter, one_epoch


def read(path):
    return torch.load(path, weights_only=True)


def test_a_run_goes_on_where_it_was_left(tmp_path):
    run, counter, one_epoch = make(Saving(tmp_path, keep=1), scores=[0.5, 0.75, 0.25])
    run.fit(2, one_epoch)
    content = read(tmp_path / "checkpoint-last.pth")
    assert content["counter"] == {"count": 2} and content["seen"] == 2
    assert (content["epoch"], content["best"]) == (1, 0.75)
    later, later_counter, later_epoch = make(Saving(tmp_path, keep=1), scores=[0.5, 0.75, 0.25])
    assert later.resume(content, "x.pth") == [] and later_counter.count == 2 and later.first == 2
    assert torch.equal(later.parts["model"].weight, run.parts["model"].weight)
    later.fit(3, later_epoch)
    assert read(tmp_path / "checkpoint-best.pth")["epoch"] == 1  # the third was worse
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        0,
        1,
        2,
    ]
    assert {p.name for p in tmp_path.glob("checkpoint-?.pth")} == {"checkpoint-2.pth"}


def test_without_a_score_the_last_is_the_best(tmp_path, capsys):
    told = []
    run, _, one_epoch = make(Saving(tmp_path), tell=told.append)
    run.fit(2, one_epoch)
    assert read(tmp_path / "checkpoint-best.pth")["epoch"] == 1
    assert [record["best"] for record in told] == [-1.0, -1.0] and told[0]["seconds"] >= 0
    run.first = 2
    run.fit(2, one_epoch)
    assert capsys.readouterr().out == "all 2 epochs are done\n"


def test_parts_that_a_file_lacks_are_named_and_those_that_do_not_fit_refused():
    run, counter, _ = make(Saving(None))
    assert run.resume({"model": nn.Linear(1, 1).state_dict(), "epoch": 3}, "x.pth") == ["counter"]
    with pytest.raises(ValueError, match="^counter of checkpoint x.pth does not fit this run's: 'count'$"):
        run.resume({"counter": {"other": 1}, "epoch": 3}, "x.pth")
    with pytest.raises(ValueError, match="^model of checkpoint x.pth has|does not fit the model"):
        run.resume({"model": nn.Linear(2, 1).state_dict(), "epoch": 3}, "x.pth")


def test_only_the_main_process_saves(tmp_path):
    run, _, one_epoch = make(Saving(tmp_path / "out"), main_process=False)
    run.fit(1, one_epoch)
    assert not (tmp_path / "out").exists()
