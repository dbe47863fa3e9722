"""A training run: named parts with a state each, and a loop over epochs that logs and saves them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from experiment.checkpoint import save_epoch
from experiment.fit import load_weights
from experiment.log import append_json
from experiment.verify import check_finite, check_numbers
from training.restore import load_optimizer

Figures = dict[str, float]


class Part(Protocol):
    """A part of a run that is saved and restored."""

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Continues from where `state` was taken."""
        ...


@dataclass(frozen=True)
class Saving:
    """Where a run writes its files (None: nowhere), and which epochs it keeps as numbered checkpoints."""

    folder: Path | None
    checkpoints: bool = True
    freq: int = 1
    keep: int = 0


class Run:
    """A training run.

    A checkpoint is {part: state} with the current `facts` (plain types), the last epoch done and the best
    score so far. `score` rates an epoch by its metrics; the best checkpoint has the highest score, or is the
    last one as long as there is no score. `tell` gets every epoch's record. Only the main process saves.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        facts: Callable[[], dict[str, Any]],
        saving: Saving,
        *,
        score: Callable[[Figures], float | None],
        tell: Callable[[dict[str, Any]], None] = lambda record: None,
        main_process: bool = True,
    ) -> None:
        self.parts, self.facts, self.saving = dict(parts), facts, saving
        self.score, self.tell, self.main_process = score, tell, main_process
        self.first, self.best = 0, -1.0
        if saving.folder and main_process:
            saving.folder.mkdir(parents=True, exist_ok=True)

    def resume(self, state: Mapping[str, Any], source: object) -> list[str]:
        """Restores every part from its state in file `source`; returns the names of parts it lacks.

        Raises ValueError in one line for a state that does not fit.
        """
        missing = []
        for name, part in self.parts.items():
            if not state.get(name):
                missing.append(name)
            elif isinstance(part, nn.Module):
                load_weights(part, state[name], f"{name} of checkpoint {source}")
            else:
                _restore(name, part, state[name], source)
        self.first, self.best = state["epoch"] + 1, state.get("best", self.best)
        return missing

    def state(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint stores after `epoch`.

        Every epoch seeds its own generators, so their states are not needed.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {**parts, **self.facts(), "epoch": epoch, "best": self.best}

    def fit(self, epochs: int, one_epoch: Callable[[int], Figures]) -> None:
        """All remaining epochs: `one_epoch(epoch)` trains and evaluates; then it is logged and saved."""
        if self.first >= epochs and self.main_process:
            print(f"all {epochs} epochs are done")
        for epoch in range(self.first, epochs):
            start = time.monotonic()
            figures = one_epoch(epoch)
            score = self.score(figures)
            best = score is None or score > self.best
            self.best = self.best if score is None else max(score, self.best)
            seconds = time.monotonic() - start
            record = {"epoch": epoch, **figures, "best": self.best, "seconds": seconds}
            if self.main_process:
                self.tell(record)
                self._save(record, best)

    def _save(self, record: dict[str, Any], best: bool) -> None:
        folder = self.saving.folder
        if folder is None:
            return
        # First: a run that is killed in between repeats the epoch, and this line.
        append_json(folder / "log.txt", record)
        if self.saving.checkpoints:
            epoch, freq, keep = record["epoch"], self.saving.freq, self.saving.keep
            save_epoch(folder, self.state(epoch), epoch=epoch, best=best, freq=freq, keep=keep)


def _restore(name: str, part: Part, state: Any, source: object) -> None:
    where = f"{name} of checkpoint {source}:"
    check_finite(state, where)
    check_numbers(state, part.state_dict(), where)
    try:
        if isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, state)
        else:
            part.load_state_dict(state)
    # What torch raises for other groups, shapes and types.
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{name} of checkpoint {source} does not fit this run's: {reason}") from error
