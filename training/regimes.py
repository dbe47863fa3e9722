"""Training other than by the plain forward pass, by changes between a stage's trunk and its head."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from models import MultiExitModel, State, map_leaves
from models.bases import Wrapped


class Equilibrium(Wrapped):
    """Gradient equilibrium (IMTA, https://arxiv.org/abs/1908.06294): same logits, rescaled gradients.

    The logits are those of `network`. Of K exits, the gradient from head k (from 0) into the trunk is scaled
    by 1 / (K - k), and the one from later stages at that point by (K - k - 1) / (K - k), so that a trunk
    receives the mean of the exits' gradients, not their sum. Where later stages read the map that the head
    reads (MSDNet's coarsest scale), only that map is scaled, as published; elsewhere all that they read.
    """

    def trunk(self, k: int, state: State) -> tuple[Any, State]:
        """As the network's, with scaled gradients into the features and the state."""
        features, state = super().trunk(k, state)
        share = 1 / (self.num_exits - k)
        read = _leaves(features)
        later = _leaves(state)
        scaled = (read.keys() & later.keys()) or later.keys()
        state = map_leaves(partial(_scaled_among, among=scaled, scale=1 - share), state)
        return map_leaves(partial(scale_gradient, scale=share), features), state


def _leaves(nest: Any) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    map_leaves(lambda x: found.setdefault(id(x), x), nest)
    return found


def _scaled_among(x: Tensor, among: Collection[int], scale: float) -> Tensor:
    return scale_gradient(x, scale) if id(x) in among else x


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself, whose gradient (and forward-mode tangent) is multiplied by `scale`."""
    return x + (scale - 1) * (x - x.detach()) if x.is_floating_point() else x


class HeadsOnly(Wrapped):
    """The heads of `network` on a frozen trunk, batch-norm statistics too (disjoint training).

    A module belongs to a head if it runs in `network.head`.
    """

    def __init__(self, network: MultiExitModel, image_shape: tuple[int, int, int]) -> None:
        super().__init__(network)
        self.inside = modules_of_heads(network, image_shape)
        heads = {p for module in self.inside for p in module.parameters(recurse=False)}
        for p in network.parameters():
            p.requires_grad_(p in heads and p.requires_grad)

    def train(self, mode: bool = True) -> "HeadsOnly":
        """Training mode for the heads only."""
        super().train(False)
        for module in self.inside:
            module.training = mode
        return self

    @torch.no_grad()
    def begin(self, images: Tensor) -> State:
        """As the network's, without a gradient."""
        return super().begin(images)

    @torch.no_grad()
    def trunk(self, k: int, state: State) -> tuple[Any, State]:
        """As the network's, without a gradient."""
        return super().trunk(k, state)

    @torch.no_grad()
    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """As the network's, without a gradient."""
        return super().carry(k, state, logits.detach())


class _HeadFinder(Wrapped):
    """Remembers the modules that run in the network's heads."""

    def __init__(self, network: MultiExitModel) -> None:
        super().__init__(network)
        self.found: dict[int, nn.Module] = {}

    def head(self, k: int, features: Any) -> Tensor:
        """As the network's."""
        hook = register_module_forward_pre_hook(self._remember)
        logits = super().head(k, features)
        hook.remove()
        return logits

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        self.found.setdefault(id(module), module)


@torch.no_grad()
def modules_of_heads(network: MultiExitModel, image_shape: tuple[int, int, int]) -> list[nn.Module]:
    """The modules that run in `network.head`, found by running it once on an image of zeros."""
    training = network.training
    finder = _HeadFinder(network).eval()
    finder(next(network.parameters()).new_zeros(1, *image_shape))
    network.train(training)
    return list(finder.found.values())


# How a regime trains: all its epochs in one way, or the first in one and the rest in another.
PHASES = {
    "joint": ("joint",),
    "equilibrium": ("equilibrium",),
    "heads": ("heads",),  # a frozen backbone
    "disjoint": ("last", "heads"),  # the last exit alone, then the heads
    "mixed": ("last", "joint"),
}


def phase_of(regime: str, epoch: int, first_epochs: int) -> str:
    """The phase of an epoch."""
    phases = PHASES[regime]
    return phases[0] if epoch < first_epochs else phases[-1]


def trained_through(network: MultiExitModel, phase: str, image_shape: tuple[int, int, int]) -> nn.Module:
    """What to call in training for a phase: the network itself, or a wrapper of it."""
    if phase == "equilibrium":
        return Equilibrium(network)
    return HeadsOnly(network, image_shape) if phase == "heads" else network
