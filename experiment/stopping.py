"""When a run saves within an epoch, and how a signal stops it: after the step, saved, on all processes."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from experiment.recipe import Session
from utils import Compute, gather

NOTHING, SAVE, STOP = range(3)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(SystemExit):
    """A signal ended the run; `code` is its exit code."""


class Signals:
    """SIGTERM, SIGUSR1, SIGHUP and Ctrl-C, answered by `Stopped`.

    While a run starts that is at once (Ctrl-C: KeyboardInterrupt). While it trains (`patient`) the first is
    noted, for whoever trains to stop where it can go on later, and a second Ctrl-C is a KeyboardInterrupt.
    """

    def __init__(self, code: int, compute: Compute) -> None:
        self.code, self.compute, self.patient = code, compute, False
        self.heard: tuple[signal.Signals, ...] = SIGNALS
        self.name = ""  # of the first that came

    @contextmanager
    def answered(self) -> Iterator[None]:
        """The block of a run, from its start; after a stop the process ignores what all were sent."""
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            self.heard = (*SIGNALS, signal.SIGHUP)
        before = {number: signal.signal(number, self._starting) for number in self.heard}
        try:
            yield
        except Stopped:  # a launcher passes on what the process may have had itself, while that ends
            before |= dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), signal.SIG_IGN)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train(self) -> None:
        """From now on there is something to lose."""
        self.patient = True
        for number in self.heard:
            signal.signal(number, self._note)

    def _starting(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.compute.rank == 0:
            print(f"stopped by {signal.Signals(number).name} before training: the same command starts again")
        self.stop()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal may break off anywhere, by `Stopped`; one that came before does so here."""
        if any(gather(self.name, self.compute)):
            self.stop()
        self.patient = False
        try:
            if self.name:  # one that came meanwhile
                self.stop()
            yield
        finally:
            self.patient = True

    def stop(self) -> NoReturn:
        """Raises `Stopped`."""
        raise Stopped(self.code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.name:
            self.name = signal.Signals(number).name
            if not self.patient:
                self.stop()


class Agreement:
    """What all processes do after a step: the most that any of them asked for after the step before.

    The question travels while the next step is computed, so that none waits for it. One process alone is
    answered at once.
    """

    def __init__(self, compute: Compute) -> None:
        self.alone = compute.world_size == 1
        self.asked = torch.tensor(NOTHING)
        self.answered: dist.Work | None = None

    def __call__(self, wish: int) -> int:
        """What is done now; `wish` is asked for after the next step."""
        if self.alone:
            return wish
        answer = NOTHING
        if self.answered:
            self.answered.wait()
            answer = int(self.asked)
        self.asked = torch.tensor(wish, dtype=torch.int32)  # on the CPU: a GPU need not wait
        self.answered = dist.all_reduce(self.asked, dist.ReduceOp.MAX, async_op=True)
        return answer


class Timetable:
    """Saves within an epoch every so many optimizer steps or minutes, and when a signal stops the run.

    The first process's clock counts. 0 means never.
    """

    def __init__(self, session: Session, signals: Signals) -> None:
        self.steps, self.seconds = session.save_every_steps, 60 * session.save_every_minutes
        self.signals, self.agreement = signals, Agreement(signals.compute)
        self.keeps_time = signals.compute.rank == 0 and self.seconds > 0
        self.restart(0)

    def restart(self, step: int) -> None:
        """The run was saved at this step, now."""
        self.saved_step, self.saved_at, self.wished = step, time.monotonic(), False

    def after_step(self, step: int, check: Callable[[], None], save: Callable[[], None]) -> None:
        """After optimizer step `step`, which ends a batch: saves if it is time, after a `check`, or stops.

        All processes do so at the same step.
        """
        late = self.keeps_time and not self.wished and time.monotonic() > self.saved_at + self.seconds
        self.wished |= late
        action = self.agreement(STOP if self.signals.name else SAVE if late else NOTHING)
        if self.steps and step // self.steps > self.saved_step // self.steps:
            action = max(action, SAVE)
        if action == NOTHING:
            return
        check()
        save()
        self.restart(step)
        if action == STOP:
            self.signals.stop()
