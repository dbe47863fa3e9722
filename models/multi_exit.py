"""The protocol of every network: an ordered list of stages; stage k turns a state into exit k's answer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Any nesting of list, tuple, dict and None; every tensor leaf has the batch on dim 0.
State = Any


class MultiExitModel(nn.Module):
    """An ordered list of stages; stage k turns a state into exit k's answer and the next state.

    A family implements `begin`, `trunk` and `head`, and `carry` only where a later stage reads an earlier
    exit's logits. A state holds what later stages read and nothing else; per-batch tensors are never kept on
    the module.
    """

    num_exits: int
    # Weights of the exits' losses, where a family was published with others than 1.
    loss_weights: tuple[float, ...] = ()
    # Mean and standard deviation that released weights expect, if not the data set's.
    normalisation: tuple[tuple[float, ...], ...] = ()
    # Pixels at the side of the images that they expect.
    side: int = 224
    # How images were resized to evaluate released weights.
    interpolation: str = "bicubic"
    # Last part of the names of parameters that are added to activations, not multiplied with them.
    embeddings: tuple[str, ...] = ()

    def begin(self, images: Tensor) -> State:
        """Images [B, 3, H, W] to the state before stage 0."""
        raise NotImplementedError

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The features that exit k reads, and the state for stage k + 1."""
        raise NotImplementedError

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C] of exit k from its features."""
        raise NotImplementedError

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """The state for stage k + 1 after exit k; changed only where a later stage reads its logits."""
        return state

    def step(self, k: int, state: State) -> tuple[Tensor, State]:
        """Runs stage k alone: logits [B, C] of exit k and the state for stage k + 1."""
        features, state = self.trunk(k, state)
        logits = self.head(k, features)
        return logits, self.carry(k, state, logits)

    def each_exit(self, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Images [B, 3, H, W] to (k, logits [B, C]), exit by exit; each stage runs on request."""
        state = self.begin(images)
        for k in range(self.num_exits):
            logits, state = self.step(k, state)
            yield k, logits

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to the logits [B, C] of all exits, cheapest exit first."""
        return [logits for _, logits in self.each_exit(images)]

    def reads_logits(self, k: int) -> bool:
        """Whether a later stage reads exit k's logits."""
        return type(self).carry is not MultiExitModel.carry

    def stages_before(self, k: int) -> Iterable[int]:
        """The stages that must have run before stage k, in order."""
        return range(k)

    def timm_modules(self) -> dict[str, str]:
        """Names of modules with weights to timm's names for them; empty where they agree."""
        return {}


def take(state: State, rows: Tensor | slice) -> State:
    """The state of a part of the batch: `rows` (indices, a bool mask or a slice) of every tensor leaf."""
    # Indexing, unlike index_select, keeps a channels-last leaf channels-last.
    return map_leaves(lambda leaf: leaf[rows], state)


def join(states: list[State]) -> State:
    """One state for the batches of several, in order: every leaf concatenated along the batch."""
    return states[0] if len(states) == 1 else map_leaves(lambda *leaves: torch.cat(leaves), *states)


def map_leaves(function: Callable[..., Tensor], *states: State) -> State:
    """Applies `function` to each tensor leaf, or to the leaves at one place of several nests."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    if isinstance(first, dict):
        return {key: map_leaves(function, *(state[key] for state in states)) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(map_leaves(function, *parts) for parts in zip(*states, strict=True))
    assert first is None, (
        f"a state is made of tensors, lists, tuples, dicts and None, not {type(first).__name__}"
    )
    return None
