"""Training by the command line: logs, checkpoints, resuming, processes."""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import eval_dynamic
import main_earlyExit
from models import create_model

pytestmark = pytest.mark.usefixtures("costs_once")
ROOT = Path(__file__).resolve().parents[1]
train = main_earlyExit.main
PLAIN = shlex.split("--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0")
RUN = shlex.split("--num_workers 0 --device cpu")
AVERAGED = shlex.split(
    "--epochs 2 --warmup_epochs 0 --model_ema true --model_ema_decay 0.5 --model_ema_eval true --lr 0.01"
)


def test_log_has_a_line_per_epoch(trained, read_log):
    first, last = read_log(trained)
    assert (first["epoch"], last["epoch"]) == (1, 2)
    exits = [f"acc1/exit{k}" for k in range(2)]
    wanted = {
        "train/loss",
        "opt/lr",
        *(f"{part}/{key}" for part in ("train", "calib", "calib_ema") for key in exits),
    }
    assert wanted <= first.keys() and wanted <= last.keys()
    assert not any(key.startswith("test") for key in first)
    assert {f"{part}/{key}" for part in ("test", "test_ema") for key in exits} <= last.keys()
    assert first["opt/lr"] > last["opt/lr"] == pytest.approx(1e-6)
    score = [sum(line[f"calib_ema/{key}"] for key in exits) / 2 for line in (first, last)]
    assert [first["best"], last["best"]] == pytest.approx([score[0], max(score)])


def test_checkpoint_is_plain_and_complete(trained, images):
    assert {path.name for path in trained.glob("*.pth")} == {
        f"checkpoint-{name}.pth" for name in ("last", "best", "1", "2")
    }
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert {
        "model",
        "model_ema",
        "arch",
        "optimizer",
        "scaler",
        "epoch",
        "args",
        "calib_indices",
    } <= content.keys()
    options = {"nBlocks": 2, "nChannels": 8, "growthRate": 4, "grFactor": [1, 2], "bnFactor": [1, 2]}
    assert content["arch"] == {"name": "msdnet", "options": options, "num_classes": 2}
    assert (content["epoch"], content["step"], len(set(content["calib_indices"]))) == (1, 16, 8)
    assert content["args"]["data_path"] == str(images) and content["args"]["mean"] == [0.485, 0.456, 0.406]
    network = create_model("msdnet", 2, **options)
    network.load_state_dict(content["model"])
    network.load_state_dict(content["model_ema"])


def test_other_flags_of_training_run(trained, tmp_path, capsys, on, read_log):
    flags = (
        "--epochs 1 --update_freq 2 --clip_grad 1 --with_kd true --exit_weights 0.5 1 --use_amp true "
        "--channels_last true --disable_eval true --opt sgd --warmup_steps 2 --save_ckpt_num 0 --print_freq 2"
    )
    finetune = ["--finetune", trained / "checkpoint-last.pth"]
    train(on(*flags.split(), *finetune, "--output_dir", tmp_path))
    assert re.search(r"entries kept; initialised anew: nothing\n", capsys.readouterr().out)
    (line,) = read_log(tmp_path)
    assert line["opt/grad_norm"] > 0 and line["train/loss"] > 0
    assert not any(key.startswith(("calib", "train/acc1")) for key in line)  # no evaluation; mixup is on
    # With nothing to judge by, the last is the best.
    assert {path.name for path in tmp_path.glob("*.pth")} == {"checkpoint-best.pth", "checkpoint-last.pth"}


def test_a_run_resumed_with_other_rates_says_what_changes(trained, tmp_path, capsys, on, read_log):
    flags = "--epochs 3 --schedule constant --model_ema true --lr 0.02 --batch_size 8 --scale_lr true"
    file, flags = trained / "checkpoint-last.pth", [*flags.split(), *PLAIN, "--print_freq", 2]
    capsys.readouterr()
    train(on("--resume", file, *flags, "--output_dir", tmp_path, "--log_dir", tmp_path / "board"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other than in")]
    assert line.startswith(f"other than in {file}: --epochs 3 instead of 2, --lr 0.02 instead of 0.01, ")
    assert line.endswith(", 8 images per step instead of 4, --scale_lr true multiplies learning rates by 2")
    assert read_log(tmp_path)[-1]["opt/lr"] == 0.04
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert content["pace"] == {"world_size": 1, "images": 8, "at_start": 4} and content["args"]["lr"] == 0.02
    check_board(tmp_path, read_log(tmp_path)[-1])


def check_board(out, line):
    """The event file holds what one epoch of four steps, reported every two, should leave there."""
    board = EventAccumulator(str(out / "board")).Reload()
    scalars = {tag: [(one.step, one.value) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    steps = [10, 12, 12]  # of other size than those before; the last report is of the whole epoch
    for name in ("loss", "loss/exit0", "loss/exit1", "acc1/exit0", "images_per_s", "opt/lr", "opt/grad_norm"):
        assert [step for step, _ in scalars[f"train/{name}"]] == steps, name
        assert all(value > 0 for _, value in scalars[f"train/{name}"])
    for name, key in (("train/loss/exit1", "train/loss/exit1"), ("train/opt/grad_norm", "opt/grad_norm")):
        assert scalars[name][-1][1] == pytest.approx(line[key])
    assert line["train/loss"] == pytest.approx(line["train/loss/exit0"] + line["train/loss/exit1"])
    assert scalars["calib/acc1/exit0"] == [(12, pytest.approx(line["calib/acc1/exit0"]))]
    assert scalars["final/test/acc1/exit1"][0][1] == pytest.approx(line["test/acc1/exit1"])
    flags = HParamsPluginData.FromString(
        board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert flags["lr"].number_value == 0.02 and flags["nBlocks"].number_value == 2


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_exactly(trained, images, tmp_path, on, capsys):
    out = shutil.copytree(trained, tmp_path / "out")  # also what were two names of one file
    last, whole = out / "checkpoint-last.pth", torch.load(trained / "checkpoint-last.pth", weights_only=True)
    for path in out.glob("*.pth"):
        if torch.load(path, weights_only=True)["epoch"] == whole["epoch"] and path != last:
            path.unlink()
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 16
    last.write_bytes(data)
    evaluation = ["--data_path", str(images), "--mode", "anytime", *RUN]
    train(["--eval", "true", "--output_dir", str(out), *evaluation])
    complaint = rf"^{last} is truncated or not a checkpoint: .*; going on from the newest intact one .*$"
    assert len(re.findall(complaint, capsys.readouterr().out, re.MULTILINE)) == 1
    train(on(*AVERAGED, *PLAIN, "--output_dir", out))
    printed = capsys.readouterr().out
    assert len(re.findall(complaint, printed, re.MULTILINE)) == 1 and printed.count("epoch 2/2") == 1
    found = torch.load(last, weights_only=True)
    for key in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(found[key], whole[key], rtol=0, atol=0)
    assert all(found[key] == whole[key] for key in ("epoch", "step", "best", "scaler", "calib_indices"))


def test_an_optimizer_state_of_other_shapes_ends_a_run_with_one_line(trained, tmp_path, error_of, on):
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(content, tmp_path / "x.pth")
    line = error_of(train, *on("--resume", tmp_path / "x.pth", "--epochs", 3))
    assert line.startswith(
        f"optimizer of checkpoint {tmp_path}/x.pth does not fit this run's: exp_avg has the shape [3]"
    )


def test_a_bad_test_image_costs_no_training(images, tmp_path, error_of, on, read_log):
    shutil.copytree(images, tmp_path / "data")
    bad = tmp_path / "data" / "val" / "lit" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    words = on("--epochs", 2, "--warmup_epochs", 0, "--output_dir", tmp_path / "out", data=tmp_path / "data")
    assert error_of(train, *words).startswith(f"cannot read image {bad}: ")
    assert [line["epoch"] for line in read_log(tmp_path / "out")] == [1]
    before = torch.load(tmp_path / "out" / "checkpoint-last.pth", weights_only=True)
    assert before["epoch"] == 1
    bad.write_bytes(good)
    train(words)  # tests, and does not train
    train([*words, "--output_dir", str(tmp_path / "whole")])
    lines = [[{**line, "seconds": 0} for line in read_log(tmp_path / name)] for name in ("out", "whole")]
    assert lines[0] == lines[1] and "test/acc1/exit1" in lines[0][1]


def test_a_run_ends_with_its_figures_and_a_command_that_runs(tmp_path, monkeypatch, capsys, on, no_pictures):
    monkeypatch.chdir(tmp_path)
    train(on("--epochs", 1, "--warmup_epochs", 0))
    first, *_, figures, folder, command = capsys.readouterr().out.splitlines()
    out = re.fullmatch(
        r"no --output_dir is given: log and checkpoints go to (runs/msdnet-image_folder-\S+)", first
    )[1]
    assert re.fullmatch(r"test top-1 by exit: \d+\.\d\d \d+\.\d\d %", figures)
    assert folder == f"log and checkpoints are in {out}"
    assert {"log.txt", "checkpoint-1.pth", "checkpoint-best.pth"} < {
        path.name for path in Path(out).iterdir()
    }
    _, python, script, *words = shlex.split(command)
    assert shutil.which(python) and Path(script).resolve() == ROOT / "eval_dynamic.py"
    eval_dynamic.main([*words, "--mode", "anytime", "--num_workers", "0", "--device", "cpu"])
    assert Path(out, "anytime.json").exists()


def test_two_runs_do_not_share_a_folder(trained, error_of, on, monkeypatch):
    def taken(*_):
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", taken)
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert error_of(train, *on("--epochs", 3, "--output_dir", trained)).startswith(
        f"--output_dir {trained}: "
    )
    assert {path: path.read_bytes() for path in trained.iterdir() if path.name != ".lock"} == before


def test_a_checkpoint_of_another_network_is_not_resumed(trained, error_of, on):
    line = error_of(train, *on("--resume", trained / "checkpoint-last.pth", "--nBlocks", 3))
    assert line.endswith("checkpoint-last.pth holds another architecture: nBlocks is 2, wanted 3")


@pytest.mark.parametrize(("flag", "value", "stored"), [("seed", "5", "0"), ("opt", "sgd", "adamw")])
def test_a_run_is_not_resumed_with_another_split_or_optimizer(trained, error_of, flag, value, stored, on):
    line = error_of(train, *on("--resume", trained / "checkpoint-last.pth", f"--{flag}", value))
    assert re.fullmatch(rf"--{flag} {value}, but \S*checkpoint-last.pth was trained with {stored}", line)


def test_bare_weights_are_not_resumed(trained, tmp_path, error_of, on):
    weights = torch.load(trained / "checkpoint-last.pth", weights_only=True)["model"]
    torch.save(weights, tmp_path / "bare.pth")
    line = error_of(train, *on("--resume", tmp_path / "bare.pth"))
    assert "bare.pth can be evaluated or fine-tuned (--finetune) but not resumed" in line


# Processes


def script(*words, **options):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_a_script_ends_with_one_line_for_its_user():
    end = script("main_earlyExit.py", "--model", "msdnet", "--epoch", 3)
    assert (end.returncode, end.stdout) == (2, "")
    assert re.fullmatch(r"error: unknown flag --epoch; did you mean --epochs, .*\?\n", end.stderr)


# What an entry script does with processes and mistakes, without what takes it seconds to import.
ENTRY = """
import sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from training.parallel import start_compute
from utils import Runtime, UserError, run_main
def main(argv):
    compute, total = start_compute(Runtime(device="cpu")), torch.ones(1)
    dist.all_reduce(total)
    if compute.rank == 0:
        print(argv, int(total), compute.world_size, flush=True)
    raise UserError("--smoothing: 1 is above the greatest value accepted, 0.9999")
run_main(main)
"""


def test_torchrun_starts_two_processes_whose_mistake_is_one_line(tmp_path):
    path = tmp_path / "entry.py"
    path.write_text(ENTRY.format(root=str(ROOT)))
    launch = shlex.split("scripts/launch.py --standalone --nproc_per_node 2")
    end = script(*launch, path, "--smoothing", 1, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (end.returncode, end.stdout) == (2, "['--smoothing', '1'] 2 2\n")
    assert end.stderr == "error: --smoothing: 1 is above the greatest value accepted, 0.9999\n"


def test_two_processes_train(trained, tmp_path, capfd, on, read_log, in_processes):
    flags = on("--epochs", 1, "--warmup_epochs", 0, *PLAIN, "--output_dir", tmp_path, "--num_calib", 7)
    flags += ["--drop_last", "false", "--batch_size", "5"]
    flags += ["--finetune", trained / "checkpoint-last.pth"]
    in_processes(2, train, [str(word) for word in flags])
    printed = capfd.readouterr().out
    assert [printed.count(text) for text in ("2 exits,", "fine-tuning", "epoch 1/1")] == [1, 1, 1]
    (line,) = read_log(tmp_path)
    # All 7 images held out, and all 20 test images, are counted once.
    assert line["calib/acc1/exit0"] * 7 == pytest.approx(round(line["calib/acc1/exit0"] * 7))
    assert line["test/acc1/exit1"] * 20 == pytest.approx(round(line["test/acc1/exit1"] * 20))
    assert (
        torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)["step"] == 4
    )  # 17 images each in batches of 5


@pytest.mark.parametrize(
    ("words", "compiled"),
    [("--regime equilibrium", ["Equilibrium"]), ("--regime disjoint --epochs 2", ["MSDNet", "HeadsOnly"])],
)
def test_what_a_phase_trains_through_is_compiled(tmp_path, monkeypatch, on, words, compiled):
    found = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: found.append(type(module).__name__))
    flags = shlex.split(f"--epochs 1 --disable_eval true --compile true {words} --output_dir {tmp_path}")
    train(on(*flags))
    assert found == compiled
