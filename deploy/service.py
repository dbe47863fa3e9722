"""What a server offers, whatever brings the requests: images to answers, policies to switch to, drift."""

import asyncio
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from deploy.decide import Array, Policy, RunnerError, read_json
from deploy.drift import Drift, Watch, reference_file
from deploy.metrics import Metrics
from deploy.runner import Runner
from deploy.scheduler import TOO_LATE, Answer, Late, Scheduler
from deploy.uploads import BadImage, decode


class UnknownPolicy(RunnerError):
    """A server was asked for a policy that its folder does not offer."""


PERIOD_S = 0.02  # between two looks at how late the event loop is


@dataclass(frozen=True)
class Limits:
    """What a server accepts."""

    deadline_ms: float = 500.0  # of a request that names none
    queue: int = 256  # requests that are not answered yet
    body_bytes: int = 10_000_000
    pixels: int = 50_000_000
    read_s: float = 10.0  # until a body must be there
    decoders: int = 2  # threads

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise RunnerError(f"{name} is {value}; accepted: more than 0")


class Service:
    """An exported folder's network behind a scheduler, and the policies to which it can be switched.

    Those are the runner's and the others in the manifest's `menu`, files of the folder as they were exported.
    Drift is tested where a policy has a reference in the folder; the test begins anew when the policy is
    switched. Raises RunnerError for other files.
    """

    def __init__(self, runner: Runner, precision: str, limits: Limits) -> None:
        self.runner = runner
        self.limits = limits
        folder = runner.folder
        files = folder.manifest["files"]
        policies = folder.manifest["policies"]
        self.policy: str = policies[precision]
        # The menu was made on the tables of the first precision; the others have other tables.
        alike = precision == next(iter(policies))
        others = [name for name in folder.manifest.get("menu", []) if alike and name != self.policy]
        self.menu = {self.policy: runner.policy}
        self.menu |= {name: folder.fitting(Policy(folder.checked(name))) for name in others}
        self.references = {}
        for name in self.menu:
            file = reference_file(name)
            if file in files:
                self.references[name] = read_json(folder.checked(file))
        self.watch = self._watch_of(self.policy)
        self.scheduler = Scheduler(runner, room=limits.queue, watch=self.watch and self.watch.update)
        self.metrics = Metrics(self.scheduler, lambda: self.drift)
        self.decoders = ThreadPoolExecutor(limits.decoders, "decode")
        self.inside = 0
        self.undecoded: deque[float] = deque()  # when they came
        self.lag = 0.0  # seconds

    async def answer(self, body: bytes, content_type: str, start: float, seconds: float) -> Answer:
        """The answer for the image in a request that came at `start` and has so many seconds.

        Raises BadImage, Refused or Late.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Answer] = loop.create_future()

        def finish(future: Future[Answer]) -> None:
            error = future.exception()
            if not found.cancelled():
                found.set_exception(error) if error else found.set_result(future.result())

        def work() -> None:
            self.undecoded.popleft()
            try:
                if perf_counter() > start + seconds:
                    raise Late(TOO_LATE)
                future = self.scheduler.submit(self._prepare(body, content_type), seconds, start)
            except Exception as error:
                future = Future()
                future.set_exception(error)
            future.add_done_callback(lambda done: loop.call_soon_threadsafe(finish, done))

        self.inside += 1
        self.undecoded.append(start)
        try:
            self.decoders.submit(work)
            return await found
        finally:
            self.inside -= 1

    async def watch_loop(self) -> None:
        """Measures how much later than they are due things happen on the event loop, again and again."""
        while True:
            start = perf_counter()
            await asyncio.sleep(PERIOD_S)
            self.lag = perf_counter() - start - PERIOD_S

    def switch(self, name: Any) -> None:
        """Takes another policy of the menu for requests that come from now on; raises UnknownPolicy."""
        if not isinstance(name, str) or name not in self.menu:
            raise UnknownPolicy(f"no such policy; accepted: {', '.join(self.menu)}")
        self.policy = name
        self.watch = self._watch_of(name)
        self.scheduler.swap(self.menu[name], self.watch and self.watch.update)

    @property
    def full(self) -> bool:
        """Whether there is no room for a request.

        So it is where there are as many as may wait, and where a request would use up half of its time before
        its first stage, like the oldest one that has not come so far. Requests also wait in the network's
        buffers, where nobody counts them: for about the lag of the event loop.
        """
        if self.inside < self.runner.micro_batch:
            return False
        now = perf_counter()
        queued = [one.start for one in self.scheduler.queues[0][:1]]
        oldest = min([*list(self.undecoded)[:1], *queued], default=now)
        late = max(now - oldest, self.lag) > self.limits.deadline_ms / 2000
        return late or self.inside >= self.limits.queue

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.scheduler.thread.is_alive() and not self.scheduler.closed

    @property
    def drift(self) -> Drift | None:
        """What the test of drift has found; None where the policy has no reference."""
        return self.watch.drift if self.watch else None

    def close(self) -> None:
        """Answers what was accepted."""
        self.scheduler.close()
        self.decoders.shutdown()

    def _prepare(self, body: bytes, content_type: str) -> Array:
        picture = decode(body, content_type, self.limits.pixels)
        try:
            return self.runner.prepare(picture)
        except RunnerError:
            raise BadImage(f"the {content_type} has pixels of a kind that is not accepted") from None

    def _watch_of(self, name: str) -> Watch | None:
        return Watch(self.references[name]) if name in self.references else None
