import json

import pytest
import torch
from torch import nn

from experiment import run as run_module
from experiment.run import Run, Saving
from models.errors import UserError


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
    score = (lambda figures: scores[figures["done"]]) if scores else (lambda figures: None)
    run = Run(
        {"model": layer, "counter": counter}, lambda: {"seen": counter.count}, folder, score=score, **options
    )

    def one_epoch(epoch):
        counter.count += 1
        return {"done": epoch}

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
        1,
        2,
        3,
    ]
    assert {p.name for p in tmp_path.glob("checkpoint-?.pth")} == {"checkpoint-3.pth"}


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


def test_an_epoch_is_saved_before_it_is_tested(tmp_path):
    run, counter, one_epoch = make(Saving(tmp_path), scores=[0.5, 0.75])

    def bad_image():
        raise UserError("cannot read image 7")

    with pytest.raises(UserError):
        run.fit(2, one_epoch, bad_image)
    log, last = tmp_path / "log.txt", tmp_path / "checkpoint-last.pth"
    assert len(log.read_text().splitlines()) == 1 and read(last)["epoch"] == 1
    told = []
    later, later_counter, later_epoch = make(Saving(tmp_path), scores=[0.5, 0.75], tell=told.append)
    later.resume(read(last), last)
    later.fit(2, later_epoch, lambda: {"test": 0.25})
    assert later_counter.count == 2  # it did not train again
    record = json.loads(log.read_text().splitlines()[1])
    assert told == [record] and record.pop("seconds") >= 0
    assert record == {"epoch": 2, "done": 1, "best": 0.75, "test": 0.25}
    again, _, same_epoch = make(Saving(tmp_path), tell=told.append)
    again.resume(read(last), last)
    again.fit(2, same_epoch, lambda: {"test": 0.25})
    assert len(told) == 1 and len(log.read_text().splitlines()) == 2


def test_a_line_that_a_killed_run_did_not_write_is_added(tmp_path, monkeypatch):
    run, _, one_epoch = make(Saving(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "append_json", kill)
        run.fit(3, one_epoch)
    elsewhere, _, _ = make(Saving(tmp_path / "elsewhere"))
    for later in (elsewhere, make(Saving(tmp_path))[0]):
        later.resume(read(tmp_path / "checkpoint-last.pth"), tmp_path / "checkpoint-last.pth")
    assert elsewhere.record == {} and later.first == 1
    later.fit(2, one_epoch)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def kill(*_):
    raise KeyboardInterrupt
