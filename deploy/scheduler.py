"""Queues of requests before the stages of an exported network, and which stage runs next, by deadlines.

    scheduler = Scheduler(Runner("FOLDER"))
    answer = scheduler.submit(runner.prepare("cat.jpg"), seconds=0.1).result()

A request is answered where the policy lets it leave, or with what its last exit said when its deadline comes.
One thread runs the stages. Where there is more work than time, stage 0 goes first as soon as its queue could
not wait any longer, so requests leave earlier; those that it cannot reach in time fail; and those for which
there is no room are refused at once.
"""

import threading
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import attrgetter
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from deploy.calls import NEVER, Call, Stages, choose, measure, sizes_of
from deploy.decide import Array, Policy, RunnerError, State, only

RECENT = 0.1  # weight of the newest call in the measured seconds of its kind
Watch = Callable[[list[int], list[float]], Any]  # exits and confidence [T]
TOO_LATE = "no exit was reached before the deadline"
PROBES = 64  # requests at a time that run to their exit after their deadline, so that the monitor sees them
deadline_of = attrgetter("deadline")


class Refused(RunnerError):
    """There is no room for a request."""


class Late(RunnerError):
    """The deadline of a request came before its first exit."""


class Answer(NamedTuple):
    """What the network says of an image: logits [C] at `exit`; `cut` where it would have gone on."""

    logits: Array
    label: int
    exit: int
    confidence: float
    cut: bool


@dataclass(eq=False)
class Request:
    """A request in the system: its policy, its tensors (a row each), and the best answer so far."""

    start: float  # on the clock of `perf_counter`
    deadline: float
    policy: Policy
    tensors: State
    memory: State = field(default_factory=dict)  # of the policy
    future: "Future[Answer]" = field(default_factory=Future)
    answer: Answer | None = None
    probe: bool = False


class Scheduler:
    """Runs requests through a runner's stages in a thread of its own, until `close`.

    At most `room` requests are unanswered at a time, which bounds the memory. `watch` is given exits [T] and
    confidence [T] of those that come while fewer than `PROBES` such ones are under way: in the order in which
    they came, and where their policy lets them leave, also after their deadline. So which requests it is
    given does not depend on how hard they are.
    """

    def __init__(
        self,
        runner: Stages,
        *,
        room: int = 256,
        watch: Watch | None = None,
    ) -> None:
        self.runner = runner
        self.room = room
        self.watch = watch
        self.sizes = sizes_of(runner.micro_batch)
        self.table = measure(runner)
        self.policy = runner.policy
        self.queues: list[list[Request]] = [[] for _ in runner.stages]
        self.probes: deque[Request] = deque()
        self.buffers: dict[tuple[int, int, str], Array] = {}
        self.waiting = 0
        self.left: Counter[tuple[int, bool]] = Counter()  # (exit, cut) -> requests
        self.late = 0
        self.calls: Counter[tuple[int, int]] = Counter()  # (stage, requests in the batch) -> calls
        self.closed = False
        self.news = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="stages", daemon=True)
        self.thread.start()

    def submit(self, image: Array, seconds: float = NEVER, start: float | None = None) -> "Future[Answer]":
        """The future answer for an image [3, H, W] within so many seconds of `start` (`perf_counter`; now).

        Raises Refused at once; the future may raise Late.
        """
        begin = perf_counter() if start is None else start
        with self.news:
            if self.closed or self.waiting >= self.room:
                raise Refused("the queue is closed" if self.closed else f"{self.room} requests wait")
            request = Request(begin, begin + seconds, self.policy, {"images": image})
            request.future.set_running_or_notify_cancel()  # it has its place, whoever still waits for it
            if self.watch and len(self.probes) < PROBES:
                request.probe = True
                self.probes.append(request)
            self.waiting += 1
            insort(self.queues[0], request, key=deadline_of)
            self.news.notify()
        return request.future

    def swap(self, policy: Policy, watch: Watch | None = None) -> None:
        """Takes another policy, with what watches it, for the requests that come from now on."""
        with self.news:
            self.policy = policy
            self.watch = watch
            for request in self.probes:
                request.probe = False
            self.probes.clear()

    def close(self) -> None:
        """Answers all requests that were accepted, accepts no more, and returns."""
        with self.news:
            self.closed = True
            self.news.notify()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.news:
                while not any(self.queues) and not self.closed:
                    self.news.wait()
                if self.closed and not self.waiting:
                    return
                deadlines = [[one.deadline for one in queue] for queue in self.queues]
                call = choose(deadlines, self.table, self.sizes, perf_counter())
                gone = self._expire(perf_counter() + call.seconds) if call else []
                batch = self._take(call) if call else []
            self._finish(gone)
            if call and batch:
                try:
                    self._run(call, batch)
                except Exception as error:  # a stage failed: its requests learn it, and the others go on
                    self._fail(batch, error)

    def _expire(self, time: float) -> list[Request]:
        """Takes out the requests whose deadline is before `time`; probes wait on, without one."""
        gone: list[Request] = []
        for k, queue in enumerate(self.queues):
            expired = queue[: bisect_left(queue, time, key=deadline_of)]
            probes = [request for request in expired if request.probe]
            for request in probes:
                request.deadline = NEVER
            self.queues[k] = queue[len(expired) :] + probes
            gone += expired
        return gone

    def _take(self, call: Call) -> list[Request]:
        queue = self.queues[call.k]
        self.queues[call.k] = queue[call.count :]
        return queue[: call.count]

    def _run(self, call: Call, batch: list[Request]) -> None:
        k = call.k
        start = perf_counter()
        state = {name: self._stacked(call, name, batch) for name in batch[0].tensors}
        logits, made = self.runner.stages[k](state)
        for policy in {id(request.policy): request.policy for request in batch}.values():
            rows = [i for i, request in enumerate(batch) if request.policy is policy]
            self._decide(k, [batch[i] for i in rows], logits[rows])
        later = self.runner.later[k]
        stay = [(i, request) for i, request in enumerate(batch) if request.answer and request.answer.cut]
        for i, request in stay:
            kept = only(request.tensors, later)
            request.tensors = kept | {name: array[i].copy() for name, array in made.items()}
        self.calls[k, len(batch)] += 1
        self.table[k, call.size] += RECENT * (perf_counter() - start - self.table[k, call.size])
        with self.news:
            for _, request in stay:
                if request.probe or not request.future.done():
                    insort(self.queues[k + 1], request, key=deadline_of)
        self._finish([request for request in batch if request.answer and not request.answer.cut])
        self._watch()

    def _stacked(self, call: Call, name: str, batch: list[Request]) -> Array:
        """A tensor of the batch, padded with rows of earlier ones, in a buffer that is used again."""
        rows = [request.tensors[name] for request in batch]
        key = call.k, call.size, name
        if key not in self.buffers:
            first = rows[0]
            self.buffers[key] = np.zeros((call.size, *first.shape), first.dtype)
        np.stack(rows, out=self.buffers[key][: len(rows)])
        return self.buffers[key]

    def _decide(self, k: int, requests: list[Request], logits: Array) -> None:
        """Notes the answers of requests of one policy, from logits [B, C]."""
        exit = self.runner.exits[k]
        policy = requests[0].policy
        known = {name: np.stack([one.memory[name] for one in requests]) for name in requests[0].memory}
        answers, score, leaves, memory = policy.decide(exit, logits, known)
        labels = answers.argmax(-1).tolist()
        scores = score.tolist()
        cut = (~leaves).tolist()
        for i, request in enumerate(requests):
            request.answer = Answer(answers[i], labels[i], exit, scores[i], cut[i])
            request.memory = {name: array[i] for name, array in memory.items()}

    def _watch(self) -> None:
        """Shows the probes that have reached their exit, as far as all before them have."""
        done: list[Answer] = []
        with self.news:
            watch = self.watch
            while self.probes and (answer := self.probes[0].answer) and not answer.cut:
                done.append(answer)
                self.probes.popleft()
        if done and watch:
            watch([one.exit for one in done], [one.confidence for one in done])

    def _fail(self, batch: list[Request], error: Exception) -> None:
        with self.news:
            self.probes = deque(one for one in self.probes if one not in batch)
        self._finish(batch, error)

    def _finish(self, requests: list[Request], error: Exception | None = None) -> None:
        """Gives requests their answers, or an error."""
        due = [request for request in requests if not request.future.done()]
        with self.news:
            self.waiting -= len(due)
        for request in due:
            if error or request.answer is None:
                self.late += not error
                request.future.set_exception(error or Late(TOO_LATE))
            else:
                self.left[request.answer.exit, request.answer.cut] += 1
                request.future.set_result(request.answer)
