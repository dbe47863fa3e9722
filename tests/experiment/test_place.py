"""Runs that a signal stops inside an epoch and that go on as if it had not."""

import os
import re
import shlex
import signal
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from engine import evaluate_all
from experiment.place import Place
from experiment.run import Run
from experiment.stopping import Stopped
from main_earlyExit import main as train

PLAIN = "--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0 "
DROPS = "--model rexnet_ee_lite_100 --input_ch 4 --final_ch 16 --head_width 8 --dropout_ratio 0.5 --drop_path 0.5 "
PARTS = (
    "model",
    "model_ema",
    "optimizer",
    "scaler",
    "l2w",
    "step",
    "epoch",
    "best",
    "partial",
    "calib_indices",
)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A process that stopped ignores signals; this one goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def assert_same(parts, whole, read_log):
    """Two runs ended the same, bit by bit, and logged the same."""
    contents = [torch.load(out / "checkpoint-last.pth", weights_only=True) for out in (parts, whole)]
    groups = [content["optimizer"].pop("param_groups") for content in contents]
    assert groups[0] == groups[1]
    for key in PARTS:
        torch.testing.assert_close(*(content.get(key) for content in contents), rtol=0, atol=0, msg=key)
    lines = [[{**line, "seconds": 0} for line in read_log(out)] for out in (parts, whole)]
    assert lines[0] == lines[1] and len(lines[0]) == 2


def stop_at(patch, epoch, batch, number=signal.SIGTERM):
    """This process gets a signal when an epoch's batch is done, or as soon as it is evaluated ("calib")."""
    after_batch, answered = Place.after_batch, []

    def stopping(place, check):
        if (place.epoch.number, place.epoch.batch) == (epoch, batch):
            answered.append(os.kill(os.getpid(), number))
        after_batch(place, check)

    patch.setattr(Place, "after_batch", stopping)
    if batch == "calib":

        def evaluate(networks, loader, compute, *, title):
            if epoch == 0:
                os.kill(os.getpid(), number)
            return evaluate_all(networks, loader, compute, title=title)

        patch.setattr("experiment.judge.evaluate_all", evaluate)


def run_in_parts(words, stops, monkeypatch, capsys):
    """Trains, stopped as often as there are `stops`, each time by another process's state; returns the lines."""
    lines = []
    for epoch, batch in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, epoch, batch)
            with pytest.raises(Stopped) as stopped:
                train(words)
        assert stopped.value.code == 75
        lines += [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped by")]
        torch.rand(7)
    train(words)
    return lines


@pytest.mark.parametrize(
    ("words", "stops"),
    [
        # Of 4 batches. The draws of dropout, drop path, mixing and augmentation go on too.
        (
            DROPS + "--model_ema true --model_ema_decay 0.5 --batch_size 8 --num_workers 1",
            [(0, "calib"), (1, 3)],
        ),
        (
            PLAIN
            + "--update_freq 4 --drop_last false --batch_size 6 --use_amp true --opt adamw --schedule linear",
            [(0, 2), (1, 5)],  # within a step: it is done first; the epoch's last one has 2 micro-batches
        ),
        (
            PLAIN + "--l2w true --meta_net_hidden_size 8 --meta_interval 3 --l2w_tables 2 --print_freq 3 "
            "--device_data true --flip alternating --low_size 20 --low_share 0.5 --epoch_images 30",
            [(0, 2), (1, 6)],
        ),
        (PLAIN + "--regime disjoint --with_kd true --disable_eval true --low_size 16", [(0, 3), (1, 8)]),
        (PLAIN + "--opt muon --batch_size 16", [(0, 1)]),
        (PLAIN + "--regime equilibrium --opt lookahead_sgd --schedule constant --clip_grad 1", [(1, 4)]),
    ],
)
def test_a_run_stopped_at_any_step_ends_as_an_unbroken_one(
    tmp_path, monkeypatch, capsys, on, read_log, words, stops
):
    flags = shlex.split(f"--epochs 2 --warmup_epochs 1 --lr 0.01 --print_freq 2 {words}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on = partial(on, network=[]) if "--model " in words else on
    train(on(*flags, "--output_dir", whole))
    lines = run_in_parts(on(*flags, "--output_dir", parts), stops, monkeypatch, capsys)
    assert_same(parts, whole, read_log)
    assert all(line.endswith(f"saved in {parts}: the same command goes on from there") for line in lines)
    numbers = [list(map(int, re.findall(r"epoch (\d) after batch (\d)", line)[0])) for line in lines]
    assert len(lines) == len(stops) and numbers == sorted(numbers)
    for file in whole.glob("*.npz"):  # every sample's weights and losses
        tables = [np.load(out / file.name) for out in (whole, parts)]
        assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0])


@pytest.mark.parametrize(("number", "end"), [(signal.SIGUSR1, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_before_training_ends_the_run_at_once(tmp_path, monkeypatch, capsys, on, number, end):
    monkeypatch.setattr(Place, "move", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(end) as stopped:
        train(on("--epochs", 1, "--output_dir", tmp_path, "--requeue_code", 9))
    said = "stopped by SIGUSR1 before training: the same command starts again" in capsys.readouterr().out
    assert said == (end is Stopped) and (end is KeyboardInterrupt or stopped.value.code == 9)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, on):
    def twice(place, check):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Place, "after_batch", twice)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(on("--epochs", 1, "--output_dir", tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path / "checkpoint-last.pth").exists()


def test_steps_and_minutes_between_saves(tmp_path, monkeypatch, on):
    saved = []
    monkeypatch.setattr(Run, "save_within", lambda run, epoch, partial: saved.append(partial["batch"]))
    train(on("--epochs", 1, "--update_freq", 2, "--save_every_steps", 2, "--output_dir", tmp_path / "a"))
    assert saved == [4, 8]
    saved.clear()
    train(on("--epochs", 1, "--save_every_minutes", 1e-9, "--output_dir", tmp_path / "b"))
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]


def test_nothing_is_saved_where_checkpoints_are_not_wanted(tmp_path, monkeypatch, capsys, on):
    stop_at(monkeypatch, 0, 3)
    with pytest.raises(Stopped):
        train(on("--epochs", 1, "--save_ckpt", "false", "--requeue_code", 3, "--output_dir", tmp_path))
    assert "after batch 3 of 8; checkpoints are not written (--save_ckpt false)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def worker(words, epoch, batch):
    """One of two processes; the second gets a signal, and both stop after the next step."""
    with pytest.MonkeyPatch.context() as patch:
        if batch and dist_rank() == 1:
            stop_at(patch, epoch, batch, signal.SIGUSR1)
        ends = (Stopped, RuntimeError) if batch == "calib" else Stopped  # one loses the other
        with pytest.raises(ends) if batch else nullcontext():
            train(words)


def dist_rank():
    return int(os.environ["RANK"])


@pytest.mark.parametrize(
    "words",
    [
        PLAIN + "--update_freq 2 --drop_last false",
        PLAIN + "--l2w true --meta_net_hidden_size 8 --device_data true --low_size 20",
    ],
)
def test_two_processes_stop_at_the_same_step_and_go_on(tmp_path, capfd, on, read_log, in_processes, words):
    flags = shlex.split(f"--epochs 2 --lr 0.01 --num_calib 8 --save_ckpt_num 0 {words}")
    whole, parts = (on(*flags, "--output_dir", tmp_path / name) for name in ("whole", "parts"))
    in_processes(2, worker, whole, 0, 0)
    in_processes(2, worker, parts, 1, 2)
    in_processes(2, worker, parts, 0, 0)
    assert_same(tmp_path / "parts", tmp_path / "whole", read_log)
    assert capfd.readouterr().out.count("stopped by a signal in epoch") == 1


def test_a_signal_to_one_process_in_an_evaluation_loses_no_training(
    tmp_path, capfd, on, read_log, last_of, in_processes
):
    flags = on(*shlex.split(f"--epochs 1 --lr 0.01 --save_ckpt_num 0 --output_dir {tmp_path} {PLAIN}"))
    in_processes(2, worker, flags, 0, "calib")
    state = last_of(tmp_path)
    assert state["epoch"] == -1 and state["partial"]["figures"]["train/loss"] > 0
    in_processes(2, worker, flags, 0, 0)
    (line,) = read_log(tmp_path)
    assert line.items() >= state["partial"]["figures"].items() and "calib/acc1/exit0" in line
    torch.testing.assert_close(last_of(tmp_path)["model"], state["model"], rtol=0, atol=0)


def test_another_number_of_processes_keeps_the_images_per_step(tmp_path, capfd, on, read_log, in_processes):
    flags = on(*shlex.split(f"--epochs 2 --global_batch 8 --output_dir {tmp_path} {PLAIN}"))
    in_processes(2, worker, flags, 0, 1)
    state = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert state["partial"]["batch"] == 2 and state["step"] == 2 and state["args"]["update_freq"] == 1
    train(flags)
    state = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert state["step"] == 2 * 4 and state["args"]["update_freq"] == 2
    assert state["pace"] == {"world_size": 2, "images": 8, "at_start": 8}
