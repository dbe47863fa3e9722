import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from experiment.log import Logger, append_json, epoch_line


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
        "epoch": 1,
        "train/loss": 0.25,
        "calib/acc1/exit0": 0.5,
        "calib/acc1/exit1": 0.75,
        "seconds": 3.2,
    }
    assert epoch_line(record, 4) == "epoch 2/4: loss 0.2500, calib top-1 by exit 50.00 75.00 %, 3 s"
    without = {"epoch": 0, "train/loss": 1.0, "seconds": 0.0}
    assert epoch_line(without, 1) == "epoch 1/1: loss 1.0000, calib top-1 by exit - %, 0 s"
