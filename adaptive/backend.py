"""What runs the stages of a network: PyTorch as it is, a compiler, or another runtime."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from adaptive.inference import fold_batch_norm, run_adaptive, run_single
from adaptive.pipeline import Stage, stages_of
from adaptive.policy import Policy
from models import MultiExitModel, State
from models.bases import Wrapped

PRECISIONS = "fp32", "bf16", "int8"
# Images [N, 3, H, W] as the network as trained reads them, and how many per call, to logits [N, C] and
# exits [N].
Run = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Backend(Protocol):
    """Runs one network in one precision."""

    name: str
    precision: str

    def network(self) -> MultiExitModel:
        """All exits, for tables: a network in evaluation mode whose stages run here."""
        ...

    def stages(self, off: Collection[int] = ()) -> list[Stage]:
        """The stages of the exits that are on; what a state is depends on the backend."""
        ...

    def early(self, policy: Policy, order: str) -> Run:
        """Real early exit in this order; exits that are off are merged into the stages after them."""
        ...

    def alone(self, k: int) -> Run:
        """Exit k as a static network, in one piece."""
        ...


@dataclass(frozen=True)
class Eager:
    """PyTorch as it is, on a network that is tuned for it."""

    tuned: MultiExitModel
    precision: str = "fp32"
    name: ClassVar[str] = "eager"

    def network(self) -> MultiExitModel:
        """The network itself."""
        return self.tuned

    def stages(self, off: Collection[int] = ()) -> list[Stage]:
        """`stages_of`."""
        return stages_of(self.tuned, off)

    def early(self, policy: Policy, order: str) -> Run:
        """`run_adaptive`, in order "latency" on as many images as a call has."""
        if order == "latency":
            return by_parts(lambda part, _: run_adaptive(self.tuned, part, policy))
        return lambda images, size: run_adaptive(self.tuned, images, policy, order=order, micro_batch=size)

    def alone(self, k: int) -> Run:
        """`run_single`."""
        return static(lambda part, _: run_single(self.tuned, part, k), k)


def by_parts(run: Run) -> Run:
    """Runs as many images at a time as a call has, one part after another."""

    @torch.inference_mode()
    def several(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
        logits, exits = zip(*(run(part, size) for part in images.split(size)), strict=True)
        return torch.cat(logits), torch.cat(exits)

    return several


def static(answer: Callable[[Tensor, int], Tensor], k: int) -> Run:
    """From some images, at most so many, to logits [B, C]; all leave at exit k."""
    return by_parts(lambda part, size: (answer(part, size), torch.full((len(part),), k, device=part.device)))


class Halved(Wrapped):
    """A network in bfloat16 from images to logits in float32: so are confidences, and ties are rare."""

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__(model.to(torch.bfloat16))

    def begin(self, images: Tensor) -> State:
        return super().begin(images.bfloat16())

    def head(self, k: int, features: Tensor) -> Tensor:
        return super().head(k, features).float()

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        return super().carry(k, state, logits.bfloat16())


def tuned(model: MultiExitModel, precision: str = "fp32") -> MultiExitModel:
    """A copy for inference: batch norm folded, channels last, in fp32 or bf16."""
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)
    return Halved(folded) if precision == "bf16" else folded


class Staged(Wrapped):
    """A network whose stages are callables; the first one reads images.

    The network says which stages need which; it does not run.
    """

    def __init__(self, model: MultiExitModel, stages: Sequence[Stage]) -> None:
        super().__init__(model)
        self.stages = stages

    def begin(self, images: Tensor) -> State:
        return images

    def step(self, k: int, state: State) -> tuple[Tensor, State]:
        """Runs stage k where it runs; its trunk and head are one piece."""
        return self.stages[k](state)
