"""The folder of a run: found or made, kept for one run alone."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from experiment import folder as folder_module
from experiment.folder import hold, release, run_folder
from experiment.recipe import Recipe
from models.errors import UserError
from utils import Compute

CPU = Compute(torch.device("cpu"))
WORDS = {"model": "boosted/msdnet", "data_set": "CIFAR10", "data_path": "my data"}


@pytest.fixture
def elsewhere():
    """`elsewhere(folder)`: the process ids of a run that holds a folder, and of a loader's process of it."""
    started = []

    def start(folder):
        here, there = os.pipe()
        run = os.fork()
        if run == 0:
            hold(folder)
            loader = os.fork()
            os.write(there, f"{loader}\n".encode() if loader else b"")
            time.sleep(60)
            os._exit(0)
        started.extend([run, int(os.read(here, 20))])
        return started[-2:]

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # killed by the test
            os.kill(process, signal.SIGKILL)


def test_a_second_run_is_refused_until_the_first_has_ended_however(tmp_path, elsewhere):
    run, _ = elsewhere(tmp_path / "out")
    with pytest.raises(
        UserError, match=rf"^--output_dir {tmp_path}/out: process {run} on \S+ trains into it; "
    ):
        hold(tmp_path / "out")
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    hold(tmp_path / "out")  # though the loader's process lives on
    release(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_a_folder_a_new_one_is_made_and_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, folders = Recipe.of(WORDS), []
    for _ in range(2):
        with run_folder(recipe, CPU) as found:
            folders.append(found.runtime.output_dir)
            said = f"no --output_dir is given: log and checkpoints go to {folders[-1]}\n"
            assert capsys.readouterr().out == said
            Path(folders[-1], "log.txt").touch()
    assert re.fullmatch(r"runs/boosted-msdnet-CIFAR10-\d{8}-\d{6}", folders[0]) and folders[0] != folders[1]
    with pytest.raises(UserError), run_folder(recipe, CPU) as found:
        raise UserError("a mistake")
    assert not Path(found.runtime.output_dir).exists()  # nothing came of it


def test_all_processes_take_the_folder_of_the_first_or_its_error(tmp_path, monkeypatch):
    compute = Compute(torch.device("cpu"), rank=1, world_size=2)
    for answer in ((tmp_path / "theirs", True), UserError("held")):
        monkeypatch.setattr(folder_module, "gather", lambda mine, compute, answer=answer: [answer, mine])
        if isinstance(answer, UserError):
            with pytest.raises(UserError, match="held"), run_folder(Recipe.of(WORDS), compute):
                pass
        else:
            with run_folder(Recipe.of(WORDS), compute) as found:
                assert found.runtime.output_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/file/out: Not a directory$"):
        hold(tmp_path / "file" / "out")
