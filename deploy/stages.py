"""The stages of a network as functions of named tensors, each with the weights that it uses and no others."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptive.pipeline import stages_of
from deploy.folder import IMAGES, Port
from models import MultiExitModel, State

LOGITS = "logits"


def port_of(name: str, tensor: Tensor) -> Port:
    """The description of a tensor [B, ...] as it is held."""
    shape = tuple(held(name, tensor).shape[1:])
    return Port(name, shape, str(tensor.dtype).removeprefix("torch."))


def held(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a state as it is held between stages.

    Maps [B, C, H, W] are held as [B, H, W, C]: as compilers compute them, so that none is reordered where a
    network is cut. Images stay as they are.
    """
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 and name != IMAGES else tensor


def read(name: str, tensor: Tensor) -> Tensor:
    """The inverse of `held`."""
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 and name != IMAGES else tensor


class Stage(nn.Module):
    """A stage from named tensors to the logits [B, C] of its exit and named tensors.

    `inputs` are those that it reads, and `outputs` those that it makes and a later stage reads; a tensor that
    it only passes on is neither. `exit` is the number of its exit in the whole network.
    """

    def __init__(self, trace: "_Trace", wanted: set[str]) -> None:
        super().__init__()
        self.model = _with_only(trace.model, trace.touched)
        self.off = trace.off
        self.place = trace.place
        self.exit = trace.exit
        self.names = trace.names
        before = trace.before
        self.inputs = [port_of(name, before[name]) for name in trace.reads]
        self.passed = {name: before[name].shape[1:] for name in before if name not in trace.reads}
        new = wanted - before.keys()
        made = {name: path for path, name in _leaves(trace.names_after) if name in new}
        self.makes = list(made.values())
        self.outputs = [port_of(name, trace.after[name]) for name in made]
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.inputs, tensors, strict=True)
        given = {one.name: read(one.name, tensor) for one, tensor in pairs}
        rows = tensors[0].shape[0]
        # Of a tensor that the stage only passes on, it may read the shape.
        given |= {name: torch.empty(rows, *one, device="meta") for name, one in self.passed.items()}
        state = _each(self.names, lambda _, name: given[name])
        logits, after = stages_of(self.model, self.off)[self.place](state)
        found = dict(_leaves(after))
        return (logits, *(held("", found[path]) for path in self.makes))


def named_stages(
    model: MultiExitModel, images: Tensor, off: Collection[int] = (), last: int | None = None
) -> list[Stage]:
    """The stages of a network in evaluation mode, merged over the exits in `off`, by running a few images.

    There are none behind the exit `last`, if that is given.

    A tensor keeps its name while it is passed on, so a state is a set of named tensors. The name says which
    stage makes it where no exit is off, and is the same where some are. What a stage must be given is what
    its operations read.
    """
    known = _names_after(model, images)
    on = [k for k in range(model.num_exits if last is None else last + 1) if k not in off]
    names: State = IMAGES
    state: State = images
    before = {IMAGES: images}
    traces: list[_Trace] = []
    for place, run in enumerate(stages_of(model, off)[: len(on)]):
        with torch.inference_mode(), _Watch() as watch:
            _, after = run(state)
        names_after = _each(after, lambda path, _, names=known[on[place]]: names[path])
        pairs = zip(_leaves(names_after), _leaves(after), strict=True)
        later = {name: tensor for (_, name), (_, tensor) in pairs}
        trace = _Trace(model, tuple(off), place, on[place], names, before, watch.touched, names_after, later)
        traces.append(trace)
        names = names_after
        state = after
        before = later
    stages: list[Stage] = []
    wanted: set[str] = set()
    for trace in reversed(traces):
        stages.insert(0, Stage(trace, wanted))
        wanted |= set(trace.reads)
    return stages


@dataclass(frozen=True)
class _Trace:
    """What a stage did: its state by name before and after, and the ids of the tensors that it read."""

    model: MultiExitModel
    off: tuple[int, ...]
    place: int
    exit: int
    names: State
    before: dict[str, Tensor]
    touched: set[int]
    names_after: State
    after: dict[str, Tensor]

    @property
    def reads(self) -> list[str]:
        return [name for name, tensor in self.before.items() if id(tensor) in self.touched]


class _Watch(TorchDispatchMode):
    """Notes which tensors operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = tree_leaves((args, kwargs))
        self.touched |= {id(one) for one in read if isinstance(one, Tensor)}
        return function(*args, **kwargs or {})


def _names_after(model: MultiExitModel, images: Tensor) -> list[dict[str, str]]:
    """The names of the tensors in the state after each exit, by their places in it."""
    names = []
    state: State = images
    before = {id(images): IMAGES}
    for k, run in enumerate(stages_of(model)):
        with torch.inference_mode():
            _, after = run(state)
        found = {path: before.setdefault(id(leaf), f"stage{k}_{path}") for path, leaf in _leaves(after)}
        names.append(found)
        before = {id(leaf): found[path] for path, leaf in _leaves(after)}
        state = after  # as long as it is held, no other tensor has the id of one of its
    return names


def _with_only(model: MultiExitModel, used: Collection[int]) -> MultiExitModel:
    """The network on the same tensors, less the weights that are not in `used`: their shapes stay."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    part = copy.deepcopy(model, shared)
    for module in part.modules():
        for weights in (module._parameters, module._buffers):
            for name, tensor in list(weights.items()):
                if tensor is not None and id(tensor) not in used:
                    del weights[name]
                    module.__dict__[name] = tensor.detach().to("meta")
    return part


def _each(nest: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """The nest with `function(place, leaf)` for every leaf; a place is as in "maps_0"."""
    if nest is None:
        return None
    if not isinstance(nest, (dict, list, tuple)):
        return function(path, nest)
    keyed = nest if isinstance(nest, dict) else dict(enumerate(nest))
    start = f"{path}_" if path else ""
    parts = {key: _each(part, function, f"{start}{key}") for key, part in keyed.items()}
    return parts if keyed is nest else type(nest)(parts.values())


def _leaves(nest: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    _each(nest, lambda path, leaf: found.append((path, leaf)))
    return found
