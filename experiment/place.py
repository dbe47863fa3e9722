"""Where a training run is within an epoch: entered there, saved there, stopped there."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import TrainLoader
from engine import Epoch
from experiment.checkpoint import LAST
from experiment.run import Figures, Run
from experiment.stopping import Stopped, Timetable
from training.l2w import SampleWeighting
from training.optim import Update
from utils import Compute, Meters, gather


class Place:
    """An epoch and a micro-batch of it, for all that moves with them: loader, update, sample weighting.

    An epoch has `steps` optimizer steps. A checkpoint within it holds, as `partial`, the micro-batches of
    each process (`micro_batch` images of all together) and the optimizer steps that are done, and what every
    process has gathered for the epoch's figures; or `figures` themselves once the epoch is trained. The
    epoch then goes on as if it had not been left.
    """

    def __init__(
        self,
        run: Run,
        timetable: Timetable,
        loader: TrainLoader,
        update: Update,
        weighting: SampleWeighting | None,
        compute: Compute,
        steps: int,
    ) -> None:
        self.run, self.loader, self.update, self.weighting = run, loader, update, weighting
        self.compute, self.steps = compute, steps
        self.timetable, self.signals = timetable, timetable.signals
        self.epoch = Epoch()

    def move(self, number: int, partial: dict[str, Any], images: float = 1.0) -> None:
        """Goes to epoch `number` (from 0), to where `partial` says in it; {} is its beginning.

        A step has `images` times as many images as when it was saved; the place is one in the order of all.
        """
        batch, step = partial.get("batch", 0), partial.get("step", 0)
        if partial:
            batch = batch * partial["micro_batch"] // self.loader.micro_batch
        states, norm = self._own(partial), partial.get("grad_norm")
        meters = Meters.of([state["meters"] for state in states], self.compute.device)
        self.epoch = Epoch(number, batch, meters, self.after_batch)
        self.loader.start(number, batch)
        self.update.start(number * self.steps + int(step / images))
        self.update.grad_norm = None if norm is None else norm.to(self.compute.device)
        self.timetable.restart(self.update.step)
        if self.weighting:
            self.weighting.start(number, batch)
            gathered = [state["l2w"] for state in states if "l2w" in state]
            alike = len(partial.get("processes", [])) == self.compute.world_size
            self.weighting.load_epoch_state(gathered, tables=alike)  # else they are of other samples

    def _own(self, partial: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """What this process goes on from; of what another number of them gathered the first takes all."""
        shards = partial.get("processes", [])
        if len(shards) == self.compute.world_size:
            return shards[self.compute.rank : self.compute.rank + 1]
        return shards if self.compute.rank == 0 else []

    def after_batch(self, check: Callable[[], None]) -> None:
        """Saves or stops where one can go on: between two optimizer steps."""
        if self.update.micro_batch:
            return
        try:
            self.timetable.after_step(self.update.step, check, self.save)
        except Stopped:
            self.loader.close()
            self.run.writer.wait()
            gather(None, self.compute)  # once one process has ended, a launcher ends the others
            raise

    def save(self, figures: Figures | None = None) -> None:
        """Saves within the epoch, in which a stream cannot go on; with its `figures` once it is trained."""
        if not self.loader.seekable and not figures:
            return
        epoch = self.epoch
        place = {
            "batch": epoch.batch,
            "micro_batch": self.loader.micro_batch,
            "step": self.update.step - epoch.number * self.steps,
            "figures": figures or {},
        }
        shards = [] if figures else gather(self._gathered(), self.compute)
        norm = None if self.update.grad_norm is None else self.update.grad_norm.cpu()
        self.run.save_within(epoch.number, {**place, "grad_norm": norm, "processes": shards})

    def _gathered(self) -> dict[str, Any]:
        """What the figures of the epoch are made of so far, of this process."""
        own = {"meters": self.epoch.meters.state_dict()}
        return own | ({"l2w": self.weighting.epoch_state()} if self.weighting else {})

    def stopped(self, resumes: str) -> str:
        """The line of a run that a signal stopped; `resumes` is what it was told to resume."""
        self.run.writer.wait()
        batch, whole = self.epoch.batch, len(self.loader)
        place = f"stopped by {self.signals.name or 'a signal'} "
        place += (
            f"in epoch {self.epoch.number + 1} after batch {batch} of {whole}" if batch else "between epochs"
        )
        if not self.run.saves:
            return f"{place}; checkpoints are not written (--save_ckpt false)"
        if not self.loader.seekable and 0 < batch < whole:
            return f"{place}; a stream cannot be entered there: the same command repeats the epoch"
        folder = self.run.saving.folder
        assert folder
        if resumes:
            return f"{place}; it goes on with --resume {folder / LAST}"
        return f"{place}; saved in {folder}: the same command goes on from there"
