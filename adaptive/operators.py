"""Which operators a network runs on the meta device, and what they cost."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_KNOWN: dict[Any, tuple[Any, int]] = {}  # what a call on the meta device gives, and its operations


class Operators(TorchDispatchMode):
    """Collects the operators that run within it: `seen`, and `total`, their operations by torch's formulas.

    On the meta device only shapes matter: of a process's equal calls one is worked out, and the others repeat
    its shapes, for layers repeat and torch's meta kernels are slow. Tensors on other devices are computed as
    always.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()
        self.total = 0  # two for one multiply-add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = func, _key(args), _key([*kwargs.items()])
        if call not in _KNOWN:
            with self:  # in inference mode an operator made of others comes whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            out, formula = func(*args, **kwargs), flop_registry.get(func._overloadpacket)
            operations = formula(*args, **kwargs, out_val=out) if formula else 0
            self.seen.add(func._overloadpacket)
            # In place, as activations are; others may change what they are given, or several things.
            changes = func._schema.is_mutable and not (out is args[0] and _key(args) == call[1])
            if changes or not _is_meta(out):
                self.total += operations
                return out
            _KNOWN[call] = out, operations
        out, operations = _KNOWN[call]
        self.seen.add(func._overloadpacket)
        self.total += operations
        return args[0] if func._schema.is_mutable else _again(out)


def _key(value: Any) -> Any:
    """Equal for arguments that give equal shapes."""
    if isinstance(value, Tensor):
        # Values of other devices can decide on shapes.
        return (value.dtype, value.shape, value.stride()) if value.is_meta else object()
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _is_meta(out: Any) -> bool:
    if isinstance(out, (list, tuple)):
        return all(map(_is_meta, out))
    return isinstance(out, Tensor) and out.is_meta


def _again(out: Any) -> Any:
    """New tensors like those of an earlier call; nobody may change the metadata of the earlier ones."""
    if isinstance(out, Tensor):
        return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    return type(out)(map(_again, out))
