import os
import random
import resource
import signal
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from models.errors import UnknownOption, UserError
from utils import (
    WORKERS,
    Compute,
    Meters,
    Progress,
    Runtime,
    replacing,
    run_main,
    seed_everything,
    to_json,
    write_text,
    writing,
)

CPU = Compute(torch.device("cpu"))


# Meters


def test_meters_divide_sums_by_counts_once():
    meters = Meters()
    meters.add("loss", torch.tensor(6.0), 3)  # three samples of mean 2
    meters.add("loss", torch.tensor(10.0), 1)
    meters.add("acc", 1, 2)
    assert meters.means() == meters.means(CPU) == {"loss": 4.0, "acc": 0.5}


def test_empty_meters_have_no_means():
    assert Meters().means(CPU) == {}


def test_a_process_may_have_nothing_to_add(monkeypatch):
    meters = Meters.of([{"sums": {"loss": torch.tensor(6.0)}, "counts": {"loss": 3}}] * 2, CPU.device)
    monkeypatch.setattr("utils.gather", lambda pairs, _: [{}, pairs, {"loss": (8.0, 4)}])
    assert meters.means(CPU) == {"loss": 2.0}
    assert meters.state_dict() == {"sums": {"loss": torch.tensor(12.0)}, "counts": {"loss": 6}}


def test_meters_take_several_sums_at_once():
    meters = Meters()
    meters.add("acc/exit", torch.tensor([1, 3]), 4)
    meters.add("acc/exit", torch.tensor([1, 0]), 4)
    assert meters.means() == meters.means(CPU) == {"acc/exit0": 0.25, "acc/exit1": 0.375}


# Progress


def lines_of(capsys, items, total, note=None, **options):
    progress = Progress(items, "epoch 3", total, **options)
    seen = []
    for item in progress:
        seen.append(item)
        if note:
            progress.note(note)
    captured = capsys.readouterr()
    assert captured.err == ""
    return seen, captured.out.splitlines()


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    seen, lines = lines_of(capsys, [7, 8], 2, {"loss": 0.123456, "acc": 1.0}, shown=True, every=0.0)
    assert seen == [7, 8]
    noted = [f"epoch 3: {done}/2, 00:00 elapsed, 00:00 left, loss 0.1235 acc 1" for done in (1, 2)]
    assert lines == ["epoch 3: 0/2, 00:00 elapsed, ? left", *noted]


def test_progress_without_a_total_says_so(capsys):
    seen, lines = lines_of(capsys, iter("ab"), None, shown=True, every=0.0)
    counts = [line.split(",")[0] for line in lines]
    assert seen == ["a", "b"] and counts == [f"epoch 3: {done}/?" for done in (0, 1, 2)]


@pytest.mark.parametrize("options", [{"shown": False, "every": 0.0}, {"shown": True}])
def test_progress_is_silent_when_hidden_or_soon_done(capsys, options):
    assert lines_of(capsys, range(3), 3, {"loss": 1.0}, **options) == ([0, 1, 2], [])


def test_progress_shows_a_bar_with_notes_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress([1, 2], "epoch 3", 2, shown=True)
    for _ in progress:
        progress.note({"loss": 0.5})
        time.sleep(0.11)  # a bar is drawn ten times a second at most
    captured = capsys.readouterr()
    assert "epoch 3" in captured.err and "loss 0.5" in captured.err and captured.out == ""


# Seeds


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_repeat_and_differ_by_seed_epoch_and_process():
    seen = []
    for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_everything(*place)
        seen.append(draws())
        seed_everything(*place)
        assert draws() == seen[-1]
    for generator in zip(*seen, strict=True):
        assert len(set(generator)) == 4


# Devices


def test_only_maps_become_channels_last():
    compute = Compute(torch.device("cpu"), channels_last=True)
    assert compute.put(torch.zeros(2, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last)
    assert compute.put(torch.zeros(2, 3)).is_contiguous()


def test_a_loading_process_per_core_up_to_eight():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert Runtime().num_workers == WORKERS == min(cores, 8)


# How a script ends


@pytest.fixture
def ended(monkeypatch, capsys):
    """`ended(main)`: the exit code and the lines on stderr of a script that does not end by a traceback."""
    monkeypatch.delenv("DYNEXIT_TRACEBACK", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["script.py", "--lr", "x"])

    def run(main):
        with pytest.raises(SystemExit) as end:
            run_main(main)
        captured = capsys.readouterr()
        assert captured.out == ""
        return end.value.code, captured.err.splitlines()

    return run


def fails(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("kind", [UserError, UnknownOption])
def test_an_error_of_the_user_is_one_line(ended, kind):
    assert ended(fails(kind("bad words: --lr x"))) == (2, ["error: bad words: --lr x"])
    assert ended(fails(kind("bad words:\n--lr x"))) == (2, ["error: bad words: --lr x"])


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise UserError(f"cannot read image cat/{index}.png: truncated")


def test_an_error_from_a_loader_worker_is_its_last_line(ended):
    found = ended(lambda argv: list(DataLoader(Broken(), num_workers=1)))
    assert found == (2, ["error: cannot read image cat/0.png: truncated"])


def test_an_interrupt_is_one_line(ended):
    assert ended(fails(KeyboardInterrupt())) == (130, ["interrupted"])


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError, ImportError, KeyError])
def test_a_bug_keeps_its_traceback(monkeypatch, kind):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(kind, match="ours") as error:
        run_main(fails(kind("ours")))
    assert error.traceback[-1].name == "main"


def test_tracebacks_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setenv("DYNEXIT_TRACEBACK", "1")
    with pytest.raises(UserError, match="ours"):
        run_main(fails(UserError("ours")))


def test_the_first_of_several_processes_to_fail_speaks_for_all(ended, monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
    names = {"USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    words = {f"TORCHELASTIC_{name}": value for name, value in names.items()}
    for name, value in {**words, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert ended(fails(UserError("cannot read image 7"))) == (2, ["error: cannot read image 7"])
    monkeypatch.setenv("RANK", "0")
    for error in (UserError("cannot read image 7"), RuntimeError("connection closed by peer")):
        assert ended(fails(error)) == (2, [])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(fails(RuntimeError("a bug")))
    assert ended(fails(KeyboardInterrupt())) == (130, [])  # the launcher says it


# Files


@contextmanager
def full_after(size):
    """In the block, files cannot grow beyond `size` bytes: the system takes what fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_text_replaces_the_file_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", fail)
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with (
        pytest.raises(UserError, match=rf"^cannot write {path}: .*; [\d,.]+ MB are free there$"),
        full_after(100),
    ):
        write_text(path, "new" * 100)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/none/a.txt: No such file or directory$"):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_bugs_pass():
    for error in (RuntimeError("ours"), OSError("ours"), KeyError("ours")):
        with pytest.raises(type(error), match="ours"), writing(None):
            raise error


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".a.txt.tmp").write_text("half")
    with replacing(tmp_path / "a.txt") as temp:
        temp.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_has_null_where_a_number_is_not_finite():
    text = to_json(
        {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": {"d": np.float64("nan")}}
    )
    assert text == '{"a": null, "b": [null, [1.5, null]], "c": {"d": null}}'
    assert to_json([1, True, None, "NaN"], indent=0) == '[\n1,\ntrue,\nnull,\n"NaN"\n]'
