"""Boosted exits (BoostNet, https://arxiv.org/abs/2211.16726): every exit corrects the answer before it."""

from typing import Any

from torch import Tensor

from models.bases import Wrapped
from models.errors import UserError
from models.multi_exit import MultiExitModel, State
from models.registry import create_model, register


class Boosted(Wrapped):
    """Exit k of a registered network answers P_k = f_k + reweight * P_{k-1}, without a gradient into P_{k-1}.

    Trained with the joint loss, each exit thus learns what those before it got wrong: the prediction that the
    paper's rule trains, f_k + E_{k-1} with E_k = reweight * (f_k + E_{k-1}), is the same number.
    """

    def __init__(
        self, *, name: str, num_classes: int = 1000, reweight: float = 0.5, options: dict[str, Any]
    ) -> None:
        """`name` and `options` are those of the network; the paper's scripts set `reweight` to 0.5."""
        super().__init__(create_model(name, num_classes, **options))
        if not 0 <= reweight <= 1:
            raise UserError(f"reweight is {reweight}; accepted: 0 to 1")
        self.reweight = reweight

    def begin(self, images: Tensor) -> State:
        """The state is the network's, and what the last exit answered (None before the first)."""
        return super().begin(images), None

    def trunk(self, k: int, state: State) -> tuple[tuple[Any, Tensor | None], State]:
        """The network's features, and the last exit's answer."""
        inner, answer = state
        features, inner = super().trunk(k, inner)
        return (features, answer), (inner, None)

    def head(self, k: int, features: tuple[Any, Tensor | None]) -> Tensor:
        """Logits [B, C]."""
        own, answer = features
        logits = super().head(k, own)
        return logits if answer is None else logits + self.reweight * answer.detach()

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """Keeps the answer for the next exit."""
        inner = super().carry(k, state[0], logits)
        return inner, None if k == self.num_exits - 1 else logits

    # Of all exits before, whatever the network itself needs.
    reads_logits = MultiExitModel.reads_logits
    stages_before = MultiExitModel.stages_before


register(Boosted, "boosted/", "any registered network with boosted exits")
