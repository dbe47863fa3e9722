"""Rows are run with every seed, once, whatever happens in between; tables say what differs by more than chance."""

import json
import re
import shutil
import sys
from concurrent.futures import Future
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from subprocess import STDOUT, CompletedProcess
from types import SimpleNamespace

import pytest

from experiment.checks import check
from experiment.procedures import training_recipe
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.results import read_results

TOY = """
common: {batch_size: 8, lr: 0.05, mixup: 0, cutmix: 0, aa: none, color_jitter: 0, reprob: 0,
  device_data: true, num_workers: 0, save_ckpt_num: 0, device: cpu, num_calib: 40}
small: &small {model: msdnet, nBlocks: 2, nChannels: 4, growthRate: 4}
families:
  parts:
    half: {<<: *small, share: 0.5}
    other: {<<: *small, share: 0.5, growthRate: 6}
  toy:
    joint: {<<: *small}
    taught: {<<: *small, teacher: parts-half, share: 0.5}
  pairs:
    pair: {members: [parts-half, parts-other]}
"""


@pytest.fixture(scope="module")
def parts(script):
    """The modules of the script by the ends of their names."""
    return SimpleNamespace(**{name: script(f"regimes_{name}") for name in ("rows", "steps", "runs")})


@pytest.fixture
def toy(tmp_path):
    """A file of four rows."""
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


def value(words, name):
    return words[words.index(name) + 1]


class AtOnce:
    """Stands for a pool of threads: a process cannot be forked from one of those and end well."""

    def __init__(self, jobs):
        pass

    def submit(self, function, *words):
        future = Future()
        try:
            future.set_result(function(*words))
        except RuntimeError as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


def test_a_row_is_trained_and_evaluated(tmp_path, script, parts, toy, forked, capsys, monkeypatch):
    def run(command, *, stdout, env, **_):
        assert env["OMP_NUM_THREADS"] == "1"
        code, out, error = forked(*command[command.index(sys.executable) + 1 :])
        stdout.write(out + error)
        return CompletedProcess(command, code)

    monkeypatch.setattr(parts.runs, "subprocess", SimpleNamespace(run=run, STDOUT=STDOUT))
    monkeypatch.setattr(parts.runs, "ThreadPoolExecutor", AtOnce)
    words = ["--out", str(tmp_path), "--rows", str(toy), "--seconds", "0.3", "--steps", "1", "--rounds", "1"]
    assert script("compare_regimes").main([*words, "--seeds", "3", "--only", "parts-half"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("row          ms/image   images/s   epochs   images in each     s\nparts-half")
    (one,) = read_results(tmp_path / "records")
    training = json.loads((tmp_path / "records" / f"{one.name}.json").read_text())["origin"]["training"]
    steps = json.loads((tmp_path / "steps.json").read_text())
    rows = parts.rows.read_rows(toy)
    plan = parts.rows.plan_of(rows[0], 0.3, steps["image_seconds"]["parts-half"], steps["num_train"])
    assert (one.name, one.seed, training["epoch_images"]) == ("parts-half-seed3", 3, plan.epoch_images)
    assert one.front and training["disable_eval"] and steps["num_train"] == 1397
    accuracy = f"{100 * one.exits[-1].accuracy:.2f} (n = 1)"
    assert f"| half | {plan.seconds:.0f} | " in text and f" | {accuracy} | " in text


TIMED = {"p50_ms": 1.0, "macs": 6e6, "accuracy": 0.5}


class Runs:
    """Stands for `subprocess`: leaves a record with another accuracy for every seed; `failing` ones fail."""

    STDOUT = STDOUT

    def __init__(self, record):
        self.record, self.calls, self.failing = record.read_text(), [], set()

    def run(self, command, *, stdout, **_):
        path, *words = command[command.index(sys.executable) + 1 :]
        folder = Path(value(words, "--output_dir"))
        self.calls.append((Path(path).stem, folder.name))
        if folder.name in self.failing:
            stdout.write("error: no luck\n")
            return CompletedProcess(command, 1)
        folder.mkdir(parents=True, exist_ok=True)
        if "eval_dynamic" in path:
            self.leave_record(folder, words)
        else:
            assert ("--kd_teacher" in words) == ("taught" in folder.name)
            (folder / "log.txt").write_text('{"epoch": 1, "seconds": 2.0}\n')
        return CompletedProcess(command, 0)

    def leave_record(self, folder, words):
        content = json.loads(self.record)
        better = 0.1 * int(folder.name[-1])
        content["origin"]["model"] = sha256(str(folder).encode()).hexdigest()
        content["provenance"]["options"] = {"of": folder.name.partition("-seed")[0]}
        for row in content["anytime"]:
            row["acc1"] = 0.3 + better
        accuracy = {"value": 0.5 + better}
        policy = content["policies"][0] | {"accuracy": 0.8 - 0.1 * ("taught" in folder.name)}
        content["front"] = [{"policy": policy, "accuracy": accuracy, "macs": 6e6}]
        content.pop("runtime", None)
        if value(words, "--mode") == "all":
            assert value(words, "--drop") == "0"
            assert int(value(words, "--budget")) - policy["macs"] < 1
            content["policies"] = [policy]
            content["headline"] |= {"name": "it"}
            content["runtime"] = {
                "num_images": int(value(words, "--runtime_images")),
                "table": [TIMED | {"policy": "it, throughput order", "images_per_s": 77.0}],
            }
        (folder / "record.json").write_text(json.dumps(content))


def test_a_matrix_is_resumed_and_a_run_that_fails_is_named(
    tmp_path, script, parts, toy, evaluated, capsys, monkeypatch
):
    compare, runs = script("compare_regimes"), Runs(evaluated / "record.json")
    monkeypatch.setattr(parts.runs, "subprocess", runs)
    words = [
        "--out",
        str(tmp_path),
        "--rows",
        str(toy),
        "--seconds",
        "0.3",
        "--seeds",
        "0",
        "1",
        "--jobs",
        "2",
    ]
    words += ["--steps", "1", "--rounds", "1"]
    runs.failing = {"parts-other-seed1"}
    assert compare.main(words) == 1
    text = capsys.readouterr().out
    assert "\n2 runs failed\nparts-other, seed 1: main_earlyExit.py ended with 1: error: no luck; " in text
    assert "\npairs-pair, seed 1: a row that it needs has failed\n" in text
    assert "\n| joint | 0 | 2 | " in text and "\n| taught | 0 | 4 | " in text and "(n = 2)" in text
    records = {path.stem for path in (tmp_path / "records").iterdir()}
    assert len(records) == 8 and not {"parts-other-seed1", "pairs-pair-seed1"} & records
    timed = (tmp_path / "steps.json").read_text()
    runs.failing, runs.calls[:] = set(), []
    (tmp_path / "records" / "toy-taught-seed0.json").unlink()
    assert compare.main([*words, "--speed", "true"]) == 0
    left = {"toy-taught-seed0", "parts-other-seed1"}
    assert {run for name, run in runs.calls if name == "main_earlyExit"} == left
    # Parts of others are not compared, and what is not as accurate is not timed.
    fast = [("eval_dynamic", f"{name}-seed0") for name in ("toy-joint", "pairs-pair")]
    assert runs.calls[-2:] == fast and len(runs.calls) == 2 + 3 + 2
    text = capsys.readouterr().out
    assert text.endswith("0 runs failed\n") and len(re.findall(r"^\S+ +77 ", text, re.MULTILINE)) == 2
    assert re.search(r"\ntaught +not reached ", text) and "toy, seed 0: at 79.00 % of held-out" in text
    assert (tmp_path / "steps.json").read_text() == timed
    assert compare.main([*words, "--speed", "true"]) == 0 and len(runs.calls) == 7
    shutil.rmtree(tmp_path / "runs")  # the tables need records alone
    for seed in (0, 1):
        (tmp_path / "records" / f"pairs-pair-seed{seed}.json").unlink()
    capsys.readouterr()
    assert compare.main([*words, "--only", "toy"]) == 0
    assert "\n| joint | 0 | – | " in capsys.readouterr().out


def test_rows_without_their_first_have_no_table(tmp_path, script, parts, toy, evaluated, capsys, monkeypatch):
    runs = Runs(evaluated / "record.json")
    monkeypatch.setattr(parts.runs, "subprocess", runs)
    runs.failing = {"toy-joint-seed0"}
    words = ["--out", tmp_path, "--rows", toy, "--seconds", 0.3, "--seeds", 0, "--steps", 1, "--rounds", 1]
    assert script("compare_regimes").main([*map(str, words), "--only", "toy"]) == 1
    text = capsys.readouterr().out
    assert text.endswith("\nno table of toy: joint, its first row, has no record\n") and "|" not in text
    runs.failing = {"toy-taught-seed0"}
    for file in (tmp_path / "records").glob("toy-*.json"):
        file.unlink()
    words += ["--only", "toy", "--seeds", 0, 1, "--speed", "true"]
    assert script("compare_regimes").main([*map(str, words)]) == 1
    assert capsys.readouterr().out.endswith("\nspeed: toy-taught-seed0 has no record\n")


def test_rows_that_have_changed_are_refused(tmp_path, script, parts, toy, error_of):
    rows = parts.rows.read_rows(toy)
    known = {"half": {"family": "parts"}}
    (tmp_path / "steps.json").write_text(json.dumps({"rows": {rows[0].name: known}}))
    said = error_of(script("compare_regimes").main, "--out", tmp_path, "--rows", toy)
    assert said == f"--out {tmp_path} was begun with another parts-half; take a new folder"


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            {"l2w": True, "meta_interval": 2},
            "--steps 3: accepted for row toy-a: multiples of meta_interval 2",
        ),
        ({"low_size": 24}, "row toy-a has a phase of 0.4 of the epochs, accepted: 0.5"),
        (
            {"regime": "mixed", "first_share": 0.25},
            "row toy-a has a phase of 0.25 of the epochs, accepted: 0.5",
        ),
        ({"low_size": 24, "low_share": 0.5, "l2w": True, "meta_interval": 3}, ""),
    ],
)
def test_only_what_two_epochs_show_is_timed(parts, flags, said):
    row = parts.rows.Row("toy", "a", flags)
    recipe = Recipe.of(read_command(list(GROUPS.values()), row.words).values)
    expected = pytest.raises(ValueError, match=f"^{re.escape(said)}$") if said else nullcontext()
    with expected:
        parts.steps.check_timed(row.name, recipe, 3)


def test_another_budget_in_the_same_folder_is_refused(tmp_path, script, toy, error_of):
    (tmp_path / "steps.json").write_text('{"seconds": 20.0}')
    said = error_of(script("compare_regimes").main, "--out", tmp_path, "--rows", toy, "--seconds", 30)
    assert said == f"--out {tmp_path} was begun with seconds 20.0, not 30.0"


@pytest.mark.parametrize("file", ["compare_regimes.yaml", "fast_recipe.yaml"])
def test_the_rows_of_a_matrix_can_be_trained(script, parts, file):
    rows = parts.rows.read_rows(script("compare_regimes").Flags().rows.parent / file)
    for row in rows:
        if not row.members:
            teacher = ["--kd_teacher", "it.pth"] if row.teacher else []
            recipe = training_recipe(read_command(list(GROUPS.values()), [*row.words, *teacher]))
            check(recipe)
            parts.steps.check_timed(row.name, recipe, 3)
    whole = {row.name for row in rows if row.family != "parts" and not row.needs}
    assert all(row.share == 1 for row in rows if row.name in whole)


@pytest.mark.parametrize("seconds", [0.1, 7.0, 100.0, 5000.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_plan_keeps_to_its_budget(parts, seconds, share):
    row = parts.rows.Row("toy", "a", {"batch_size": 16}, share)
    plan = parts.rows.plan_of(row, seconds, 0.01, 1000)
    step = 16 * 0.01
    assert plan.epochs % 2 == 0 and plan.epoch_images % 16 == 0 and 0 < plan.epoch_images <= 1000
    assert plan.seconds == pytest.approx(plan.epochs * plan.epoch_images * 0.01)
    # To half a step per epoch, and to an epoch's last batch.
    assert abs(plan.seconds - share * seconds) <= plan.epochs * step
    assert read_command(list(GROUPS.values()), plan.words).values["epoch_images"] == plan.epoch_images


def test_rows_bring_what_they_need(parts, toy, tmp_path):
    rows = parts.rows.read_rows(toy)
    names = ["parts-half", "parts-other", "toy-joint", "toy-taught", "pairs-pair"]
    assert [row.name for row in rows] == names
    assert [row.name for row in parts.rows.chosen(rows, ["toy-taught"])] == ["parts-half", "toy-taught"]
    assert parts.rows.chosen(rows, []) == rows
    with pytest.raises(ValueError, match="^--only toi: accepted: families and rows, parts-half, "):
        parts.rows.chosen(rows, ["toi"])
    bad = tmp_path / "bad.yaml"
    for text, said in [
        (
            TOY.replace("teacher: parts-half", "teacher: it"),
            "toy-taught needs it, which no row above is named",
        ),
        (TOY.replace("teacher: parts-half", "teacher: [parts-half]"), r"toy-taught needs \['parts-half'\], "),
        (TOY.replace("teacher: parts-half", "teacher: toy-joint"), "toy-taught gets 1.5 of the budget "),
        (
            TOY.replace("[parts-half, parts-other]", "[toy-taught]"),
            "toy-taught, which needs other rows itself",
        ),
        (
            TOY.replace("share: 0.5, growthRate", "share: 1/2, growthRate"),
            "parts-other has share 1/2, accepted",
        ),
        (TOY.replace("device: cpu", "epochs: 3"), "parts-half has epochs, which comparing sets"),
        (TOY.replace("{<<: *small}", ""), "expected common: and families: of rows"),
        ("families: {}", "expected common: and families: of rows"),
        ("[", "expected common: and families: of rows"),
    ]:
        bad.write_text(text)
        with pytest.raises(ValueError, match=said):
            parts.rows.read_rows(bad)
