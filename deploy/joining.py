"""Neighbouring quantised stages as one, for a policy that has the exits between them switched off."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.manifest import Manifest
from deploy.rounding import BACK, ROUND
from deploy.stages import LOGITS


def joined(source: Path, folder: Path, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes `stageK.int8.onnx` for stages, as in the manifest, from a folder that is cut at every exit.

    They round where those do. ONNX Runtime then gives the same answers; OpenVINO moves scales across
    operations, so its answers are a little unlike for each way of cutting. Returns the names.
    """
    parts = Manifest.load(source).stages
    bounds = [-1, *(stage["exit"] for stage in stages)]
    names = []
    for k, ((before, last), stage) in enumerate(zip(pairwise(bounds), stages, strict=True)):
        ours = [one for one in parts if before < one.exit <= last]
        ends = [[one["name"] for one in stage[side]] for side in ("inputs", "outputs")]
        files = [source / str(one.int8) for one in ours]
        name = f"stage{k}.int8.onnx"
        if len(ours) == 1 and len(ours[0].outputs) == len(ends[1]):
            shutil.copyfile(files[0], folder / name)
        else:
            ir.save(join([ir.load(file) for file in files], *ends), folder / name)
        names.append(name)
    return names


def join(models: Sequence[ir.Model], inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """One model from these inputs to the logits of the last model and these outputs, made of the models.

    What none of them needs for that is left out. The models are used up.
    """
    whole, *others = models
    graph = whole.graph
    known = {one.name: one for one in (*graph.inputs, *graph.outputs)}
    for number, other in enumerate(others):
        known.pop(LOGITS).name = f"logits_{number}"
        _append(graph, other.graph, known, f"part{number}")
    graph.inputs[:] = [known[name] for name in inputs]
    graph.outputs[:] = [known[name] for name in (LOGITS, *outputs)]
    RemoveUnusedNodesPass()(whole)
    for one in (made for node in graph for made in node.outputs if not made.is_graph_output()):
        one.shape = None  # sides of unknown length have names, which mean others in each model
    return whole


def _append(graph: ir.Graph, other: ir.Graph, known: dict[str | None, ir.Value], prefix: str) -> None:
    """Moves what another graph does to the end of a graph; tensors that are known, by name, are the same."""
    ends = {one.name: one for one in (*other.inputs, *other.outputs)}
    nodes = list(other)
    constants = list(other.initializers.values())
    for one in (*nodes, *constants, *(made for node in nodes for made in node.outputs)):
        if one.name not in ends:
            one.name = f"{prefix}/{one.name}"
    other.inputs.clear()
    other.outputs.clear()
    other.initializers.clear()
    other.remove(nodes)
    for one in constants:
        graph.register_initializer(one)
    graph.extend(nodes)
    for name, end in ends.items():
        if name in known:
            ir.convenience.replace_all_uses_with(end, known[name])
        else:
            known[name] = end
    for node in nodes:
        before = node.inputs[0].producer() if node.op_type == BACK else None
        if before and before.op_type == ROUND and before not in nodes:  # its tensor has these values already
            ir.convenience.replace_all_uses_with(node.outputs[0], before.inputs[0])
