"""Ways to train a network other than by its plain forward pass. They act at the seam between trunk and
head."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from models import MultiExitModel, map_leaves


class Equilibrium(nn.Module):
    """Gradient equilibrium (IMTA, https://arxiv.org/abs/1908.06294): the answers of `network`, other
    gradients.

    Of K exits, what head k (from 0) sends into the trunk is scaled by 1 / (K - k), and what comes back from
    later stages at that point by (K - k - 1) / (K - k), so that a trunk receives the mean of the exits'
    gradients, not their sum. Where later stages read the map that the head reads (MSDNet's coarsest scale),
    only that map is scaled, as published; elsewhere all they read.
    """

    def __init__(self, network: MultiExitModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to the logits [B, C] of all exits."""
        net, exits = self.network, []
        state = net.begin(images)
        for k in range(net.num_exits):
            features, state = net.trunk(k, state)
            share = 1 / (net.num_exits - k)
            read, later = _leaves(features), _leaves(state)
            scaled = (read.keys() & later.keys()) or later.keys()
            state = map_leaves(partial(_scaled_among, among=scaled, scale=1 - share), state)
            exits.append(net.head(k, map_leaves(partial(scale_gradient, scale=share), features)))
            state = net.carry(k, state, exits[-1])
        return exits


def _leaves(nest: Any) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    map_leaves(lambda x: found.setdefault(id(x), x), nest)
    return found


def _scaled_among(x: Tensor, among: Collection[int], scale: float) -> Tensor:
    return scale_gradient(x, scale) if id(x) in among else x


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself, whose gradient (and forward-mode tangent) is multiplied by `scale`."""
    return x + (scale - 1) * (x - x.detach()) if x.is_floating_point() else x


class HeadsOnly(nn.Module):
    """The heads of `network` on a trunk that stays as it is, its batch-norm statistics too (disjoint
    training).

    A module is a head's if it runs in `network.head`.
    """

    def __init__(self, network: MultiExitModel, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = network
        self.inside = modules_of_heads(network, image_shape)
        heads = {p for module in self.inside for p in module.parameters(recurse=False)}
        for p in network.parameters():
            p.requires_grad_(p in heads and p.requires_grad)

    def train(self, mode: bool = True) -> "HeadsOnly":
        """Training mode for the heads alone."""
        super().train(False)
        for module in self.inside:
            module.training = mode
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to the logits [B, C] of all exits."""
        net, exits = self.network, []
        with torch.no_grad():
            state = net.begin(images)
        for k in range(net.num_exits):
            with torch.no_grad():
                features, state = net.trunk(k, state)
            exits.append(net.head(k, features))
            with torch.no_grad():
                state = net.carry(k, state, exits[-1].detach())
        return exits


@torch.no_grad()
def modules_of_heads(network: MultiExitModel, image_shape: tuple[int, int, int]) -> list[nn.Module]:
    """The modules that run in `network.head`, found by running it once on an image of zeros."""
    training, found = network.training, {}
    state = network.eval().begin(next(network.parameters()).new_zeros(1, *image_shape))
    for k in range(network.num_exits):
        features, state = network.trunk(k, state)
        hook = register_module_forward_pre_hook(
            lambda module, _: found.setdefault(id(module), module) and None
        )
        logits = network.head(k, features)
        hook.remove()
        state = network.carry(k, state, logits)
    network.train(training)
    return list(found.values())


def phase_of(regime: str, epoch: int, first_epochs: int) -> str:
    """How an epoch trains: joint, equilibrium, last (the last exit alone) or heads (frozen backbone)."""
    if regime in ("joint", "equilibrium", "heads"):
        return regime
    return "last" if epoch < first_epochs else {"disjoint": "heads", "mixed": "joint"}[regime]


def trained_through(network: MultiExitModel, phase: str, image_shape: tuple[int, int, int]) -> nn.Module:
    """What to call in training for a phase: the network itself, or a module around it."""
    if phase == "equilibrium":
        return Equilibrium(network)
    return HeadsOnly(network, image_shape) if phase == "heads" else network
