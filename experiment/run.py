"""A training run: named parts with a state each, and a loop over epochs that logs and saves them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from experiment.checkpoint import LAST, save, save_epoch
from experiment.fit import load_weights
from experiment.log import append_json, count_from_one, last_record
from experiment.verify import check_finite, check_numbers
from experiment.writer import Writer
from training.restore import load_optimizer
from utils import UserError

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

    A checkpoint is {part: state} with the current `facts` (plain types), the last whole epoch done (`epoch`,
    from 0; -1 before the first), the line of the log for it (`record`, where epochs count from 1), the best
    score so far, and what is done of the next epoch (`partial`, {} at its beginning). `score` rates an epoch
    by its metrics; the best checkpoint has the highest score, or is the last one as long as there is no
    score. `tell` gets every epoch's record. Only the main process saves, in the background.
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
        self.record: dict[str, Any] = {}  # of an epoch that is saved and not yet logged
        self.partial: dict[str, Any] = {}
        self.writer = Writer()
        self.began = time.monotonic()

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
        self.partial = dict(state.get("partial") or {})
        folder = self.saving.folder
        if folder and Path(str(source)).absolute().parent == folder.absolute():
            logged = last_record(folder / "log.txt").get("epoch", 0)
            self.record = state.get("record", {}) if logged < self.first else {}
        return missing

    def state(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint stores after `epoch` (from 0).

        Every batch seeds its own generators, so their states are not needed.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        place = {"epoch": epoch, "record": self.record, "best": self.best, "partial": self.partial}
        return {**parts, **self.facts(), **place}

    def fit(
        self, epochs: int, one_epoch: Callable[[int], Figures], test: Callable[[], Figures] = dict
    ) -> None:
        """All epochs left: `one_epoch(epoch)`, from 0, trains and evaluates; it is saved, then logged.

        After the last one `test()` measures the rest. The epoch is saved by then: what goes wrong in it costs
        no training, and the same run, resumed, tests again.
        """
        if self.saving.folder and self.main_process:
            count_from_one(self.saving.folder / "log.txt")
        with self.writer:
            self._fit(epochs, one_epoch, test)

    def _fit(self, epochs: int, one_epoch: Callable[[int], Figures], test: Callable[[], Figures]) -> None:
        if self.record:
            self._log(epochs, test)
        elif self.first >= epochs and self.main_process:
            print(f"all {epochs} epochs are done")
        for epoch in range(self.first, epochs):
            self.began = time.monotonic() - self.partial.get("seconds", 0.0)
            figures = one_epoch(epoch)
            score = self.score(figures)
            best = score is None or score > self.best
            self.best = self.best if score is None else max(score, self.best)
            seconds = time.monotonic() - self.began
            self.record = {"epoch": epoch + 1, **figures, "best": self.best, "seconds": seconds}
            self.partial = {}
            self._save(epoch, best)
            self._log(epochs, test)

    @property
    def saves(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.main_process and self.saving.folder is not None and self.saving.checkpoints

    def save_within(self, epoch: int, partial: dict[str, Any]) -> None:
        """Saves, in the background, what is done of `epoch` (from 0), from which it goes on if resumed."""
        self.partial = {**partial, "seconds": time.monotonic() - self.began}
        if self.saves:
            assert self.saving.folder
            self.writer.add_copy(self.state(epoch - 1), save, self.saving.folder / LAST)

    def _save(self, epoch: int, best: bool) -> None:
        saving = self.saving
        if self.saves:
            options = {"epoch": epoch + 1, "best": best, "freq": saving.freq, "keep": saving.keep}
            self.writer.add_copy(self.state(epoch), save_epoch, saving.folder, **options)

    def _log(self, epochs: int, test: Callable[[], Figures]) -> None:
        """Writes the line of the last epoch; a run killed before it finds the record in its checkpoint."""
        start, record, self.record = time.monotonic(), self.record, {}
        if record["epoch"] == epochs:
            self.writer.wait()
            record |= test()
            record["seconds"] += time.monotonic() - start
        if self.main_process:
            if self.saving.folder:
                self.writer.add(append_json, self.saving.folder / "log.txt", record)
            self.tell(record)


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
        raise UserError(f"{name} of checkpoint {source} does not fit this run's: {reason}") from error
