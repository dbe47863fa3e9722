"""Exported networks run without PyTorch as they do with it; folders that were changed are refused."""

import copy
import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import venv
from importlib.metadata import files
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from adaptive.inference import run_adaptive
from adaptive.policy import Policy, model_hash
from adaptive.reading import Reading
from deploy import runner as program
from deploy.decide import RunnerError
from deploy.export import copy_runner
from deploy.folder import Folder
from deploy.runner import Pool, Runner, rows_of
from deploy.runtimes import processors, quota, runtime, size_for

SIDE, CLASSES = 2, 4
VIEW = {"size": SIDE, "resize": 0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25, 0.5, 1]}
BACKENDS = ["onnxruntime", "openvino"]


def port(name, *shape):
    return {"name": name, "shape": list(shape), "dtype": "float32"}


def stage_onnx(model, k, in_bytes=False):
    """Stage k of the relay network: it reads the images, and after the first what the exit before said, which
    may be handed over in bytes."""
    names = ["images"] if k == 0 else ["images", f"said{k - 1}"]
    layer, head = model.layers[k], model.heads[k]
    weights = {
        "w": layer.weight if k else layer.weight[:, :12],
        "b": layer.bias,
        "v": 3 * head.weight,
        "c": 3 * head.bias,
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Concat", ["flat", *names[1:]], ["x"], axis=1),
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1),
        helper.make_node("Tanh", ["y"], ["h"]),
        helper.make_node("Gemm", ["h", "v", "c"], ["logits"], transB=1),
    ]
    made = [] if k == 2 else [f"said{k}"]
    levels = {}
    if in_bytes:
        levels = {"step": np.float32(0.03), "middle": np.uint8(128)}
        nodes += [helper.make_node("QuantizeLinear", ["logits", *levels], [name]) for name in made]
        for name in names[1:]:
            nodes.insert(0, helper.make_node("DequantizeLinear", [name, *levels], ["before"]))
            nodes[2].input[1] = "before"
    else:
        nodes += [helper.make_node("Identity", ["logits"], [name]) for name in made]
    shapes = {"images": (3, SIDE, SIDE)}
    said = TensorProto.UINT8 if in_bytes else TensorProto.FLOAT
    sides = [
        [
            helper.make_tensor_value_info(
                n, said if "said" in n else TensorProto.FLOAT, ["batch", *shapes.get(n, (CLASSES,))]
            )
            for n in side
        ]
        for side in (names, ["logits", *made])
    ]
    stored = [numpy_helper.from_array(value.detach().numpy(), name) for name, value in weights.items()]
    stored += [numpy_helper.from_array(np.array(value), name) for name, value in levels.items()]
    return helper.make_model(
        helper.make_graph(nodes, "stage", *sides, stored),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )


def rehashed(folder, **changes):
    """Writes the manifest again, with the hashes of the files as they are."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    manifest["files"] = {name: Folder.sha256(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def network(relay_class):
    torch.manual_seed(0)
    return relay_class().eval()


@pytest.fixture(scope="module")
def batch():
    return torch.randn(23, 3, SIDE, SIDE, generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def policy(network, batch):
    """A third of the images leaves at each exit, none at a threshold within float noise."""
    with torch.no_grad():
        first, second, _ = network(batch)
    scores = [logits.softmax(-1).amax(-1).sort().values for logits in (first, second)]
    thresholds = [score[i : i + 2].mean().item() for score, i in zip(scores, (15, 10), strict=True)]
    return Policy((*thresholds, -1e8), model_hash=model_hash(network))


@pytest.fixture(scope="module")
def exported(network, policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    rows = []
    for k in range(3):
        onnx.save(stage_onnx(network, k), folder / f"stage{k}.onnx")
        inputs = [port("images", 3, SIDE, SIDE), *([port(f"said{k - 1}", CLASSES)] if k else [])]
        outputs = [] if k == 2 else [port(f"said{k}", CLASSES)]
        rows.append({"exit": k, "inputs": inputs, "outputs": outputs, "fp32": f"stage{k}.onnx"})
    policy.save(folder / "policy.json")
    copy_runner(folder)
    manifest = {
        "schema": 1,
        "class_names": ["ant", "bee", "cow", "dog"],
        "view": VIEW,
        "policies": {"fp32": "policy.json", "bf16": "policy.json"},
        "stages": rows,
        "files": dict.fromkeys(["policy.json", *(row["fp32"] for row in rows)], ""),
        "model_hash": policy.model_hash,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rehashed(folder)


@pytest.fixture(scope="module")
def runners(exported):
    return {backend: Runner(exported, backend, micro_batch=4, threads=1) for backend in BACKENDS}


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the folder, to damage."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def assert_equal(answers, expected):
    logits, exits = expected
    np.testing.assert_array_equal(answers.ids, np.arange(len(exits)))
    np.testing.assert_array_equal(answers.exits, exits)
    np.testing.assert_allclose(answers.logits, logits, atol=1e-4)
    np.testing.assert_array_equal(answers.classes, logits.argmax(-1))


# Answers


@pytest.mark.parametrize("order", ["latency", "throughput"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_pytorch(backend, order, runners, network, policy, batch):
    runner = runners[backend]
    for micro_batch, count in ((4, 23), (1, 5), (2, 23), (4, 1)):
        runner.micro_batch = micro_batch
        expected = run_adaptive(network, batch[:count], policy, order=order, micro_batch=micro_batch)
        assert_equal(runner.answer(batch[:count].numpy(), order), expected)
        assert count < 20 or len(expected[1].unique()) == 3


@pytest.mark.parametrize("reading", [Reading("agreement", "mean"), Reading("margin", "best", (0.5, 1, 2))])
def test_what_a_policy_remembers_travels_with_the_sample(reading, exported, network, policy, batch, tmp_path):
    thresholds = {"agreement": (2, 2, -1e8), "margin": policy.thresholds}[reading.confidence]
    other = Policy.by(reading, thresholds)
    other.save(tmp_path / "other.json")
    runner = Runner(exported, "onnxruntime", micro_batch=3, threads=1, policy=tmp_path / "other.json")
    for order in ("throughput", "latency"):
        expected = run_adaptive(network, batch, other, order=order)
        assert len(expected[1].unique()) > 1
        assert_equal(runner.answer(batch.numpy(), order), expected)


def test_a_runner_goes_on_after_an_error(runners, network, policy, batch):
    """... and one runner's answers do not change another's."""
    runner, other = (runners[backend] for backend in BACKENDS)
    expected = run_adaptive(network, batch, policy)
    stages = runner.stages
    runner.stages = [stages[0], lambda state: 1 / 0, stages[2]]
    with pytest.raises(ZeroDivisionError):
        runner.answer(batch.numpy(), "throughput")
    runner.stages = stages
    few = other.answer(batch.numpy()[:7])
    assert_equal(runner.answer(batch.numpy(), "throughput"), expected)
    assert_equal(few, [part[:7] for part in expected])


def test_bf16_rows_are_bf16(exported, batch, policy):
    runner = Runner(exported, precision="bf16", threads=1)  # openvino, as it is installed
    answers = runner.answer(batch.numpy())
    assert runner.pools[1].buffers["said0"].dtype == np.uint16
    assert (answers.exits != 0).any() and (answers.confidence >= 0.25).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_between_quantised_stages_are_bytes(backend, copied, network, policy, batch):
    manifest = json.loads((copied / "manifest.json").read_text())
    for k, row in enumerate(manifest["stages"]):
        row["int8"] = f"stage{k}.int8.onnx"
        onnx.save(stage_onnx(network, k, in_bytes=True), copied / row["int8"])
    files = {**manifest["files"], **{row["int8"]: "" for row in manifest["stages"]}}
    rehashed(copied, stages=manifest["stages"], policies={"int8": "policy.json"}, files=files)
    runner = Runner(copied, backend, "int8", threads=1)
    answers = runner.answer(batch.numpy())
    assert runner.pools[1].buffers["said0"].dtype == np.uint8
    logits, exits = run_adaptive(network, batch, policy)
    same = answers.exits == exits.numpy()
    assert same.mean() > 0.8 and len(set(answers.exits)) == 3
    np.testing.assert_allclose(answers.logits[same], logits[same], atol=0.1)


def test_images_are_read_a_micro_batch_at_a_time(runners, batch):
    runner, read = runners["onnxruntime"], []

    class Files(list):
        def __getitem__(self, part):
            read.append(part.stop - part.start)
            return super().__getitem__(part)

    pictures = [Image.new("RGB", (9, 5), (i, 2 * i, 99)) for i in range(10)]
    runner.micro_batch = 4
    answers = runner.answer(Files(pictures), "throughput")
    rows = np.stack([runner.prepare(picture) for picture in pictures])
    np.testing.assert_allclose(answers.logits, runner.answer(rows).logits, atol=1e-6)
    assert read == [4, 4, 4]


@pytest.mark.parametrize(
    ("images", "order"),
    [
        (np.zeros((0, 3, SIDE, SIDE), np.float32), "latency"),
        ([], "throughput"),
        (np.zeros((2, 3, SIDE, SIDE), np.float32), "fast"),
        (np.zeros((3, SIDE, SIDE), np.float32), "latency"),
        (np.zeros((2, 3, 5, SIDE), np.float32), "latency"),
        (np.zeros((2, 3, SIDE, SIDE), np.uint8), "latency"),
        (["none.jpg"], "latency"),
    ],
)
def test_requests_that_make_no_sense_are_refused(images, order, runners):
    with pytest.raises(RunnerError):
        runners["onnxruntime"].answer(images, order)


def test_sizes_of_batches_are_few_and_near():
    sizes = {size_for(count) for count in range(1, 65)}
    assert sorted(sizes) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(count <= size_for(count) < 1.5 * count for count in range(1, 500))


def test_a_pool_gives_back_the_rows_put_in():
    pool, given = Pool(8), np.arange(7)
    for rows in ([0, 1, 2, 3, 4], [6, 5], []):
        if rows:
            pool.put({"a": given, "b": given[:, None] * np.ones(3)}, np.array(rows))
    state, count = pool.take(4)
    assert (state["a"].tolist(), count) == ([3, 4, 6, 5], 4)
    state, count = pool.take(4)
    assert (state["b"][:count, 2].tolist(), count, pool.fill) == ([0, 1, 2], 3, 0)
    assert pool.take(4)[1] == 0


def test_a_stage_sees_new_rows_in_bound_arrays(runners, batch):
    rows = {"images": batch.numpy()[:3].copy()}
    for runner in runners.values():
        first = runner.stages[0](rows)[0].copy()
        rows["images"][:] = batch.numpy()[3:6]
        second = runner.stages[0](rows)[0].copy()
        other = runner.stages[0]({"images": batch.numpy()[3:6]})[0]
        assert (first != second).all() and (second == other).all()
        rows["images"][:] = batch.numpy()[:3]


# Folders


def refused(folder, *words, match=".", **named):
    with pytest.raises(RunnerError, match=match) as error:
        Runner(folder, *words, **named)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500
    return str(error.value)


def leaves_of(value, path=()):
    """The places of everything in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield from leaves_of(part, (*path, key))


ODD = [None, True, -1, 0, 7, 0.5, 10**400, float("nan"), "", "x", "\0", "\ud800", "a\nb", "../x", "/x"]
ODD += ["x" * 5000, [], [[]], {}]


def test_no_damage_of_a_manifest_is_another_error(copied):
    """Every entry is replaced or dropped in turn; what is no error answers as before."""
    path, rows = copied / "manifest.json", np.ones((1, 3, SIDE, SIDE), np.float32)
    manifest = json.loads(path.read_text())
    names = Runner(copied, "onnxruntime", threads=1).class_names
    odd, accepted = itertools.cycle(ODD), []
    for place in leaves_of(manifest):
        *above, key = place or [None]
        for value in [next(odd) for _ in range(2)] + ["dropped"]:
            damaged = copy.deepcopy(manifest)
            holder = damaged
            for step in above:
                holder = holder[step]
            if key is None:
                damaged = value
            elif value != "dropped":
                holder[key] = value
            else:
                del holder[key]
            if damaged == manifest:
                continue
            path.write_text(json.dumps(damaged))
            try:
                runner = Runner(copied, "onnxruntime", threads=1)
                runner.answer(rows)
            except RunnerError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 500
            else:
                accepted.append(place)
                assert (
                    key in ("bf16", "files", "model_hash") or "view" in place or runner.class_names != names
                )
    assert len(accepted) < 60


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\xff", "{}", '{"schema": 1}'])
def test_what_is_no_manifest_is_refused(text, tmp_path):
    refused(tmp_path, match="cannot be read: No such file")
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path)


@pytest.mark.parametrize("name", ["policy.json", "stage0.onnx", "stage2.onnx"])
def test_files_that_were_changed_are_refused(name, copied):
    content = (copied / name).read_bytes()
    for damaged in (content + b" ", content[:-7], b""):
        (copied / name).write_bytes(damaged)
        refused(copied, match=f"{name} is not the file that was exported")
    (copied / name).unlink()
    refused(copied, match=f"{name} cannot be read: No such file")
    (copied / "elsewhere").write_bytes(content)
    (copied / name).symlink_to(copied / "elsewhere")
    refused(copied, match=f"{name} is not the file that was exported")


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_that_cannot_run_are_refused(backend, copied, network):
    path = copied / "stage1.onnx"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"onnx" * 100):
        path.write_bytes(damaged)
        refused(rehashed(copied), backend, match=r"stage1\.onnx")
    path.write_bytes((copied / "stage2.onnx").read_bytes())
    refused(rehashed(copied), backend, match=r"stage1\.onnx has")
    path.write_bytes(content)
    refused(rehashed(copied, class_names=["ant", "bee"]), backend, match="the manifest says .* \\(2,\\)")


def test_paths_stay_in_the_folder(copied):
    outside = copied.parent / "policy.json"
    shutil.copy(copied / "policy.json", outside)
    manifest = json.loads((copied / "manifest.json").read_text())
    for name in ("../policy.json", str(outside), "sub/../../policy.json", "C:policy.json", "..\\policy.json"):
        manifest |= {
            "policies": {"fp32": name},
            "files": {**manifest["files"], name: manifest["files"]["policy.json"]},
        }
        (copied / "manifest.json").write_text(json.dumps(manifest))
        refused(copied, match="is not in the folder")


def test_another_policy_must_fit(copied, policy, tmp_path):
    other = tmp_path / "other.json"
    Policy((1e8, 0.5, -1e8), off=(0,)).save(other)
    assert (Runner(copied, policy=other).answer(np.ones((3, 3, SIDE, SIDE), np.float32)).exits > 0).all()
    for wrong in (Policy((0.5, 0.0)), Policy((0.5,) * 4), Policy((0.5,) * 3, model_hash="ab" * 32)):
        wrong.save(other)
        assert str(other) in refused(copied, policy=other)
    refused(copied, policy=tmp_path / "none.json", match="cannot be read")
    # A folder without the first exit takes none that needs it.
    manifest = json.loads((copied / "manifest.json").read_text())
    rows = manifest["stages"]
    for k, row in enumerate(rows):
        row["exit"] = k + 1
    rehashed(copied, stages=rows)
    refused(copied, match="is for exits")
    Policy((1e8, 0.5, 0.5, -1e8), off=(0,)).save(other)
    assert Runner(copied, policy=other).exits == [1, 2, 3]


def test_stages_that_nobody_reaches_may_be_absent(copied, tmp_path):
    rows = json.loads((copied / "manifest.json").read_text())["stages"]
    other = tmp_path / "other.json"
    rehashed(copied, stages=rows[:2])
    refused(copied, match="is for exits")
    for thresholds in ((0.5, -1e8, -1e8), (-1e8, 0.5, -1e8)):
        Policy(thresholds).save(other)
        answers = Runner(copied, policy=other).answer(np.full((3, 3, SIDE, SIDE), np.nan, np.float32))
        assert answers.exits.tolist() == [1] * 3  # what is no number leaves at the last exit there is
    Policy((0.5, 0.5, -1e8)).save(other)
    refused(copied, policy=other, match="is for exits")


def test_processors_are_those_of_the_container(tmp_path):
    quotas = {"a/cpu.max": "150000 100000", "cpu.max": "max 100000", "cpu/cpu.cfs_quota_us": "250000"}
    quotas |= {
        "cpu/cpu.cfs_period_us": "100000",
        "cpu/b/cpu.cfs_quota_us": "-1",
        "cpu/b/cpu.cfs_period_us": "1",
    }
    for name, text in quotas.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert quota(tmp_path, "0::/a/of/somebody\n") == 1.5
    assert quota(tmp_path, "2:memory:/a\n1:cpu,cpuacct:/b\n0::/\n") == 2.5
    assert quota(tmp_path, "0::/") == math.inf and 1 <= processors() <= os.cpu_count()


def test_other_slips_are_said(copied, monkeypatch):
    refused(copied, "tensorrt", match="backend 'tensorrt'; accepted: auto, openvino, onnxruntime")
    refused(copied, precision="int8", match="precision 'int8'; accepted: fp32, bf16")
    refused(copied, "onnxruntime", "bf16", match="no bf16 on CPU")
    refused(copied, micro_batch=0, match="micro_batch is 0; accepted: 1 and more")
    refused(copied, threads=-1, match="threads is -1")
    monkeypatch.setattr("deploy.runtimes.find_spec", lambda name: None)
    refused(copied, match="openvino or onnxruntime is needed: pip install onnxruntime")
    monkeypatch.setattr("deploy.runtimes.find_spec", lambda name: name == "onnxruntime" or None)
    assert type(runtime("auto", "fp32", 1)).__name__ == "Onnx"


# The command line


@pytest.fixture
def pictures(tmp_path):
    names = [f"{i}.png" for i in range(7)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 5), (30 * i, 200 - 25 * i, 90)).save(tmp_path / name)
    return [str(tmp_path / name) for name in names]


def run(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["runner.py", *map(str, words)])
    code = 0
    try:
        program.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def test_the_command_line_answers_in_order(exported, pictures, capsys, monkeypatch, runners):
    monkeypatch.setattr(program, "WINDOW", 1)
    runner = runners["onnxruntime"]
    runner.micro_batch = 3
    expected = runner.answer(pictures)
    assert len(set(expected.exits)) > 1
    words = "--json", "--backend", "onnxruntime", "--threads", "1", "--micro_batch", "3"
    code, said, errors = run(capsys, monkeypatch, exported, *pictures, *words)
    assert (code, errors) == (0, [])
    for rows in (rows_of(runner, pictures, "throughput"), map(json.loads, said)):
        for i, row in enumerate(rows):
            assert row["image"] == pictures[i] and row["exit"] == expected.exits[i]
            assert row["class"] == ["ant", "bee", "cow", "dog"][expected.classes[i]]
            assert row["confidence"] == pytest.approx(expected.confidence[i], abs=1e-4)
        assert i == len(pictures) - 1
    code, said, _ = run(capsys, monkeypatch, exported, pictures[0], "--backend", "onnxruntime")
    assert code == 0 and said[0].startswith(f"{pictures[0]}: ")


def test_the_command_line_refuses_before_it_answers(exported, pictures, capsys, monkeypatch, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for wrong in ("none.jpg", "text.jpg", "."):
        code, rows, errors = run(capsys, monkeypatch, exported, *pictures, tmp_path / wrong)
        assert (code, rows, len(errors)) == (2, [], 1) and errors[0].startswith("error: ")
    code, rows, errors = run(capsys, monkeypatch, tmp_path, *pictures)
    assert (code, rows, len(errors)) == (2, [], 1)


def site_packages(names):
    """The packages in site-packages that belong to distributions."""
    return {Path(file.locate()).resolve().parents[len(file.parts) - 2] for name in names for file in files(name) or () if len(file.parts) > 1 and ".." not in file.parts}  # fmt: skip


def test_it_runs_where_nothing_else_is_installed(exported, pictures, tmp_path):
    """In a virtual environment with NumPy, Pillow and onnxruntime, from the folder alone."""
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for package in site_packages(["numpy", "pillow", "onnxruntime"]):
        (site / package.name).symlink_to(package)
    moved = Path(shutil.copytree(exported, tmp_path / "moved"))

    def python(*words):
        command = [tmp_path / "env" / "bin" / "python", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={}, timeout=60)

    absent = (
        "import importlib.util as u; print([u.find_spec(n) for n in ('torch', 'openvino', 'onnx', 'deploy')])"
    )
    assert python("-c", absent).stdout == "[None, None, None, None]\n"
    done = python(moved / "runner.py", moved, *pictures, "--json")
    assert done.returncode == 0 and not done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = Runner(exported).answer(pictures)
    assert [row["exit"] for row in rows] == expected.exits.tolist()


def test_signals_arrive_when_runners_of_openvino_have_gone(exported):
    """Two of its cores that go in the order in which they came would leave a freed stack for signals."""
    pytest.importorskip("openvino")
    arrived = []
    before = signal.signal(signal.SIGUSR1, lambda *_: arrived.append("signal"))
    runners = [Runner(exported, "openvino") for _ in range(2)]
    for one in runners:
        one.answer(np.stack([one.prepare(Image.new("RGB", (8, 8)))]))
    del one
    runners.pop(0)
    gc.collect()
    runners.pop(0)
    gc.collect()
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert arrived == ["signal"]
