"""A runner behind a queue, in this process: images come one at a time, answers leave as their exits run."""

import threading
from concurrent.futures import Future
from itertools import count
from typing import NamedTuple

import numpy as np

from deploy.decide import Array, State
from deploy.runner import Pool, Runner
from deploy.runtimes import size_for


class Answer(NamedTuple):
    """The class of an image, and the exit where it left."""

    label: int
    exit: int


class Line(Pool):
    """Rows that wait for a stage, first come, first served."""

    def drop(self, gone: int) -> None:
        """Drops the first rows."""
        for buffer in self.buffers.values():
            buffer[: self.fill - gone] = buffer[gone : self.fill]
        self.fill -= gone


class Queued:
    """One thread that runs the stages of a runner on what waits for them.

    Next is the last stage before which a full micro-batch waits, else the one whose first image came first. A
    network of one stage takes what waits, up to a micro-batch. All stages are compiled for all sizes before
    the first image [3, H, W] comes, which is as large as `image`.
    """

    def __init__(self, runner: Runner, image: Array) -> None:
        self.runner = runner
        self.lines = [Line(2 * runner.micro_batch) for _ in runner.stages]
        self.arrived: list[tuple[int, Array]] = []
        self.futures: dict[int, Future[Answer]] = {}
        self.numbers = count()
        self.changed = threading.Condition()
        self.closed = False
        self.failed: Exception | None = None
        warm(runner, image)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, image: Array) -> "Future[Answer]":
        """Queues an image [3, H, W]; the future's result is its `Answer`. Raises what a stage raised."""
        future: Future[Answer] = Future()
        with self.changed:
            if self.failed:
                raise self.failed
            number = next(self.numbers)
            self.futures[number] = future
            self.arrived.append((number, image))
            self.changed.notify()
        return future

    def close(self) -> None:
        """Ends the thread once everything is answered."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        try:
            while self._take():
                self._run(self._next())
        except Exception as error:  # a stage failed: nobody waits in vain, now or later
            with self.changed:
                self.failed = error
                for future in self.futures.values():
                    future.set_exception(error)

    def _take(self) -> bool:
        """Moves images that have come to the first stage; waits for one where nothing else is left to do."""
        first = self.lines[0]
        with self.changed:
            if not any(line.fill for line in self.lines):
                self.changed.wait_for(lambda: self.arrived or self.closed)
            taken = self.arrived[: self.runner.micro_batch - first.fill]
            del self.arrived[: len(taken)]
        if taken:
            numbers, images = zip(*taken, strict=True)
            state = {"images": np.stack(images), "ids": np.array(numbers)}
            first.put(state, np.arange(len(taken)))
        return any(line.fill for line in self.lines)

    def _next(self) -> int:
        waiting = [k for k, line in enumerate(self.lines) if line.fill]
        full = [k for k in waiting if self.lines[k].fill >= self.runner.micro_batch]
        return full[-1] if full else min(waiting, key=lambda k: self.lines[k].buffers["ids"][0])

    def _run(self, k: int) -> None:
        line = self.lines[k]
        ready = min(line.fill, self.runner.micro_batch)
        size = min(size_for(ready), self.runner.micro_batch)
        answers, state, stay = self.runner.step(k, line.rows(0, size), ready)
        if len(stay):
            self.lines[k + 1].put(state, stay)
        columns = answers.ids.tolist(), answers.classes.tolist(), answers.exits.tolist()
        line.drop(ready)
        for number, label, exit in zip(*columns, strict=True):
            self.futures.pop(number).set_result(Answer(label, exit))


def warm(runner: Runner, image: Array) -> None:
    """Runs every stage once with every size of batch that `Queued` and `Runner.answer` give it."""
    most = runner.micro_batch
    for size in sorted({min(size_for(waiting), most) for waiting in range(1, most + 1)}):
        state: State = {"images": np.zeros((size, *image.shape), image.dtype)}
        for stage in runner.stages:
            state |= stage(state)[1]
