"""What families have in common: one exit, exits along a chain of layers, a network around another."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from models.layers import MapHead
from models.multi_exit import MultiExitModel, State


class SingleExit(MultiExitModel):
    """A network with one exit, in two halves: `extract` makes the features that `classify` reads."""

    num_exits = 1

    def extract(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Features to logits [B, C]."""
        raise NotImplementedError

    def begin(self, images: Tensor) -> State:
        """The state is the images [B, 3, H, W]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The features, and no state: there is no later stage."""
        return self.extract(state), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.classify(features)


class Spans(MultiExitModel):
    """Spans of layers with a light exit (`MapHead` by default) after each.

    A family writes `span`, and `head` where an exit is another one.
    """

    exits: nn.ModuleList

    def add_exits(
        self,
        widths: Sequence[int],
        head_width: int,
        num_classes: int,
        dropout: float,
        head: Callable[..., nn.Module] = MapHead,
    ) -> None:
        """One light exit per map, or vector, of `widths` channels, of `head_width` channels inside."""
        self.exits = nn.ModuleList(head(width, head_width, num_classes, dropout) for width in widths)

    def span(self, k: int, *values: Tensor) -> Sequence[Tensor]:
        """Runs span k on the values that it reads: features of exit k, then what later spans read."""
        raise NotImplementedError

    def begin(self, images: Tensor) -> State:
        """The state is the list of what later spans read, at first the images [B, 3, H, W]."""
        return [images]

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The features after span k."""
        features, *state = self.span(k, *state)
        return features, state

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.exits[k](features)


class Wrapped(MultiExitModel):
    """A wrapper of `network`; subclasses override `begin`, `trunk`, `head` or `carry` where they differ."""

    def __init__(self, network: MultiExitModel) -> None:
        super().__init__()
        self.network = network
        self.num_exits = network.num_exits
        self.loss_weights = network.loss_weights
        self.embeddings = network.embeddings
        self.training = network.training

    def begin(self, images: Tensor) -> State:
        """As the network's."""
        return self.network.begin(images)

    def trunk(self, k: int, state: State) -> tuple[Any, State]:
        """As the network's."""
        return self.network.trunk(k, state)

    def head(self, k: int, features: Any) -> Tensor:
        """As the network's."""
        return self.network.head(k, features)

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """As the network's."""
        return self.network.carry(k, state, logits)

    def reads_logits(self, k: int) -> bool:
        """As in the network."""
        return self.network.reads_logits(k)

    def stages_before(self, k: int) -> Iterable[int]:
        """As in the network."""
        return self.network.stages_before(k)
