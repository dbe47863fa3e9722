"""Evaluation by the command line: every exit, thresholds, real early exit, cascades, wrong input."""

import asyncio
import io
import json
import pickle
import re
import shlex
import shutil
from time import perf_counter

import numpy as np
import pytest
import torch
from PIL import Image

import eval_dynamic
import main_earlyExit
from adaptive.flops import exit_costs
from deploy import export, runner
from deploy.manifest import Manifest
from deploy.service import Limits, Service
from models import create_model

# What is counted and drawn is looked at in what `evaluated` leaves, which does both.
pytestmark = pytest.mark.usefixtures("evaluated", "costs_once", "no_pictures")
train, evaluate = main_earlyExit.main, eval_dynamic.main
NETWORK = shlex.split("--model msdnet --nBlocks 2 --nChannels 8 --growthRate 4 --grFactor 1-2 --bnFactor 1-2")
RUN = shlex.split("--num_workers 0 --device cpu")


def read_json(path):
    return json.loads(path.read_text())


def test_every_result_is_written(evaluated):
    names = {
        "anytime.json",
        "dynamic.json",
        "dynamic.txt",
        "routing.json",
        "runtime.json",
        "curve.png",
        "report.html",
        "policy.json",
        "policy-2.json",
        "samples.csv",
        "monitor.json",
        "record.json",
    }
    assert {path.name for path in evaluated.iterdir()} == names
    assert (evaluated / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "8 images held out of the training set" in (evaluated / "report.html").read_text()


def test_anytime_results_are_those_of_training(trained, evaluated, tmp_path, read_log, evaluate_into):
    log, exits = read_log(trained)[-1], read_json(evaluated / "anytime.json")
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert [row["macs"] for row in exits] == exit_costs(
        create_model("msdnet", 2, **content["arch"]["options"]), (3, 32, 32)
    )
    evaluate_into(tmp_path, trained / "checkpoint-last.pth", "--weights", "model", "--mode", "anytime")
    assert {path.name for path in tmp_path.iterdir()} == {"anytime.json", "record.json"}
    for part, rows in (("test_ema", exits), ("test", read_json(tmp_path / "anytime.json"))):
        for k, row in enumerate(rows):
            assert row["exit"] == k
            assert row["acc1"] == pytest.approx(log[f"{part}/acc1/exit{k}"])
            assert row["loss"] == pytest.approx(log[f"{part}/loss/exit{k}"], abs=1e-6)


def test_dynamic_results_agree_with_each_other(evaluated):
    exits, rows = read_json(evaluated / "anytime.json"), read_json(evaluated / "dynamic.json")
    assert len(rows) == 39
    for row in rows:
        assert sum(row["shares"]) == pytest.approx(1)
        costs = [one["macs"] for one in exits]
        assert row["macs"] == pytest.approx(sum(s * c for s, c in zip(row["shares"], costs, strict=True)))
        assert len(row["thresholds"]) == 2 and row["thresholds"][-1] == -1e8
        for k in range(2):
            if row["shares"][k] == 1:
                assert row["accuracy"] == pytest.approx(exits[k]["acc1"])
    assert rows[0]["macs"] < rows[-1]["macs"]
    lines = (evaluated / "dynamic.txt").read_text().splitlines()
    pairs = [tuple(map(float, line.split("\t"))) for line in lines]
    assert pairs == [
        (pytest.approx(100 * r["accuracy"], abs=1e-5), pytest.approx(r["macs"], abs=0.1)) for r in rows
    ]


def test_real_early_exit_agrees_with_the_simulation(evaluated):
    rows, runtime = read_json(evaluated / "dynamic.json"), read_json(evaluated / "runtime.json")
    assert runtime["num_images"] == 20
    assert [point["point"] for point in runtime["points"]] == ["row 3", "row 35"]
    for point, row in zip(runtime["points"], (rows[3], rows[35]), strict=True):
        assert point["thresholds"] == pytest.approx(row["thresholds"]) and point["shares"] == row["shares"]
        wrong = point["mismatches"]["throughput"]
        assert wrong <= 1  # folding batch norm changes the last digits, and with them who passes a threshold
        assert 20 * abs(point["accuracy"] - row["accuracy"]) <= wrong + 1e-6
        assert point["macs"] == pytest.approx(row["macs"], rel=0.1 * wrong + 1e-6)


def test_a_budget_is_met_by_a_setting_chosen_on_calib(trained, evaluated, tmp_path, evaluate_into, capsys):
    least, most = (row["macs"] for row in read_json(evaluated / "anytime.json"))
    budget = (least + most) / 2
    flags = ["--mode", "dynamic", "--calib", "half_test", "--policies", "quotas", "--budget", budget]
    evaluate_into(tmp_path, trained / "checkpoint-last.pth", *flags)
    rows, found = read_json(tmp_path / "dynamic.json"), read_json(tmp_path / "record.json")["headline"]
    good = [row for row in rows if row["calib_macs"] <= budget]
    row = rows[int(found["name"].removeprefix("row "))]
    assert row["calib_accuracy"] == max(one["calib_accuracy"] for one in good) and row in good
    assert found["reason"].startswith(
        f"the most accurate of {len(good)} settings within {budget / 1e6:.4g} M"
    )
    assert found["accuracy"]["value"] == pytest.approx(row["accuracy"])
    assert found["macs"]["value"] == pytest.approx(row["macs"])
    exits = read_json(tmp_path / "anytime.json")
    assert found["static_macs"] == exits[-1]["alone"] < exits[-1]["macs"]
    assert found["static_accuracy"]["value"] == pytest.approx(exits[-1]["acc1"])
    printed = capsys.readouterr().out
    assert f"{found['name']} ({row['policy']}): {found['reason']}\n" in printed
    assert re.search(
        rf"expected from calib +{100 * row['calib_accuracy']:.2f} +{row['calib_macs'] / 1e6:.2f} ", printed
    )
    assert f"thresholds {row['thresholds'][0]:.4g} of max_prob" in printed


def test_the_sweep_and_scales_of_dyn_perceiver(trained, tmp_path, evaluate_into):
    flags = shlex.split("--mode dynamic --quota_sweep dyn_perceiver --quota_scales 0.85")
    rows = read_json(evaluate_into(tmp_path, trained / "checkpoint-last.pth", *flags) / "dynamic.json")
    assert len(rows) == len((tmp_path / "dynamic.txt").read_text().splitlines()) == 33
    assert rows[0]["policy"] == "dyn_perceiver p=0.2" and not (tmp_path / "runtime.json").exists()


@pytest.mark.parametrize(
    ("calib", "origin"),
    [
        ("half_test", "10 random test images, not reported on"),
        ("train_augmented", "32 training images with training augmentation, the published procedure"),
    ],
)
def test_other_images_for_thresholds(trained, tmp_path, calib, origin, evaluate_into):
    evaluate_into(tmp_path, trained / "checkpoint-last.pth", "--mode", "dynamic", "--calib", calib)
    page = (tmp_path / "report.html").read_text()
    reported = 10 if calib == "half_test" else 20
    assert origin in page and f"{reported} test images" in page
    for row in read_json(tmp_path / "dynamic.json"):
        assert row["accuracy"] * reported == pytest.approx(round(row["accuracy"] * reported))


def test_augmented_images_for_thresholds_are_the_same_every_time(trained, tmp_path, evaluate_into):
    augmented = ("--mode", "dynamic", "--calib", "train_augmented")
    rows = []
    for name in ("first", "second"):
        torch.rand(3)  # whatever else has drawn in the process
        out = evaluate_into(tmp_path / name, trained / "checkpoint-last.pth", *augmented)
        rows.append(read_json(out / "dynamic.json"))
    assert rows[0] == rows[1]


def test_the_training_script_evaluates_too(trained, evaluated, images, tmp_path):
    shutil.copy(trained / "checkpoint-last.pth", tmp_path)
    words = ["--eval", "true", "--procedure", "ours", "--mode", "dynamic", "--data_path", str(images), *RUN]
    train([*words, "--output_dir", str(tmp_path)])
    for name in ("anytime.json", "dynamic.json", "dynamic.txt"):
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


# Cascades


def test_a_cascade_is_evaluated_from_its_networks_files_and_then_from_its_own(
    trained, images, tmp_path, capsys, evaluate_into
):
    words = [f"weights={trained / 'checkpoint-last.pth'}"] * 2
    flags = ["--router_threshold", "0.9", "0.8", "0.7", "--mode", "dynamic", *RUN]
    flags += ["--data_path", str(images)]
    evaluate(["--model", "ebjr", "--networks", *words, "--output_dir", str(tmp_path / "first"), *flags])
    exits, routing = (read_json(tmp_path / "first" / name) for name in ("anytime.json", "routing.json"))
    assert [row["acc1"] for row in exits[:2]] == [row["acc1"] for row in exits[2:]] and len(exits) == 4
    assert (
        exits[3]["macs"] == 2 * exits[1]["macs"] and exits[3]["alone"] == exits[1]["alone"] < exits[1]["macs"]
    )
    assert routing["policy"] == "threshold 0.9 0.8 0.7" and routing["samples"] == 20
    assert "probably trained" not in capsys.readouterr().out  # both held out the same images
    evaluate_into(tmp_path / "second", tmp_path / "first" / "cascade.pth", *flags)
    assert read_json(tmp_path / "second" / "anytime.json") == exits


# Wrong input


def test_evaluating_as_another_network_is_refused(trained, images, error_of):
    words = ["--checkpoint", trained / "checkpoint-last.pth", "--data_path", images, *RUN]
    line = error_of(evaluate, *words, "--model", "msdnet_cifar_even7")
    assert "holds another network than --model and its options say" in line


class NotTensors:
    """What a checkpoint may not hold."""


def test_files_that_are_no_checkpoints(trained, tmp_path, error_of):
    whole = (trained / "checkpoint-last.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(print, protocol=2))
    torch.save({"model": NotTensors()}, tmp_path / "object.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    complaints = {
        "cut": r".*cut.pth is truncated or not a checkpoint",
        "pickle": r"checkpoint \S*pickle.pth is refused: it holds \S*print",
        "object": r"checkpoint \S*object.pth is refused: it holds \S*NotTensors",
        "empty": r"checkpoint \S*empty.pth has no weights under .*; it holds epoch",
        "absent": r"cannot read checkpoint \S*absent.pth: No such file",
    }
    for name, complaint in complaints.items():
        assert re.match(complaint, error_of(evaluate, *RUN, "--checkpoint", tmp_path / f"{name}.pth"))


def test_a_checkpoint_that_names_no_network_needs_one(trained, images, tmp_path, error_of, read_log):
    torch.save(
        {"model": torch.load(trained / "checkpoint-last.pth", weights_only=True)["model"]},
        tmp_path / "bare.pth",
    )
    data = f"--data_set image_folder --input_size 32 --data_path {images}".split()
    bare = ["--checkpoint", tmp_path / "bare.pth", *data, *RUN, "--mode", "anytime", "--output_dir", tmp_path]
    assert "does not name a network known here: give --model" in error_of(evaluate, *bare)
    assert "does not fit the model" in error_of(evaluate, *bare, "--model", "msdnet")
    evaluate([*map(str, bare), *NETWORK])
    figures = [row["acc1"] for row in read_json(tmp_path / "anytime.json")]
    assert figures == pytest.approx([read_log(trained)[-1][f"test/acc1/exit{k}"] for k in range(2)])


def test_mistakes_in_a_cascade(trained, error_of):
    weights = f"weights={trained / 'checkpoint-last.pth'}"
    known = ["--model", "ebjr", *RUN, "--networks"]
    assert "a cascade has two or more" in error_of(evaluate, *known, weights)
    assert "cannot read checkpoint nowhere.pth" in error_of(evaluate, *known, weights, "weights=nowhere.pth")
    assert "unknown model 'msdnt'" in error_of(evaluate, *known, weights, "msdnt:" + weights)


@pytest.mark.parametrize("calib", ["half_test", "train_augmented"])
def test_a_run_that_held_nothing_out_is_evaluated(trained, tmp_path, calib, evaluate_into):
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    content |= {"args": content["args"] | {"num_calib": 0}, "calib_indices": []}
    torch.save(content, tmp_path / "x.pth")
    evaluate_into(tmp_path, tmp_path / "x.pth", "--mode", "dynamic", "--calib", calib)
    assert len(read_json(tmp_path / "dynamic.json")) == 39
    origin = {"half_test": "10 random test images", "train_augmented": "40 training images"}[calib]
    assert origin in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--data_set DIGITS", r"checkpoint .* has 2 classes, the data set 10"),  # and the folder is not read
        ("--data_set DIGITS --data_path nowhere", r"data set DIGITS reads no --data_path"),
        ("--data_path nowhere", r"image folder nowhere: "),  # the data set is the stored one
        ("--row 39", r"--row 39, but msdnet has rows 0 to 38"),
        ("--row -1", r"--row: -1 is below the least value accepted, 0"),
        ("--accuracy 1.5", r"--accuracy: 1.5 is above the greatest value accepted, 1"),
        ("--accuracy nan", r"--accuracy: nan is below the least value accepted, 0"),
        ("--latency 5min", "--latency 5min: accepted: times above 0 such as 5ms, 0.005s or 5"),
        ("--exit_error 0.1", "--exit_error is met with a guarantee only: add --confidence_level 0.95"),
        (
            "--accuracy 0.9 --confidence_level 0.9",
            "--accuracy cannot be guaranteed; accepted: --budget, --drop",
        ),
        ("--policy policy.json --budget 2e7", "--policy policy.json and --budget: give one of them"),
        ("--router_threshold 1.5", r"threshold 1.5 of max_prob: accepted: from 0 to 1; 1e8: nobody leaves"),
        ("--router_threshold nan", r"--router_threshold: nan is not accepted: give a finite number"),
        ("--confidence entropy --router_threshold 0.2", r"threshold 0.2 of entropy: accepted: to 0; 1e8"),
        ("--quota_scales -1", r"--quota_scales: -1 is below the least value accepted, 0"),
        ("--quota_scales 1 2", r"2 quota scales .* for 2 exits; give one per exit but the last"),
        (
            "--num_calib 0",
            r"no images were held out for calibration \(--num_calib 0\); use --calib half_test, or train_augmented",
        ),
        ("--confidence sure", r"unknown confidence 'sure'; accepted: max_prob"),
        ("--router_threshold 1 2", r"2 router thresholds for 2 exits; give one per exit but the last"),
        ("--shares 1.5", r"shares \[1.5\] for 2 exits"),
        ("--epochs 3", r"unknown flag --epochs"),
        ("--checkpoint=", r"name the file to evaluate: --checkpoint FILE"),
    ],
)
def test_mistakes_in_evaluation_flags(trained, images, tmp_path, error_of, words, complaint):
    known = [
        "--checkpoint",
        trained / "checkpoint-last.pth",
        "--output_dir",
        tmp_path,
        "--mode",
        "runtime",
        *RUN,
    ]
    data = [] if "--data" in words else ["--data_path", images]
    assert re.match(complaint, error_of(evaluate, *known, *data, *words.split()))


def test_goals_out_of_reach_are_refused_as_soon_as_that_is_known(
    trained, images, tmp_path, error_of, monkeypatch
):
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    content["model_ema"] = {name: torch.zeros_like(value) for name, value in content["model_ema"].items()}
    torch.save(content, tmp_path / "blind.pth")
    flags = ["--checkpoint", tmp_path / "blind.pth", "--data_path", images, "--output_dir", tmp_path, *RUN]
    line = error_of(evaluate, *flags, "--mode", "dynamic", "--accuracy", 0.99)
    assert re.fullmatch(r"an accuracy of 0.99 is above the best setting's 0.\d+", line)
    monkeypatch.setattr(eval_dynamic, "see", None)  # costs alone tell
    line = error_of(evaluate, *flags, "--budget", 1)
    assert re.match(r"a budget of 1 multiply-adds is below the cheapest setting's \d", line)


def test_a_file_does_not_decide_what_is_opened_or_fetched(trained, images, tmp_path, error_of):
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    ours = "--data_set image_folder --data_path " + str(images)
    stream, rest = (
        "hfds/somebody/images",
        {"data_path": None, "eval_data_path": "/dev/zero", "download": True},
    )
    for args, command in (
        ({}, ours),
        ({"eval_data_path": "a b"}, f"{ours} --eval_data_path 'a b'"),
        ({"data_set": stream, **rest}, f"--data_set {stream} --data_path PATH --eval_data_path /dev/zero"),
    ):
        torch.save(content | {"args": content["args"] | args}, tmp_path / "x.pth")
        line = error_of(evaluate, "--checkpoint", tmp_path / "x.pth", *RUN)
        assert line == f"name the images to evaluate on; {tmp_path}/x.pth was trained with {command}"
    line = error_of(evaluate, "--checkpoint", tmp_path / "x.pth", "--data_path", images, *RUN)
    assert line.startswith("name the images to evaluate on; ")  # the folder is not all that would be fetched
    rest["data_set"] = "CIFAR10"
    torch.save(content | {"args": content["args"] | rest}, tmp_path / "x.pth")
    line = error_of(evaluate, "--checkpoint", tmp_path / "x.pth", "--data_path", tmp_path / "none", *RUN)
    assert line.startswith(f"no CIFAR10 in {tmp_path}/none, --download true fetches it")
    assert not (tmp_path / "none").exists()


def test_a_policy_with_temperatures_and_recall_comes_back_from_its_file(
    trained, tmp_path, evaluate_into, capsys, error_of, images
):
    file = trained / "checkpoint-last.pth"
    goals = shlex.split(
        "--answer best --temperature true --latency 10s --drop 0.5 --mode dynamic --budget 1e9"
    )
    first = read_json(evaluate_into(tmp_path / "first", file, *goals) / "record.json")
    assert [one["name"] for one in first["headlines"]] == ["budget 1000 M", "latency 1e+04 ms", "drop 50 %"]
    assert "expected latency: " in capsys.readouterr().out
    policy = read_json(tmp_path / "first" / "policy-2.json")
    assert policy["answer"] == "best" and len(policy["temperatures"]) == 2 and policy["latency_ms"] > 0
    assert policy["made"]["command"].startswith("python") and policy["made"]["num_images"] == 8
    saved = ["--policy", tmp_path / "first" / "policy-2.json"]
    again = read_json(evaluate_into(tmp_path / "again", file, *saved, "--mode", "dynamic") / "record.json")
    assert again["headline"]["accuracy"] == first["headlines"][1]["accuracy"]
    assert again["headline"]["macs"] == first["headlines"][1]["macs"] and "dynamic" not in again
    assert read_json(tmp_path / "again" / "policy.json") == policy
    line = error_of(evaluate, "--checkpoint", file, "--data_path", images, *RUN, *saved, "--weights", "model")
    assert re.fullmatch(r"policy 'search' is for weights \w{12}, the network has \w{12}", line)


def test_a_guarantee_that_few_images_cannot_give_is_said(trained, tmp_path, evaluate_into, capsys):
    flags = shlex.split("--drop 0.05 --confidence_level 0.95 --mode dynamic --calib half_test")
    found = evaluate_into(tmp_path, trained / "checkpoint-last.pth", *flags)
    given = read_json(found / "policy.json")["guarantee"]
    assert not given["feasible"] and given["images"] == 5 and given["smallest_bound"] > 0.05
    printed = capsys.readouterr().out
    assert given["statement"] in printed and given["assumption"] in printed
    assert given["statement"] in (found / "report.html").read_text()


class Blank:
    """A runtime whose stages make zeros."""

    def stage(self, files, classes):
        def run(state):
            rows = len(state[files.inputs[0].name])
            made = {one.name: np.zeros((rows, *one.shape), one.dtype) for one in files.outputs}
            return np.zeros((rows, classes), np.float32), made

        return run


def test_the_first_policy_is_exported_with_the_network(trained, tmp_path, evaluate_into, monkeypatch, capsys):
    # Tracing takes long, and is tested elsewhere.
    monkeypatch.setattr(export, "program_of", lambda stage: stage)
    monkeypatch.setattr(export, "save_program", lambda program, path: path.touch())
    monkeypatch.setattr(export, "save_onnx", lambda program, stage, path: path.touch())
    monkeypatch.setattr(runner, "runtime", lambda *words: Blank())
    out, folder = tmp_path / "out", tmp_path / "export"
    words = "--mode", "dynamic", "--row", 3, 35, "--export", folder
    evaluate_into(out, trained / "checkpoint-last.pth", *words)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"exported 2 stages to {folder}; its README.md says how to run them"
    )
    found = Manifest.load(folder)
    assert found.class_names == ("dim", "lit") and found.view.size == 32
    for name in ("policy.json", "policy-2.json", "monitor.json"):
        copy = name.replace("monitor", "policy.reference")
        assert (folder / copy).read_bytes() == (out / name).read_bytes()
    assert found.menu == ("policy-2.json",) and "policy-2.reference.json" in found.files
    service = Service(runner.Runner(folder), "fp32", Limits())
    try:
        image = io.BytesIO()
        Image.new("RGB", (32, 32)).save(image, "PNG")
        asyncio.run(service.answer(image.getvalue(), "image/png", perf_counter(), 60))
        assert b"\ndynexit_drift_samples_total 1.0\n" in service.metrics.text()
        service.switch("policy-2.json")
        assert service.drift.samples == 0
    finally:
        service.close()


def test_nothing_is_evaluated_for_a_folder_that_cannot_be_written(trained, tmp_path, error_of, on):
    words = ["--checkpoint", trained / "checkpoint-last.pth", *on(network=[]), "--export", tmp_path]
    (tmp_path / "a").touch()
    assert error_of(evaluate, *words).startswith(f"{tmp_path} holds a, which no export wrote")
    assert "anytime finds no policy to export" in error_of(evaluate, *words, "--mode", "anytime")
    wrong = error_of(evaluate, *words[:-2], "--export_compiled", "true")
    assert wrong == "--export_compiled true: give the folder, --export DIR"
