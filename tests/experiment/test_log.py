import json
import resource

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from experiment.log import Logger, append_json, count_from_one, epoch_line, last_record
from models.errors import UserError


def test_append_json_adds_lines(tmp_path):
    for epoch in range(2):
        append_json(tmp_path / "log.txt", {"epoch": epoch, "name": "é"})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 0, "name": "é"}, {"epoch": 1, "name": "é"}]


def test_figures_that_are_not_finite_are_null_in_the_log(tmp_path):
    append_json(tmp_path / "log.txt", {"train/loss": float("nan"), "best": -1.0})
    assert (tmp_path / "log.txt").read_text() == '{"train/loss": null, "best": -1.0}\n'


@pytest.mark.parametrize("folder", [None, ""])
def test_a_logger_without_a_folder_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = Logger(folder, None, {})
    logger.add({"loss": 1.0}, 0)
    logger.add_histograms({"weights": torch.ones(3, 2)}, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_logger_keeps_scalars_and_a_histogram_per_exit(tmp_path):
    logger = Logger(str(tmp_path), None, {})
    logger.add({"loss": 0.5}, 3, "train/")
    logger.add_histograms({"weights": torch.ones(3, 2)}, 3, "l2w/")
    logger.writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(3, 0.5)]
    assert found.Tags()["histograms"] == ["l2w/weights/exit0", "l2w/weights/exit1"]


def hparams_of(board):
    """The flags in TensorBoard's table of runs."""
    metadata = board.summary_metadata["_hparams_/session_start_info"]
    content = HParamsPluginData.FromString(metadata.plugin_data.content)
    flags = content.session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in flags.items()}


def test_a_log_ends_with_flags_and_final_metrics(tmp_path):
    flags = {"lr": 0.1, "opt": "sgd", "decay_epochs": [2, 3], "with_kd": True, "clip_grad": None}
    logger = Logger(str(tmp_path), None, flags)
    logger.add({"calib/acc1/exit0": 0.25}, 3)
    logger.close({"calib/acc1/exit0": 0.5})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert hparams_of(found) == {"lr": 0.1, "opt": "sgd", "decay_epochs": "[2, 3]", "with_kd": True}
    assert [one.value for one in found.Scalars("final/calib/acc1/exit0")] == [0.5]
    assert [one.value for one in found.Scalars("calib/acc1/exit0")] == [0.25]
    Logger(None, None, flags).close({"best": 1.0})


def test_an_epoch_is_one_line():
    record = {
        "epoch": 2,
        "train/loss": 0.25,
        "calib/acc1/exit0": 0.5,
        "calib/acc1/exit1": 0.75,
        "seconds": 3.2,
    }
    assert epoch_line(record, 4) == "epoch 2/4: loss 0.2500, calib top-1 by exit 50.00 75.00 %, 3 s"
    without = {"epoch": 1, "train/loss": 1.0, "seconds": 0.0}
    assert epoch_line(without, 1) == "epoch 1/1: loss 1.0000, 0 s"


def test_a_line_left_unfinished_is_removed_before_the_next(tmp_path):
    path = tmp_path / "log.txt"
    append_json(path, {"epoch": 1})
    with open(path, "a") as file:
        file.write('{"epoch": 2, "train/lo')
    assert last_record(path) == {"epoch": 1}
    append_json(path, {"epoch": 2})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_full_disk_adds_nothing_to_the_log(tmp_path):
    path = tmp_path / "log.txt"
    append_json(path, {"epoch": 1})
    before, (soft, hard) = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))  # a part of the line fits
        with pytest.raises(UserError, match=rf"^cannot write {path}: .* MB are free there$"):
            append_json(path, {"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == before


def test_the_epochs_of_an_old_log_are_counted_from_one(tmp_path):
    path = tmp_path / "log.txt"
    count_from_one(path)
    assert not path.exists() and last_record(path) == {}
    for epoch in (0, 1):
        append_json(path, {"epoch": epoch, "train/loss": 0.5})
    for _ in range(2):
        count_from_one(path)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert records == [{"epoch": 1, "train/loss": 0.5}, {"epoch": 2, "train/loss": 0.5}]
