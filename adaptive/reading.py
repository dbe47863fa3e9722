"""How logits are read: which answer an exit gives, and how confident it is in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.confidence import AGREEMENT, confidence_function
from utils import UserError

ANSWERS = {
    "exit": "the exit's own",
    "best": "that of the exits so far which is most confident of its own",
    "mean": "the mean of the probabilities of the exits so far",
}


class Read(NamedTuple):
    """What an exit says: answers [B, C] as logits, the confidence in them [B], and what the next exit needs
    to know of the exits so far: tensors with the batch on dimension 0, or None."""

    answers: Tensor
    confidence: Tensor
    memory: Any


@dataclass(frozen=True)
class Reading:
    """Turns the logits of one exit after another into answers and confidences.

    `confidence` is one of `CONFIDENCES`, or "agreement": how many exits up to this one predict the same class
    without a break (PABEE's patience, https://arxiv.org/abs/2006.04152). `answer` is one of `ANSWERS`.
    `temperatures` [K], if there are any, divide the logits of each exit
    (https://arxiv.org/abs/1706.04599). Raises ValueError for unknown names and temperatures of 0 or less.
    """

    confidence: str = "max_prob"
    answer: str = "exit"
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.answer not in ANSWERS:
            raise UserError(f"unknown answer {self.answer!r}; accepted: {', '.join(ANSWERS)}")
        if self.agreement and self.answer == "best":
            raise UserError(
                f"confidence {AGREEMENT} cannot say which answer is the best: choose exit or mean"
            )
        if not self.agreement:
            confidence_function(self.confidence)
        for value in self.temperatures:
            if not 0 < value < float("inf"):
                raise UserError(f"temperature {value}: accepted: numbers above 0")

    @classmethod
    def of(cls, reading: "Reading | str") -> "Reading":
        """The reading by this kind of confidence; a reading is returned as it is."""
        return reading if isinstance(reading, Reading) else cls(reading)

    @property
    def agreement(self) -> bool:
        """Whether confidence counts the exits that agree."""
        return self.confidence == AGREEMENT

    @property
    def remembers(self) -> bool:
        """Whether what an exit says depends on the exits before it, which then must have been read."""
        return self.agreement or self.answer != "exit"

    @cached_property
    def _score(self) -> Any:
        return confidence_function(self.confidence)

    def read(self, k: int, logits: Tensor, memory: Any = None) -> Read:
        """What exit k says by its logits [B, C], given what was remembered of the exits before it."""
        if self.temperatures:
            logits = logits / self.temperatures[k]
        if not self.remembers:
            return Read(logits, self._score(logits), None)
        if self.answer == "best":
            return self._best(logits, memory)
        total, streak = memory or (None, None)
        if self.answer == "mean":
            own = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            total = own if total is None else total + own
            smallest = torch.finfo(total.dtype).tiny
            logits = (total / (k + 1)).clamp_min(smallest).log()
        if not self.agreement:
            return Read(logits, self._score(logits), (total, None))
        predicted = logits.argmax(-1)
        if streak is None:
            length = torch.ones_like(predicted)
        else:
            before, length = streak
            length = torch.where(predicted == before, length + 1, 1)
        return Read(logits, length.float(), (total, (predicted, length)))

    def _best(self, logits: Tensor, memory: Any) -> Read:
        confidence = self._score(logits)
        if memory is not None:
            answers, highest = memory
            earlier = highest > confidence
            logits = torch.where(earlier[:, None], answers, logits)
            confidence = torch.where(earlier, highest, confidence)
        return Read(logits, confidence, (logits, confidence))

    def read_all(self, exits: Iterable[Tensor]) -> list[Read]:
        """What every exit says, in order, by its logits [B, C]."""
        reads: list[Read] = []
        for k, logits in enumerate(exits):
            reads.append(self.read(k, logits, reads[-1].memory if reads else None))
        return reads

    def confidences(self, exits: Iterable[Tensor]) -> Tensor:
        """The confidence of every exit, [K, B], by its logits [B, C]."""
        return torch.stack([read.confidence for read in self.read_all(exits)])
