"""A stage as files: for PyTorch, for its compiler, for any runtime that reads ONNX."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from adaptive.inference import fold_batch_norm
from deploy.stages import LOGITS, Stage
from models import MultiExitModel
from models.tuning import Tunable
from utils import UserError

Program = torch.export.ExportedProgram


def portable(model: MultiExitModel) -> MultiExitModel:
    """A copy for other runtimes: batch norm folded, and the operations that all of them compute alike."""
    network = fold_batch_norm(model).cpu()
    for weights in network.parameters():
        weights.data = weights.data.contiguous()  # files hold them in plain order
    for module in network.modules():
        if isinstance(module, Tunable):
            module.choose_portable()
    return network


def check_packages(what: str, names: Sequence[str]) -> None:
    """Raises ValueError for packages that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install -r requirements-deploy.txt")


def program_of(stage: Stage) -> Program:
    """The stage as a program for any number of images, without where its code lies on this machine."""
    batch = torch.export.Dim("batch", min=1)
    examples = tuple(torch.randn(2, *one.shape, dtype=getattr(torch, one.dtype)) for one in stage.inputs)
    shapes = {"tensors": tuple({0: batch} for _ in examples)}
    with torch.no_grad():
        program = torch.export.export(stage, examples, dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def save_onnx(program: Program, stage: Stage, path: Path) -> None:
    """Writes the program as ONNX; its inputs and outputs have the names of the stage's tensors."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    written = torch.onnx.export(
        program,
        input_names=[one.name for one in stage.inputs],
        output_names=[LOGITS, *(one.name for one in stage.outputs)],
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    ClearMetadataAndDocStringPass()(written.model)  # lines of code and the paths of their files
    written.model.graph.name = path.stem
    written.save(path)


def save_program(program: Program, path: Path) -> None:
    """Writes the program as torch.export.load reads it; the example inputs are left out."""
    examples, program.example_inputs = program.example_inputs, None
    torch.export.save(program, path)
    program.example_inputs = examples


def save_compiled(program: Program, path: Path) -> None:
    """Compiles the program for this machine's processor, for torch._inductor.aoti_load_package."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
