"""int8 stages answer nearly as fp32's do, in both runtimes, and hand maps over in one byte a value."""

import importlib.util
from dataclasses import asdict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.folder import IMAGES, Port, StageFiles
from deploy.quantize import LEAST, quantise
from deploy.runtimes import runtime
from utils import UserError

MAP, TOKENS = Port("map", (8, 8, 8), "float32"), Port("tokens", (8,), "float32")
STAGES = [
    {
        "exit": 0,
        "inputs": [Port(IMAGES, (3, 8, 8), "float32")],
        "outputs": [MAP, TOKENS],
        "fp32": "stage0.onnx",
    },
    {"exit": 1, "inputs": [MAP, TOKENS], "outputs": [], "fp32": "stage1.onnx"},
]
NODES = [
    [("Conv", "images w", "c"), ("Relu", "c", "r"), ("Transpose", "r", "map")]
    + [("ReduceMean", "r axes", "tokens"), ("MatMul", "tokens h", "logits")],
    [("Transpose", "map", "t"), ("Conv", "t w", "c"), ("Relu", "c", "r"), ("ReduceMean", "r axes", "m")]
    + [("Add", "m tokens", "s"), ("MatMul", "s h", "logits")],
]
ATTRIBUTES = [
    {"Conv": {"pads": [1] * 4}, "Transpose": {"perm": [0, 2, 3, 1]}, "ReduceMean": {"keepdims": 0}},
    {"Conv": {"pads": [1] * 4}, "Transpose": {"perm": [0, 3, 1, 2]}, "ReduceMean": {"keepdims": 0}},
]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((LEAST, 3, 8, 8), np.float32)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """Two stages in fp32 and int8: a convolution each, with a map and a vector from the first to the second."""
    path, rng = tmp_path_factory.mktemp("quantised"), np.random.default_rng(1)

    def ends(ports):
        return [
            helper.make_tensor_value_info(one.name, TensorProto.FLOAT, ["batch", *one.shape]) for one in ports
        ]

    for k, stage in enumerate(STAGES):
        weights = {
            "w": rng.standard_normal((8, 3 if k == 0 else 8, 3, 3), np.float32),
            "h": rng.standard_normal((8, 4), np.float32),
            "axes": np.array([2, 3]),
        }
        nodes = [
            helper.make_node(kind, given.split(), [made], **ATTRIBUTES[k].get(kind, {}))
            for kind, given, made in NODES[k]
        ]
        outputs = ends([Port("logits", (4,), "float32"), *stage["outputs"]])
        constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        graph = helper.make_graph(nodes, f"stage{k}", ends(stage["inputs"]), outputs, constants)
        opsets = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path / stage["fp32"])
    rows = [
        {**one, **{side: [asdict(end) for end in one[side]] for side in ("inputs", "outputs")}}
        for one in STAGES
    ]
    assert quantise(path, rows, images) == ["stage0.int8.onnx", "stage1.int8.onnx"]
    return path


def run(folder, backend, precision, images):
    """Logits of both stages, and what the first makes."""
    found = runtime(backend, precision, 1)
    state, logits = {IMAGES: images}, []
    for k, one in enumerate(STAGES):
        path = folder / f"stage{k}{'.int8' * (precision == 'int8')}.onnx"
        answers, made = found.stage(StageFiles(k, one["inputs"], one["outputs"], path), 4)(state)
        logits.append(answers.copy())
        state |= {name: array.copy() for name, array in made.items()}
    return logits, state


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_answers_are_nearly_those_of_fp32(folder, images, backend):
    exact, state = run(folder, "onnxruntime", "fp32", images)
    found, held = run(folder, backend, "int8", images)
    for answers, expected in zip(found, exact, strict=True):
        assert 0 < np.abs(answers - expected).mean() / np.abs(expected).mean() < 0.1
    assert held["tokens"].dtype == np.float32
    levels = held["map"]  # what the map is handed over in: rounded to one byte, which is used
    assert levels.dtype == np.uint8 and levels.shape == state["map"].shape and levels.max() > 200
    scale = np.median(state["map"][levels > 100] / levels[levels > 100])
    assert np.abs(scale * levels - state["map"]).mean() < scale


def test_both_ends_round_by_the_same_levels(folder):
    levels = []
    for k in range(2):
        graph = onnx.load(folder / f"stage{k}.int8.onnx").graph
        values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        weights = [array for array in values.values() if array.ndim == 4]
        assert [array.dtype for array in weights] == [np.int8]
        (node,) = (one for one in graph.node if "map" in (*one.input, *one.output))
        assert node.op_type == ("QuantizeLinear", "DequantizeLinear")[k]
        levels.append([values[name] for name in node.input[1:]])
    assert levels[0] == levels[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda images: images[: LEAST - 1],
            f"{LEAST - 1} images to calibrate int8 on; accepted: {LEAST} and more",
        ),
        (lambda images: np.where(images > 3, np.nan, images), "int8 calibration: images are not finite"),
    ],
)
def test_images_that_calibrate_nothing(tmp_path, images, change, message):
    with pytest.raises(UserError, match=message):
        quantise(
            tmp_path, [{"inputs": [{"name": IMAGES}], "outputs": [], "fp32": "stage0.onnx"}], change(images)
        )


def test_a_package_is_missing(tmp_path, images, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else find(name))
    with pytest.raises(UserError, match="int8 needs nncf: pip install -r requirements-deploy.txt"):
        quantise(tmp_path, [], images)
