"""The scripts of detection, from their command lines, on drawn shapes."""

import re
import shlex
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from adaptive.policy import Policy
from detection import detectors
from detection.train import Detection, Job

FLAGS = "--train_split train --val_split val --batch_size 2 --min_size 64 --max_size 64 --smallest_anchor 8"
FLAGS += " --proposals 8 --sampled 8 --num_workers 0 --lr 0.01 --warmup_steps 2 --decay_epochs 1"
FLAGS += " --model mask_rcnn_rexnet_090"


@pytest.fixture
def run(script, shapes):
    """main_detection.py with the flags of a short run and others."""

    def main(out, *words):
        flags = [*shlex.split(FLAGS), "--data_path", str(shapes), "--output_dir", str(out)]
        script("main_detection").main([*flags, *words])

    return main


def test_flags_are_the_fields_of_a_run(script, detection):
    read = partial(script("common").read_flags, Detection, about="")
    found = read([*shlex.split(FLAGS), "--epochs", "2", "--data-path", detection.data_path])
    assert found.decay_epochs == (1,)
    assert found == detection
    assert vars(read([])) == {
        "model": "faster_rcnn_rexnet_100",
        "data_path": "",
        "train_split": "train2017",
        "val_split": "val2017",
        "output_dir": "runs/detection",
        "backbone_weights": "",
        "freeze_norm": False,
        "min_size": 800,
        "max_size": 1333,
        "smallest_anchor": 32,
        "proposals": 1000,
        "sampled": 512,
        "epochs": 12,
        "batch_size": 2,
        "lr": 0.0025,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "warmup_steps": 500,
        "decay_epochs": (8, 11),
        "clip_grad": None,
        "num_workers": 2,
        "seed": 0,
        "device": "auto",
        "eval": False,
        "flops": False,
    }


@pytest.mark.usefixtures("narrow")
def test_a_run_is_evaluated_and_goes_on(run, whole, capsys):
    run(whole, "--epochs", "2")
    assert capsys.readouterr().out == "all 2 epochs are done\n"
    run(whole, "--eval", "true")
    assert re.fullmatch(r"AP 0\.\d{4}, AP50 .*, mask_AP75 0\.\d{4}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval true --train_split none", "nothing to evaluate"),
        ("--epoch 3", "unknown flag --epoch"),
        ("--min_size 8", "--min_size.*below the least value accepted, 32"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", *shlex.split(words))


def test_costs_are_printed(run, tmp_path, capsys):
    run(tmp_path, "--flops", "true")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mask_rcnn_rexnet_090: 91 classes") and len(lines) == 3
    assert re.match(r"800 x 1280: 2\d\.\d\d M parameters; backbone .*, masks .*; total \d+\.\d", lines[2])


@pytest.mark.usefixtures("narrow")
def test_the_benchmark_draws_trains_and_shows(script, tmp_path, capsys):
    script("bench_detection").main([str(tmp_path), *shlex.split("--count 4 --held_out 3 --epochs 1")])
    out = capsys.readouterr().out
    assert re.search(r"AP 0\.\d{3}  AP50 0\.\d{3}  AP75 0\.\d{3}  in \d+ s", out)
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.size == (3 * 3 * 128, 3 * 128)


@pytest.fixture(scope="module")
def pair(detection, tmp_path_factory):
    """Files of two detectors with random weights."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "PYRAMID", 16)
        for seed in (0, 1):
            job = Job(replace(detection, seed=seed, model="faster_rcnn_rexnet_090"))
            torch.save({"model": job.detector.state_dict(), **job.facts()}, folder / f"{seed}.pth")
    return [str(folder / "0.pth"), str(folder / "1.pth")]


@pytest.mark.usefixtures("narrow")
def test_a_cascade_of_two_detectors_is_evaluated_and_runs_by_its_saved_policy(
    script, shapes, pair, capsys, tmp_path
):
    path, ends = str(tmp_path / "out" / "policy.json"), []
    main, files = script("eval_detection_cascade").main, [str(shapes), *pair, "--val_split", "val"]
    for words in (["--output_dir", str(tmp_path / "out")], ["--limit", "1", "--policy", path]):
        main([*files, *words])
        lines = capsys.readouterr().out.splitlines()
        assert ("AP50" in lines[2]) == ("--limit" not in words)
        rows = [line.split() for line in lines[3:12]]
        assert [row[0] for row in rows] == [*["0", "10", "20", "30", "40", "50", "70", "100"], "teacher"]
        costs = [float(row[3]) for row in rows[:-1]]
        assert costs == sorted(costs) and costs[0] < costs[-1]
        assert rows[7][4:] == rows[8][2:]  # all deferred: the teacher's precision
        last = r"(run for real at .*): \d+\.0 % deferred to the teacher, .* ms an image, 0 differ"
        ends.append(re.fullmatch(last, lines[-1])[1])
    assert ends[0] == ends[1]
    policy = Policy.load(path)
    assert policy.name == "30 % deferred" and policy.confidence == "energy_softmax"
    assert policy.made.num_images == 2 and sum(policy.shares) == 1 and policy.macs > 0
    with pytest.raises(ValueError, match="policy.json and --confidence margin: give one of them$"):
        main([*files, "--policy", path, "--confidence", "margin"])
    with pytest.raises(ValueError, match=r"^policy '30 % deferred' is for weights \w{12}, the network"):
        main([str(shapes), *pair[::-1], "--val_split", "val", "--policy", path])
