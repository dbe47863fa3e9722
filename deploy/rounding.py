"""Where quantised stages round: once, where a map is made, by one scale, however often it is read.

NNCF rounds where an operation reads. A map that is joined with others is then copied in floats and rounded
again for each reader, by scales that hardly differ: in MSDNet that took as long as the convolutions.
"""

from collections.abc import Collection, Iterator, Sequence

import networkx
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.folder import IMAGES

ROUND, BACK = "QuantizeLinear", "DequantizeLinear"
ALIKE = "Concat", "Transpose"  # results have the values of what they read
Levels = tuple[np.ndarray, np.ndarray]  # scale and zero point


def round_once(models: Sequence[ir.Model]) -> None:
    """Rounds maps that are joined, or handed over between these stages, where they are made.

    All that are joined share a scale, for the widest of their ranges, and cross in one byte a value. What no
    operation reads in bytes, such as tokens, keeps its type: what adds to it over many layers needs it. So
    does what is rounded by a scale per channel, as NNCF has it for depthwise convolutions.
    """
    links = networkx.Graph()
    for model in models:
        links.add_edges_from(_alike(model.graph))
    for family in networkx.connected_components(links):
        tensors = [one for one in family if isinstance(one, ir.Value)]
        values = sorted(tensors, key=lambda one: one.name or "")  # files are the same each time
        rounding = [use.node for one in values for use in one.uses() if use.node.op_type == ROUND]
        by_channel = any(node.inputs[1].const_value.size > 1 for node in rounding)
        # With a name in the family, it is handed over.
        shared = len(family) > len(values) or any(_kind(one) == "Concat" for one in values)
        if rounding and shared and not by_channel:
            _round(values, rounding)
    for model in models:
        RemoveUnusedNodesPass()(model)  # and constants that no node reads any more


def _alike(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value | str | None]]:
    """Pairs of tensors that have the same values, and of maps between stages and their names."""
    for end in (*graph.inputs, *graph.outputs):
        if _is_map(end):
            yield end, end.name
    for node in graph:
        made = node.outputs[0]
        if node.op_type in ALIKE:
            yield from ((made, one) for one in node.inputs)
        elif node.op_type == BACK and (before := node.inputs[0].producer()):
            yield made, before.inputs[0]


def _is_map(end: ir.Value) -> bool:
    return len(end.shape) == 4 and end.name != IMAGES


def _kind(value: ir.Value) -> str:
    """The operation that makes a tensor; "" for one that is given."""
    producer = value.producer()
    return producer.op_type if producer else ""


def _round(values: Collection[ir.Value], rounding: Sequence[ir.Node]) -> None:
    """Rounds tensors of a family where they are made, in place of where they are read."""
    levels = _widest(rounding)
    for node in rounding:
        for back in [use.node for use in node.outputs[0].uses()]:
            ir.convenience.replace_all_uses_with(back.outputs, [node.inputs[0]], replace_graph_outputs=True)
            back.graph.remove(back, safe=True)
        node.graph.remove(node, safe=True)
    for value in values:
        if _kind(value) not in (*ALIKE, BACK):
            _round_source(value, levels)
    for value in values:
        if value.is_graph_output() and _is_map(value):
            graph = value.producer().graph
            name = value.name
            value.name = f"{name}_inside"
            node = _operation(graph, ROUND, value, name, levels)
            graph.append(node)
            graph.outputs[list(graph.outputs).index(value)] = node.outputs[0]


def _round_source(value: ir.Value, levels: Levels) -> None:
    """Has all that read a tensor read it rounded; one that is handed over comes in bytes."""
    readers = list(value.uses())
    producer = value.producer()
    graph = producer.graph if producer else value.graph
    nodes = []
    held = value
    if value.is_graph_input() and _is_map(value):
        value.dtype = ir.DataType.UINT8
    else:
        nodes.append(_operation(graph, ROUND, value, f"{value.name}_held", levels))
        (held,) = nodes[0].outputs
    nodes.append(_operation(graph, BACK, held, f"{value.name}_rounded", levels))
    if producer:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(graph[0], nodes)
    for reader, place in readers:
        reader.replace_input_with(place, nodes[-1].outputs[0])


def _operation(graph: ir.Graph, kind: str, value: ir.Value, name: str, levels: Levels) -> ir.Node:
    """A node that rounds a tensor or reads it back, not yet in the graph; its constants are."""
    parts = zip(("scale", "zero"), levels, strict=True)
    constants = [ir.Value(name=f"{name}_{part}", const_value=ir.tensor(array)) for part, array in parts]
    for one in constants:
        graph.register_initializer(one)
    dtype = ir.DataType.FLOAT if kind == BACK else ir.DataType.UINT8
    made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    return ir.node(kind, [value, *constants], outputs=[made])


def _widest(rounding: Sequence[ir.Node]) -> Levels:
    """Levels in bytes for all values that these have levels for."""
    ends = [0.0]
    for node in rounding:
        scale, zero = (one.const_value.numpy() for one in node.inputs[1:3])
        limits = np.iinfo(zero.dtype)
        ends += [scale * (limit - float(zero)) for limit in (limits.min, limits.max)]
    scale = (max(ends) - min(ends)) / 255
    return np.array(scale, np.float32), np.array(round(-min(ends) / scale), np.uint8)
