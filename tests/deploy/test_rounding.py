"""Quantised stages round once where maps are made; joined stages answer as those that they are made of."""

import shutil
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from deploy.folder import IMAGES, StageFiles
from deploy.joining import join, joined
from deploy.manifest import Manifest
from deploy.manifest import StageFiles as Files
from deploy.quantize import quantise
from deploy.rounding import round_once
from deploy.runtimes import runtime
from deploy.stages import named_stages


@pytest.fixture(scope="module")
def images():
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(exported, images, tmp_path_factory):
    """A network of two stages in int8."""
    path = tmp_path_factory.mktemp("int8") / "tiny"
    shutil.copytree(exported, path)
    found = Manifest.load(path)
    names = quantise(path, [asdict(one) for one in found.stages], images.numpy())
    pairs = zip(found.stages, names, strict=True)
    replace(found, stages=tuple(replace(one, int8=name) for one, name in pairs)).save(path)
    return path


def all_logits(stages, folder, images, backend):
    """Logits [K, N, C] of the stages in a folder."""
    found = runtime(backend, "int8", 1)
    state = {IMAGES: images.numpy()}
    logits = []
    for k, one in enumerate(stages):
        path = folder / f"stage{k}.int8.onnx"
        answers, made = found.stage(StageFiles(one.exit, one.inputs, one.outputs, path), 3)(state)
        logits.append(answers.copy())
        state |= {name: array.copy() for name, array in made.items()}
    return np.stack(logits)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_joined_stages_answer_as_their_parts(tiny, folder, tmp_path, images, backend):
    apart = all_logits(Manifest.load(folder).stages, folder, images, backend)
    stages = named_stages(tiny.network, images, (0,))
    rows = [asdict(Files(one.exit, tuple(one.inputs), tuple(one.outputs), "", "")) for one in stages]
    assert joined(folder, tmp_path, rows) == ["stage0.int8.onnx"]
    whole = all_logits(stages, tmp_path, images, backend)
    np.testing.assert_allclose(whole, apart[1:], rtol=1e-4, atol=1e-5)
    graphs = [ir.load(folder / f"stage{k}.int8.onnx").graph for k in range(2)]
    apart_kinds = Counter(node.op_type for graph in graphs for node in graph)
    kinds = Counter(node.op_type for node in ir.load(tmp_path / "stage0.int8.onnx").graph)
    assert kinds["Conv"] == apart_kinds["Conv"] and kinds["Gemm"] == 2  # the second stage reads both
    assert kinds["DequantizeLinear"] < apart_kinds["DequantizeLinear"]
    first = join([ir.load(folder / "stage0.int8.onnx")], [IMAGES], [])
    assert len(first.graph.outputs) == 1 and first.graph.num_nodes() < graphs[0].num_nodes()


def joined_maps(*levels):
    """Two maps, joined, and the sum of what two readers round that to, by these scales and zero points."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    given = [ir.Value(name=name, type=floats, shape=ir.Shape((1, 2, 16))) for name in "ab"]
    first, second = (ir.node("Relu", [value]) for value in given)
    whole = ir.node("Concat", [*first.outputs, *second.outputs], {"axis": 1})
    nodes = [first, second, whole]
    constants = []
    for i, (scale, zero) in enumerate(levels):
        arrays = {f"scale{i}": np.float32(scale), f"zero{i}": np.uint8(zero)}
        known = [ir.Value(name=name, const_value=ir.tensor(one, name=name)) for name, one in arrays.items()]
        constants += known
        nodes.append(ir.node("QuantizeLinear", [*whole.outputs, *known], {"axis": 1}))
        nodes.append(ir.node("DequantizeLinear", [*nodes[-1].outputs, *known], {"axis": 1}))
    made = ir.Value(name="sum", type=floats, shape=ir.Shape((1, 4, 16)))
    nodes.append(ir.node("Add", [*nodes[4].outputs, *nodes[6].outputs], outputs=[made]))
    graph = ir.Graph(given, [made], nodes=nodes, initializers=constants, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def rounded(model):
    """The nodes that round, and what they round."""
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    return nodes, [node.inputs[0].producer().op_type for node in nodes]


def test_one_scale_is_that_of_the_widest_range():
    model = joined_maps((0.1, 0), (0.2, 128))
    round_once([model])
    nodes, sources = rounded(model)
    assert sources == ["Relu", "Relu"]
    for node in nodes:  # from -25.6 to 25.5
        assert node.inputs[1].const_value.numpy() == pytest.approx(51.1 / 255)
        assert node.inputs[2].const_value.numpy() == 128
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    values = np.linspace(-3, 12, 32, dtype=np.float32).reshape(1, 2, 16)
    (found,) = session.run(None, {"a": values, "b": values})
    expected = 2 * np.concatenate([values, values], 1).clip(0)
    assert np.abs(found - expected).max() <= 51.1 / 255


def test_what_a_reader_rounds_by_channel_stays_as_it_is():
    model = joined_maps((0.1, 0), ([0.1, 0.2, 0.3, 0.4], [0] * 4))
    round_once([model])
    assert rounded(model)[1] == ["Concat", "Concat"]
