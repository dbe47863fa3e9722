"""Files of features are whole, computed by one run at a time, and shared out evenly."""

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiment.feature_files import alone_in, mapped, share_of, write_table
from utils import Compute, UserError

COMPUTE = Compute(torch.device("cpu"))


def test_a_table_is_what_was_written(tmp_path):
    rows = np.arange(21, dtype=np.float32).reshape(7, 3)
    write_table(tmp_path / "a.npy", (7, 3), [rows[:4], rows[4:]], COMPUTE)
    assert (mapped(tmp_path / "a.npy", (7, 3)) == rows).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert mapped(tmp_path / "a.npy", (7, 4)) is None and mapped(tmp_path / "b.npy", (7, 3)) is None


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    def full():
        yield np.zeros((4, 3), np.float32)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write_table(tmp_path / "a.npy", (7, 3), full(), COMPUTE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, 2, 7])
def test_processes_have_one_row_after_another(count):
    shares = [share_of(count, replace(COMPUTE, rank=rank, world_size=3)) for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(count))


def hold(folder, held):
    with alone_in(folder, COMPUTE):
        held.set()
        time.sleep(0.2)
        (folder / "done").touch()


def test_another_run_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "features", held))
    other.start()
    held.wait()
    with alone_in(tmp_path / "features", COMPUTE):
        assert (tmp_path / "features" / "done").exists()
    other.join()
