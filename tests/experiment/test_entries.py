"""What is stored of an unfinished epoch is checked before anything goes on from it."""

import pytest
import torch

from experiment.entries import check_entries
from models.errors import UserError

METERS = {
    "sums": {"loss": torch.tensor(3.0), "acc1/exit": torch.ones(2)},
    "counts": {"loss": 4, "acc1/exit": 4},
}
SHARD = {"meters": METERS, "l2w": {"meters": METERS, "tables": {"losses": torch.ones(4, 2)}}}
PACE = {"world_size": 1, "images": 8, "at_start": 8}
PARTIAL = {
    "batch": 3,
    "micro_batch": 8,
    "step": 3,
    "seconds": 1.5,
    "figures": {},
    "grad_norm": torch.tensor(1.0),
    "processes": [SHARD, {"meters": METERS}],
}


def test_what_a_run_stores_is_accepted():
    for partial in (
        PARTIAL,
        {},
        {**PARTIAL, "processes": [], "figures": {"train/loss": 1.0}, "grad_norm": None},
    ):
        check_entries({"partial": partial, "pace": PACE}, "x.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"batch": -1},
        {"step": 1.5},
        {"micro_batch": 0},
        {"seconds": "long"},
        {"figures": {"train/loss": "low"}},
        {"grad_norm": torch.ones(2)},
        {"grad_norm": 1.0},
        {"processes": {}},
        {"processes": [3]},
        {"processes": [{"meters": {"sums": {"loss": 1.0}, "counts": {}}}]},
        {"processes": [{"meters": {"sums": {"loss": 1.0}, "counts": {"loss": 0.5}}}]},
        {"processes": [{"meters": {"sums": {"loss": []}, "counts": {"loss": 1}}}]},
        {"processes": [{**SHARD, "l2w": 3}]},
        {"processes": [{**SHARD, "l2w": {"meters": METERS, "tables": {"losses": torch.ones(4)}}}]},
    ],
)
def test_strange_unfinished_epochs_are_refused(change):
    for partial in ({**PARTIAL, **change}, [PARTIAL], {"batch": 3}):
        with pytest.raises(UserError, match="^checkpoint x.pth has partial .*; accepted: what is done of an"):
            check_entries({"partial": partial, "pace": PACE}, "x.pth")


def test_an_unfinished_epoch_needs_the_images_of_a_step():
    with pytest.raises(
        UserError, match="^checkpoint x.pth has pace None; accepted: that of its partial epoch$"
    ):
        check_entries({"partial": PARTIAL}, "x.pth")
