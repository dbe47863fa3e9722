"""Stages in int8: weights and activations quantised after training, calibrated on images.

NNCF's quantisation of ONNX files, which onnxruntime and OpenVINO both run. Its correction of biases is off:
with it, the exits of an MSDNet gave 3 % more other answers than in fp32.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from deploy.decide import Array, State, only
from deploy.folder import IMAGES
from deploy.programs import check_packages
from utils import UserError

LEAST = 48  # images for calibration; an MSDNet was as good with 60 as with 250
CALIBRATING = 300  # that are asked for
BATCH = 16  # of them at once
NEEDED = "nncf", "onnx", "onnxruntime"


def quantise(folder: Path, stages: Sequence[Mapping[str, Any]], images: Array) -> list[str]:
    """Writes `stageK.int8.onnx` into the folder, for every stage in fp32 there; returns their names.

    `stages` are the rows of the manifest (`inputs`, `outputs`, and the file `fp32`), `images` float32
    [N, 3, H, W] for calibration as the network reads them, no test images. A stage is calibrated on what the
    stages before make of all of these, whether or not they would leave before: the few that stay show less
    of the range, and answers were farther from fp32's, also those of the samples that stay. Raises ValueError
    for too few images, for values that are not finite, and where a package is missing.
    """
    check_packages("int8", NEEDED)
    if len(images) < LEAST:
        raise UserError(f"{len(images)} images to calibrate int8 on; accepted: {LEAST} and more")
    import onnx

    state: State = {IMAGES: images}
    models = []
    for k, stage in enumerate(stages):
        for name, array in state.items():
            if not np.isfinite(array).all():
                raise UserError(f"int8 calibration: {name} are not finite numbers before stage {k}")
        names = [one["name"] for one in stage["inputs"]]
        parts = []
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            parts.append({name: state[name][rows] for name in names})
        models.append(_quantised(folder / stage["fp32"], parts))
        later = {one["name"] for row in stages[k + 1 :] for one in row["inputs"]}
        state = only(state | _made(folder, stage, parts), later)
    _hand_over(models)
    names = [stage["fp32"].replace(".onnx", ".int8.onnx") for stage in stages]
    for model, name in zip(models, names, strict=True):
        onnx.save(model, folder / name)
    return names


def _quantised(path: Path, parts: Sequence[State]) -> Any:
    """The model with quantised weights and activations, calibrated on inputs."""
    import nncf
    import onnx

    nncf.set_log_level(logging.ERROR)
    settings = nncf.AdvancedQuantizationParameters(batchwise_statistics=True, disable_bias_correction=True)
    with redirect_stdout(io.StringIO()):  # it shows its progress
        return nncf.quantize(
            onnx.load(path), nncf.Dataset(parts), subset_size=len(parts), advanced_parameters=settings
        )


def _made(folder: Path, stage: Mapping[str, Any], parts: Sequence[State]) -> State:
    """The tensors that a stage makes of its inputs in fp32."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / stage["fp32"], providers=["CPUExecutionProvider"])
    names = [one["name"] for one in stage["outputs"]]
    if not names:
        return {}
    columns = zip(*(session.run(names, part) for part in parts), strict=True)
    return dict(zip(names, map(np.concatenate, columns), strict=True))


def _hand_over(models: Sequence[Any]) -> None:
    """Hands maps over in one byte a value, by the levels at which the first stage that reads one rounds it.

    Other tensors, such as tokens, keep their type: what adds to them over many layers needs it.
    """
    levels: dict[str, tuple[Any, Any]] = {}
    for model in models:
        for end in model.graph.input:
            if len(end.type.tensor_type.shape.dim) == 4 and end.name != IMAGES:
                found = _levels(model.graph, end.name)
                if found and end.name not in levels:
                    levels[end.name] = found
    for model in models:
        for end in (*model.graph.input, *model.graph.output):
            if end.name in levels:
                _round(model.graph, end, levels[end.name])


def _levels(graph: Any, name: str) -> tuple[Any, Any] | None:
    """Scale and zero point by which a tensor is rounded where it is read, as constants of the graph."""
    constants = {one.name: one for one in graph.initializer}
    for node in graph.node:
        if name in node.input:
            if node.op_type == "QuantizeLinear":
                return constants[node.input[1]], constants[node.input[2]]
            if node.op_type == "Transpose" and (found := _levels(graph, node.output[0])):
                return found
    return None


def _round(graph: Any, end: Any, levels: tuple[Any, Any]) -> None:
    """Has an end of the graph hold the rounded values; inside they are floats as before."""
    from onnx import TensorProto, helper

    name = end.name
    inside = f"{name}_inside"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, one in enumerate(names):
                if one == name:
                    names[i] = inside
    known = []
    for part, constant in zip(("scale", "zero"), levels, strict=True):
        copy = TensorProto()
        copy.CopyFrom(constant)
        copy.name = f"{name}_{part}"
        graph.initializer.append(copy)
        known.append(copy.name)
    end.type.tensor_type.elem_type = levels[1].data_type
    if end in graph.input:
        graph.node.insert(0, helper.make_node("DequantizeLinear", [name, *known], [inside]))
    else:
        graph.node.append(helper.make_node("QuantizeLinear", [inside, *known], [name]))
