"""Stages compiled by torch.compile: on a CPU for any number of rows, on a GPU as CUDA graphs of a few sizes.

A graph has one number of rows, and a new one takes seconds: on a GPU, batches are padded up to a size that is
known. On a CPU, code for one row, for less than 16 and for more is compiled when it is first needed.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptive.backend import Run, Staged, by_parts, static, tuned
from adaptive.inference import run_stages
from adaptive.pipeline import Stage as PipelineStage
from adaptive.policy import Policy
from deploy.calls import sizes_of
from deploy.decide import only
from deploy.folder import IMAGES, read_later
from deploy.programs import program_of
from deploy.stages import Stage, named_stages
from models import MultiExitModel

Tensors = dict[str, Tensor]
Program = Callable[..., Sequence[Tensor]]
WARM_UP = 3  # calls before a CUDA graph is recorded


class Compiled:
    """A network in `torch.compile`, on the device of its weights; `shape` is that of an image.

    Weights are frozen: folded and packed as the kernels read them.
    """

    name: ClassVar[str] = "compile"

    def __init__(self, model: MultiExitModel, shape: Sequence[int], precision: str = "fp32") -> None:
        self.model = tuned(model, precision)
        self.precision = precision
        self.images = torch.zeros(2, *shape, device=next(model.parameters()).device)
        self.compiled: dict[tuple[int, ...], list[CompiledStage]] = {}

    def network(self) -> MultiExitModel:
        """All exits; nothing is merged."""
        return Staged(self.model, self.stages())

    def stages(self, off: Collection[int] = (), sizes: Sequence[int] = ()) -> list[PipelineStage]:
        """On any number of rows; on a GPU padded up to one of `sizes`, in rising order, that is not less."""
        first, *later = (partial(stage, sizes=sizes) for stage in self.without(off))
        return [lambda images: first({IMAGES: images}), *later]

    def early(self, policy: Policy, order: str) -> Run:
        """In order "latency", on a GPU, samples that stay are padded up to the next power of 4."""

        def latency(part: Tensor, size: int) -> tuple[Tensor, Tensor]:
            stages = self.stages(policy.off, sizes_of(size, 4))
            return run_stages(stages, policy, part)

        def throughput(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
            stages = self.stages(policy.off, [size])
            return run_stages(stages, policy, images, size)

        return throughput if order == "throughput" else by_parts(latency)

    def alone(self, k: int) -> Run:
        """The only stage that is left with all other exits switched off."""
        off = set(range(self.model.num_exits)) - {k}
        (stage,) = self.without(off)

        def logits(part: Tensor, size: int) -> Tensor:
            return stage({IMAGES: part}, [size])[0]

        return static(logits, k)

    def without(self, off: Collection[int]) -> list["CompiledStage"]:
        """The stages with these exits switched off."""
        key = tuple(sorted(off))
        if key not in self.compiled:
            named = named_stages(self.model, self.images, key)
            pairs = zip(named, read_later(named), strict=True)
            self.compiled[key] = [CompiledStage(stage, later) for stage, later in pairs]
        return self.compiled[key]


class CompiledStage:
    """A stage from named tensors to logits [B, C] and what later stages read, compiled."""

    def __init__(self, stage: Stage, later: Collection[str]) -> None:
        self.stage = stage
        self.later = later
        self.reads = [one.name for one in stage.inputs]
        self.makes = [one.name for one in stage.outputs]
        self.programs: dict[int | None, Program] = {}

    @torch.inference_mode()
    def __call__(self, state: Tensors, sizes: Sequence[int] = ()) -> tuple[Tensor, Tensors]:
        """On a GPU, pads up to one of `sizes`, or to a power of 2 if there are more rows than that."""
        tensors = [state[name] for name in self.reads]
        rows = len(tensors[0])
        size: int | None = None
        if tensors[0].is_cuda:
            size = next((one for one in sizes if one >= rows), 1 << (rows - 1).bit_length())
        if size not in self.programs:
            self.programs[size] = self._program(size, tensors)
        logits, *made = (one[:rows] for one in self.programs[size](*tensors))
        return logits, only(state, self.later) | dict(zip(self.makes, made, strict=True))

    def _program(self, size: int | None, tensors: Sequence[Tensor]) -> Program:
        """For batches of this size; without one, for all."""
        # An exported program has code of its own: all stages share that of `Stage.forward`, of which
        # torch.compile keeps a few versions only.
        with torch.inference_mode(False), torch.no_grad():
            if size is None:
                program = compiled(program_of(self.stage).module(), dynamic=True)
                return lambda *tensors: program(*map(alike, tensors))
            examples = [one.new_zeros(size, *one.shape[1:]) for one in tensors]
            module = torch.export.export(self.stage, tuple(examples)).module()
        return Graph(compiled(module, dynamic=False), examples)


def compiled(module: torch.nn.Module, dynamic: bool) -> Program:
    """The module, its weights frozen; dynamic: for inputs of any size."""
    return torch.compile(module, dynamic=dynamic, options={"freezing": True})


def alike(tensor: Tensor) -> Tensor:
    """The tensor as compiled code expects it: another kind or other strides would be compiled anew."""
    whole = tensor.contiguous()
    return whole if whole.is_inference() else whole.clone()


class Graph:
    """A program recorded as a CUDA graph: one launch, on inputs that stay where they are."""

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        with torch.cuda.device(inputs[0].device):  # which need not be the current one
            current = torch.cuda.current_stream()
            stream: Any = torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    program(*inputs)
            current.wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = program(*inputs)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Results of rows that may be fewer than recorded; what is behind them is left from earlier calls."""
        for held, tensor in zip(self.inputs, tensors, strict=True):
            held[: len(tensor)].copy_(tensor)
        self.graph.replay()
        # The next call overwrites its results, and samples wait between two calls.
        rows = len(tensors[0])
        return [one[:rows].clone() for one in self.outputs]
