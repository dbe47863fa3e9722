"""The state of an optimizer is checked before the first step that reads it."""

from typing import Any

import torch
from torch import Tensor

from utils import UserError

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what Adam reads of a parameter's state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores an optimizer from the state of one over the same parameters.

    torch compares no shapes, and Adam's fused step reads past the end of a smaller tensor. Raises ValueError
    where shapes are wrong, and what torch raises for other groups.
    """
    optimizer.load_state_dict(state)
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
    adam = isinstance(optimizer, torch.optim.Adam)
    factored = "adafactor" in type(optimizer).__name__.lower()  # it keeps rows and columns
    for parameter, entries in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            raise UserError(f"there is no parameter {parameter}")
        tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
        if adam and not tensors.keys() >= MOMENTS:
            raise UserError(f"a parameter has no tensor {', '.join(sorted(MOMENTS - tensors.keys()))}")
        for name, value in tensors.items():
            if factored or (value.numel() == 1 and (name == "step" or not adam)):
                continue
            if value.shape != parameter.shape:
                shapes = f"{list(value.shape)} for a parameter {list(parameter.shape)}"
                raise UserError(f"{name} has the shape {shapes}")
            if value.stride() != parameter.stride():  # as one number that is repeated
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
