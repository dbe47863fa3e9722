"""Backends answer as the network does: every exit, early exit in both orders, every exit alone."""

import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from adaptive.backend import tuned
from adaptive.inference import run_adaptive, run_single
from adaptive.policy import Policy
from deploy import backends, compiled, quantize
from deploy.backends import Exports, fastest, open_backend
from deploy.compiled import Compiled
from deploy.runner import Runner
from experiment.open import Opened
from experiment.recipe import Recipe
from loading.transforms import View
from models import MultiExitModel

NAMES = "eager", "compile", "onnxruntime", "openvino"


class Small(MultiExitModel):
    """Two exits; the second stage reads a map and the logits of the first."""

    num_exits = 2

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)])
        self.heads = nn.ModuleList([nn.Linear(6, 5), nn.Linear(11, 5)])

    def begin(self, batch):
        return (batch,)

    def trunk(self, k, state):
        maps = self.convs[k](state[0]).relu()
        return torch.cat([maps.mean((2, 3)), *state[1:]], 1), (maps,)

    def head(self, k, features):
        return 4 * self.heads[k](features)

    def carry(self, k, state, logits):
        return (*state, logits) if k == 0 else ()


@pytest.fixture(scope="module")
def opened():
    torch.manual_seed(0)
    arch = {"name": "small", "options": {}, "num_classes": 5}
    view = View(8, (0.0,) * 3, (1.0,) * 3, interpolation="bicubic")
    return Opened(Small().eval(), arch, Recipe(), view, None, "", "weights", tuple("abcde"))


@pytest.fixture(scope="module")
def batch():
    return torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exports(opened):
    return Exports(opened)


@pytest.fixture(scope="module")
def made(exports):
    """Backends by name; what is compiled is what would be, without waiting for the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compiled", lambda module, **_: module)
        yield {name: open_backend(name, "fp32", exports) for name in NAMES}


@pytest.fixture(scope="module")
def half(opened, batch):
    """A policy by which about half of the images leave early."""
    with torch.inference_mode():
        ranks = opened.network(batch)[0].softmax(-1).amax(-1).sort().values
    return Policy.of([(ranks[4] + ranks[5]).item() / 2, -1e8])


assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_exit(made, opened, batch, name):
    with torch.inference_mode():
        found, expected = made[name].network()(batch), opened.network(batch)
    assert_close(found, expected)


@pytest.mark.parametrize("order", ["latency", "throughput"])
@pytest.mark.parametrize("name", NAMES)
def test_early_exit(made, opened, batch, half, name, order):
    logits, exits = made[name].early(half, order)(batch, 4)
    expected, left = run_adaptive(opened.network, batch, half)
    assert exits.tolist() == left.tolist() and 0 < (left == 0).sum() < 11
    assert_close(logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_exit_alone(made, opened, batch, name):
    logits, exits = made[name].alone(0)(batch, 4)
    assert_close(logits, run_single(opened.network, batch, 0))
    assert exits.tolist() == [0] * 11


def test_stages_that_are_switched_off_are_merged(made, opened, batch):
    for name in ("eager", "compile"):
        (stage,) = made[name].stages((0,))
        assert_close(stage(batch)[0], opened.network(batch)[1])


def test_the_fastest_is_picked_of_what_is_installed(exports, batch, monkeypatch):
    times = {"eager": 3.0, "onnxruntime": 2.0, "openvino": 1.0}
    monkeypatch.setattr(backends, "interleaved", lambda calls, **_: {one: times[one.name] for one in calls})
    backend, line = fastest("fp32", exports, batch)
    assert backend.name == "openvino"
    assert line == (
        "backend openvino, in fp32: images/s through all exits: eager 4, onnxruntime 6, openvino 11"
    )
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert fastest("fp32", exports, batch)[0].name == "eager"
    with pytest.raises(ValueError, match="^--backend auto: none for int8 is installed: pip install -r req"):
        fastest("int8", exports, batch)


@pytest.mark.parametrize(
    ("name", "precision", "line"),
    [
        ("onnxruntime", "bf16", "--precision bf16: accepted with --backend onnxruntime: fp32, int8"),
        ("openvino", "int8", "--backend openvino in int8 needs onnx nncf: pip install onnx nncf"),
    ],
)
def test_what_cannot_be_had_is_said(exports, monkeypatch, name, precision, line):
    monkeypatch.setattr(backends, "find_spec", lambda name: name not in ("onnx", "nncf"))
    with pytest.raises(ValueError) as error:
        open_backend(name, precision, exports)
    assert str(error.value) == line


def test_other_runtimes_run_on_the_processor(opened):
    elsewhere = Exports(replace(opened, network=Small().to("meta")))
    with pytest.raises(ValueError, match="^--backend openvino runs on the processor, the network on meta: "):
        open_backend("openvino", "fp32", elsewhere)


def test_bf16_gives_logits_in_fp32(opened, batch):
    for network in (tuned(opened.network, "bf16"), Compiled(opened.network, (3, 8, 8), "bf16").model):
        for found, expected in zip(network(batch), opened.network(batch), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert opened.network.convs[0].weight.dtype == torch.float32


def test_code_compiled_for_a_cpu_takes_any_number_of_images(opened, batch, monkeypatch):
    # Guards are real; making code takes half a minute.
    monkeypatch.setattr(compiled, "compiled", partial(torch.compile, backend="aot_eager"))
    run = Compiled(opened.network, (3, 8, 8)).alone(0)
    expected = run_single(opened.network, batch, 0)
    assert_close(run(batch, 11)[0], expected)
    with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
        assert_close(run(batch, 4)[0], expected)
        assert_close(run(batch.clone(), 4)[0], expected)  # a tensor of another kind
        with pytest.raises(RuntimeError, match="recompile"):
            run(batch, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("order", ["latency", "throughput"])
def test_recorded_graphs_on_a_gpu(opened, batch, half, order):
    expected, left = run_adaptive(opened.network, batch, half)
    backend = Compiled(copy.deepcopy(opened.network).cuda(), (3, 8, 8))
    for _ in range(2):
        logits, exits = backend.early(half, order)(batch.cuda(), 4)
        assert exits.tolist() == left.tolist()
        assert_close(logits.cpu(), expected)


@pytest.mark.usefixtures("costs_once", "no_pictures")
@pytest.mark.parametrize(("backend", "precision"), [("compile", "fp32"), ("eager", "bf16")])
def test_an_evaluation_in_a_backend(trained, evaluate_into, tmp_path, monkeypatch, backend, precision):
    monkeypatch.setattr(compiled, "compiled", lambda module, **_: module)
    words = f"--backend {backend} --precision {precision} --mode runtime --policies quotas --micro_batch 4"
    out = evaluate_into(tmp_path, trained / "checkpoint-last.pth", *words.split())
    content = json.loads((out / "record.json").read_text())
    assert content["provenance"]["backend"] == f"{backend}, {precision}"
    assert f"{backend}, {precision}; medians" in (out / "report.html").read_text()
    assert len(content["runtime"]["table"]) == 6


def test_what_is_exported_in_int8_is_what_was_evaluated(
    trained, evaluate_into, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(quantize, "LEAST", 8)
    words = "--backend openvino --precision int8 --mode dynamic --policies quotas --export"
    out = evaluate_into(
        tmp_path / "out", trained / "checkpoint-last.pth", *words.split(), tmp_path / "folder"
    )
    expected = json.loads((out / "record.json").read_text())["routing"]["shares"]
    answers = Runner(tmp_path / "folder", "openvino", "int8").answer(sorted(images.glob("val/*/*")))
    shares = np.bincount(answers.exits, minlength=2) / len(answers.exits)
    assert shares.tolist() == expected and shares.min() > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--backend openvino --use_amp true --amp_dtype bf16",
            "openvino --precision fp32: not with --use_amp true",
        ),
        (
            "--backend openvino --precision int8 --calib none --router_threshold 0.5",
            "int8: there are no images to calibrate it on",
        ),
    ],
)
def test_flags_that_do_not_go_together(trained, evaluate_into, tmp_path, words, line):
    with pytest.raises(ValueError, match=line):
        evaluate_into(tmp_path, trained / "checkpoint-last.pth", *words.split())
