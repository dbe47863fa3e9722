"""An exported folder: equal to the network in every runtime, complete or absent, private, explained."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive.guarantee import Guarantee
from adaptive.inference import run_adaptive
from adaptive.policy import Made, Policy, model_hash
from deploy import export as module
from deploy.export import check_target, export, replacing_folder, shared
from deploy.manifest import Manifest, Pixels
from deploy.runner import Runner
from loading.transforms import View, eval_transform

ROW, ALL = Policy((0.5, -1e8)), Policy((-1e8, -1e8))
PROMISE = Guarantee("drop", 0.01, 0.05, "ltt", True, 500, 0.001, 0.01, 0.006, "less", "at most", "alike")


@pytest.fixture
def quickly(monkeypatch):
    """Stages are not traced: their files are empty."""
    monkeypatch.setattr(module, "program_of", lambda stage: stage)
    monkeypatch.setattr(module, "save_program", lambda program, path: path.touch())
    monkeypatch.setattr(module, "save_onnx", lambda program, stage, path: path.touch())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("count", [1, 37])
def test_images_leave_as_in_pytorch(exported, tiny, backend, count):
    torch.manual_seed(count)
    images = torch.randn(count, 3, 8, 8)
    logits, exits = run_adaptive(tiny.network, images, Policy.load(exported / "policy.json"))
    found = Runner(exported, backend, micro_batch=16).answer(images.numpy(), "throughput")
    assert found.exits.tolist() == exits.tolist() and (count == 1 or len(set(found.exits)) == 2)
    np.testing.assert_allclose(found.logits, logits.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_programs_of_pytorch_take_any_batch(exported, tiny, count):
    state = {"images": torch.randn(count, 3, 8, 8)}
    expected = tiny.network(state["images"])
    for stage, other in zip(Manifest.load(exported).stages, expected, strict=True):
        call = torch.export.load(exported / stage.pt2).module()
        logits, *made = call(*(state[one.name] for one in stage.inputs))
        state.update({one.name: tensor for one, tensor in zip(stage.outputs, made, strict=True)})
        torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-5)


def test_the_manifest_says_what_is_there(exported, tiny):
    found = Manifest.load(exported)
    assert set(found.files) | {"manifest.json"} == {one.name for one in exported.iterdir()}
    assert found.class_names == ("ant", "bee", "cat") and found.network.name == "tiny"
    assert found.model_hash == model_hash(tiny.network)
    assert found.view == Pixels(8, 0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    assert found.policies == {"fp32": "policy.json", "bf16": "policy.bf16.json"}
    assert [Policy.load(exported / name).name for name in found.menu] == ["late"]


@pytest.mark.parametrize("size", [32, 224, 384])
def test_pixels_are_those_of_evaluation(size):
    view = View(size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    found, side = Pixels.of(view), eval_transform(view)(picture).shape[-1]
    assert found.size == side and found.resize == (256 if size == 224 else 0)
    assert found.interpolation == ("bicubic" if size == 32 else "bilinear")


def test_no_file_says_where_it_was_made(exported):
    here = str(module.__file__).rpartition("/")[0].encode()
    for one in exported.iterdir():
        assert here not in one.read_bytes() and b"stack_trace" not in one.read_bytes(), one.name


@pytest.mark.parametrize(("found_in", "kept"), [("int8", ["int8"]), ("fp32", [])])
def test_guarantees_hold_where_they_were_made(found_in, kept):
    policies = shared(replace(ROW, guarantee=PROMISE, made=Made(precision=found_in)), "int8")
    assert list(policies) == ["int8", "fp32", "bf16"]
    assert [name for name, policy in policies.items() if policy.guarantee] == kept
    assert {policy.thresholds for policy in policies.values()} == {ROW.thresholds}


@pytest.mark.usefixtures("quickly")
def test_int8_stages_come_with_their_policy(tiny, tmp_path):
    def quantise(folder, stages):
        assert stages[0]["fp32"] == "stage0.onnx" and (folder / "stage0.onnx").exists()
        return [f"stage{k}.int8.onnx" for k in range(len(stages))]

    off = replace(ROW, thresholds=(1e8, -1e8), off=(0,))
    found = export(tiny, shared(off, "int8"), tmp_path / "x", quantise=quantise)
    assert [stage.int8 for stage in found.stages] == ["stage0.int8.onnx"]  # exit 0 is merged into it
    assert found.policies["int8"] == "policy.int8.json" and found.stages[0].exit == 1
    with pytest.raises(ValueError, match="give both or neither"):
        export(tiny, shared(ROW, "int8"), tmp_path / "y")


@pytest.mark.usefixtures("quickly")
def test_int8_stages_of_a_guarantee_are_those_that_were_evaluated(tiny, tmp_path):
    def quantise(folder, stages):
        names = [f"stage{k}.int8.onnx" for k in range(len(stages))]
        for name in names:
            (folder / name).write_text(f"evaluated {name}")
        return names

    export(tiny, shared(ROW, "int8"), tmp_path / "x", quantise=quantise)
    off = replace(ROW, thresholds=(1e8, -1e8), off=(0,), guarantee=PROMISE)
    found = export(tiny, shared(off, "int8"), tmp_path / "y", menu=[ALL], quantise=tmp_path / "x")
    assert [stage.int8 for stage in found.stages] == ["stage0.int8.onnx", "stage1.int8.onnx"]
    for stage in found.stages:
        assert (tmp_path / "y" / stage.int8).read_text() == f"evaluated {stage.int8}"
    assert Policy.load(tmp_path / "y" / found.policies["int8"]) == off


@pytest.mark.usefixtures("quickly")
def test_stages_that_nobody_reaches_are_left_out(tiny, tmp_path):
    found = export(tiny, ALL, tmp_path / "x")
    (stage,) = found.stages
    assert stage.exit == 0 and stage.outputs == () and not (tmp_path / "x" / "stage1.onnx").exists()
    assert len(export(tiny, ALL, tmp_path / "y", menu=[ROW]).stages) == 2


@pytest.mark.usefixtures("quickly")
def test_policies_that_do_not_fit_are_refused(tiny, tmp_path):
    off = replace(ROW, thresholds=(1e8, -1e8), off=(0,))
    for policies, said in (
        ({"fp32": ROW, "bf16": off}, "a folder is cut into stages in one way"),
        ({"fp64": ROW}, "a policy for 'fp64'; accepted: fp32, bf16, int8"),
        (Policy((0.5, 0.5, -1e8)), "3 exits, the network has 2"),
    ):
        with pytest.raises(ValueError, match=said):
            export(tiny, policies, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_the_old_folder(tiny, exported, tmp_path, monkeypatch):
    folder = tmp_path / "x"
    shutil.copytree(exported, folder)
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    monkeypatch.setattr(module, "program_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tiny, ROW, folder)
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def interrupt(stage):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("quickly")
def test_an_export_replaces_an_earlier_one_and_nothing_else(tiny, exported, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(exported, folder)
    (folder / "__pycache__").mkdir()
    export(tiny, ROW, folder)
    assert Manifest.load(folder).menu == () and not (folder / "policy-2.json").exists()
    (folder / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"x holds notes.txt, which no export wrote; accepted: a new or empty"
    ):
        export(tiny, ROW, folder)
    with pytest.raises(ValueError, match="notes.txt is a file; accepted"):
        check_target(folder / "notes.txt")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is no manifest that can be read"):
        export(tiny, ROW, folder)


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    with pytest.raises(ValueError, match="cannot write"), replacing_folder(tmp_path / "x") as part:
        shutil.rmtree(part)
    assert (tmp_path / "x" / "old").exists()


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"need a C\+\+ compiler"):
        check_target(tmp_path, compiled=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="export needs onnx and onnxscript: pip install -r requirements-deploy"
    ):
        check_target(tmp_path)


def test_the_commands_of_the_readme_run(exported, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(exported, folder)
    (folder / "images").mkdir()
    Image.new("RGB", (20, 30), "green").save(folder / "images" / "a.jpg")
    text = (folder / "README.md").read_text()
    assert "stage0_map [4, 4, 4], stage0_said [3]" in text and "accuracy 50.00 %" in text and "$" not in text
    (bash,), (program, stage) = (
        re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("bash", "python")
    )
    words = bash.splitlines()[1].replace("*", "a").split()[1:]
    command = f"import runpy, sys; sys.argv = {words}; runpy.run_path('runner.py', run_name='__main__')\n"
    run = {"cwd": folder, "check": True, "capture_output": True, "text": True}
    first, rest = subprocess.run([sys.executable, "-c", command + program + stage], **run).stdout.split(
        "\n", 1
    )
    answer = json.loads(first)
    assert answer["class"] in ("ant", "bee", "cat") and answer["exit"] in (0, 1)
    assert (
        "Answers(" in rest and "['images', 'stage0_map', 'stage0_said']" in rest and "exit 1 says [" in rest
    )
