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
    import onnx_ir

    from deploy.rounding import round_once

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
        models.append(onnx_ir.from_proto(_quantised(folder / stage["fp32"], parts)))
        later = {one["name"] for row in stages[k + 1 :] for one in row["inputs"]}
        state = only(state | _made(folder, stage, parts), later)
    round_once(models)
    names = [stage["fp32"].replace(".onnx", ".int8.onnx") for stage in stages]
    for model, name in zip(models, names, strict=True):
        onnx_ir.save(model, folder / name)
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
