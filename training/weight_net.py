"""Pure functions of weighting samples (L2W-DEN, https://arxiv.org/abs/2209.08310), and its weight net.

In the order in which a training step calls them.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.losses import full_precision
from utils import replacing


class WeightNet(nn.Module):
    """Losses and confidences [B, n_in] to raw weights [B, n_out] in (-1, 1); `layers` hidden layers."""

    def __init__(self, n_in: int, n_out: int, *, hidden: int = 100, layers: int = 1) -> None:
        super().__init__()
        self.first_hidden_layer = _hidden_layer(n_in, hidden)
        self.rest_hidden_layers = nn.Sequential(*(_hidden_layer(hidden, hidden) for _ in range(layers - 1)))
        self.output_layer = nn.Linear(hidden, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.tanh(self.output_layer(self.rest_hidden_layers(self.first_hidden_layer(x))))


def _hidden_layer(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc=nn.Linear(n_in, n_out), act=nn.ReLU()))


def loss_table(exits: list[Tensor], targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy [B, K] of every sample at every exit, from K logits [B, C] and classes [B]."""
    losses = [
        F.cross_entropy(full_precision(y), targets, reduction="none", label_smoothing=smoothing)
        for y in exits
    ]
    return torch.stack(losses, 1)


def weight_inputs(kind: str, losses: Tensor, confidence: Tensor) -> Tensor:
    """Input of the weight net, by `kind`: "loss" or "conf", [B, K], or "both", [B, 2K], losses first.

    It has no gradient.
    """
    return torch.cat({"loss": [losses], "conf": [confidence], "both": [losses, confidence]}[kind], 1).detach()


def sample_weights(raw: Tensor, epsilon: float, centring: str) -> Tensor:
    """Weights 1 + epsilon * centred `raw`, [B, K] (section 3.2 of the paper).

    "mat" keeps the total weight, "col" that of every sample over its exits, "row" that of every exit over the
    samples. Above epsilon = 0.5 a weight can be negative.
    """
    over = {"mat": (0, 1), "col": 1, "row": 0}[centring]
    return 1 + epsilon * (raw - raw.mean(over, keepdim=True))


def look_ahead(
    optimizer: torch.optim.Optimizer, gradients: dict[Tensor, Tensor]
) -> tuple[dict[Tensor, Tensor], dict[Tensor, float]]:
    """Where parameters with these gradients are after an SGD step at the optimizer's current rates.

    Nothing is changed. Momentum buffers are used if the optimizer is `torch.optim.SGD`. Also returned, per
    parameter: how far a unit of its gradient moves it. Parameters of the optimizer without a gradient stay.
    """
    moved, rates = {}, {}
    for group in optimizer.param_groups:
        momentum = group["momentum"] if isinstance(optimizer, torch.optim.SGD) else 0.0
        for p in (p for p in group["params"] if p in gradients):
            step, share = gradients[p].add(p.detach(), alpha=group["weight_decay"]), 1.0
            buffer = optimizer.state.get(p, {}).get("momentum_buffer") if momentum else None
            gradient = step
            if buffer is not None:
                share = 1 - group["dampening"]
                step = momentum * buffer + share * step
            if momentum and group["nesterov"]:
                step, share = gradient + momentum * step, 1 + momentum * share
            moved[p], rates[p] = p.detach() - group["lr"] * step, -group["lr"] * share
    return moved, rates


def assign_exits(confidence: Tensor, proportions: Tensor) -> list[Tensor]:
    """The samples that each exit is judged by: indices per exit, most confident first.

    `confidence` is [B, K]. Exit k takes the floor(B * proportions[k]) most confident of those that are left,
    the last exit the rest.
    """
    left = len(confidence)
    counts = [*(left * proportions.float()).floor().int().tolist()[:-1], left]
    taken, exits = torch.zeros(left, dtype=torch.bool, device=confidence.device), []
    for column, count in zip(confidence.T, counts, strict=True):
        rows = column.masked_fill(taken, -torch.inf).argsort(descending=True, stable=True)[: min(count, left)]
        taken[rows] = True
        left -= len(rows)
        exits.append(rows)
    return exits


def judgement(exits: list[Tensor], targets: Tensor, assigned: list[Tensor]) -> Tensor:
    """The meta loss, a scalar: the sum over exits of the mean cross-entropy on each exit's own samples.

    Exits without samples are left out.
    """
    pairs = zip(exits, assigned, strict=True)
    return sum(F.cross_entropy(full_precision(y[rows]), targets[rows]) for y, rows in pairs if len(rows))


def write_tables(path: Path, shards: list[dict[str, Tensor]]) -> None:
    """Writes the tables of all processes to one compressed `.npz`, in half precision, by `index`.

    Samples are in the order of rising `index`.
    """
    tables = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    order = tables["index"].argsort()
    arrays = {name: table[order].numpy() for name, table in tables.items()}
    with replacing(path) as temp, open(temp, "wb") as file:
        np.savez_compressed(
            file, **{k: a.astype(np.float16) if a.dtype.kind == "f" else a for k, a in arrays.items()}
        )
