"""How a server of an exported network stands load from an open-loop client over loopback.

    python scripts/bench_server.py FOLDER IMAGES.npz [--precision bf16] [--seconds 60]

IMAGES.npz has `images` [N, H, W, 3] (bytes) and `labels` [N]; they are sent as PNG files. Capacity is the
rate at which 64 clients that wait for their answers get them, with deadlines of a minute. Then requests come
at random times (Poisson), whatever the server answers, and latency counts from when they were due. The server
has a process of its own, and so has the client.
"""

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import print_table, read_flags, word

import numpy as np
import uvloop
from PIL import Image

from adaptive.percentiles import Latencies
from deploy.client import Connections, post, raw
from utils import UserError, option, run_main

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 64
LOST = 0  # the status of a request without an answer
HEADS = ["load", "requests/s:.0f", "answers/s:.0f", "p50, ms:.1f", "p90:.1f", "p99:.1f", "refused, %:.1f"]
HEADS += ["late, %:.1f", "cut, %:.1f", "lost:d", "accuracy, %:.1f", "by exit, %", "memory, MB"]


@dataclass(frozen=True)
class Flags:
    """What is served, and for how long."""

    folder: Path = word("an exported network")
    images: Path = word("an .npz file")
    backend: str = option("auto", "of the server")
    precision: str = option("fp32", "of the server")
    micro_batch: int = option(16, "of the server", low=1)
    threads: int = option(0, "of the server's backend; 0: all cores", low=0)
    deadline_ms: float = option(500.0, "of every request", low=1)
    seconds: float = option(60.0, "of every load", low=0.1)
    malformed: int = option(10_000, "requests that are none", low=0)


@dataclass(frozen=True)
class Reply:
    """What came of a request: seconds since it was due, status, and what a good answer says."""

    seconds: float
    status: int
    exit: int = 0
    cut: bool = False
    correct: bool = False


class Client:
    """Sends images and reads the answers."""

    def __init__(self, flags: Flags) -> None:
        try:
            content = np.load(flags.images)
            images, self.labels = content["images"], content["labels"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{flags.images} has no images and labels that can be read: {error}") from None
        self.bodies = [png(image) for image in images]
        self.connections = Connections(0)

    async def ask(self, number: int, due: float, deadline_ms: float) -> Reply:
        """Sends an image that was due at a time on the clock of `perf_counter`."""
        i = number % len(self.bodies)
        request = post(self.bodies[i], f"?deadline_ms={deadline_ms:g}")
        try:
            status, body = await self.connections.ask(request)
        except OSError:
            status = LOST
        seconds = time.perf_counter() - due
        if status != 200:
            return Reply(seconds, status)
        found = json.loads(body)
        correct = found["label"] == self.labels[i]
        return Reply(seconds, status, found["exit"], found["cut"], correct)

    async def closed_loop(self, seconds: float, deadline_ms: float) -> list[Reply]:
        """The replies to clients who wait for one before they ask again."""
        replies: list[Reply] = []
        end = time.perf_counter() + seconds

        async def one() -> None:
            while (now := time.perf_counter()) < end:
                replies.append(await self.ask(len(replies), now, deadline_ms))

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
        return replies

    async def open_loop(self, rate: float, seconds: float, deadline_ms: float) -> list[Reply]:
        """The replies to requests at random times."""
        count = max(int(rate * seconds), 1)
        gaps = np.random.default_rng(0).exponential(1 / rate, count)
        due = time.perf_counter() + gaps.cumsum()
        tasks = []
        for number, moment in enumerate(due.tolist()):
            wait = moment - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            request = self.ask(number, moment, deadline_ms)
            tasks.append(asyncio.create_task(request))
        return list(await asyncio.gather(*tasks))


def png(image: np.ndarray) -> bytes:
    """A file of the pixels [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def malformed(body: bytes, rng: np.random.Generator) -> bytes:
    """A request that a server must refuse, of one of many kinds; `body` is an image in PNG."""
    cut = body[: rng.integers(len(body) - 20)]
    noise = rng.bytes(int(rng.integers(1, 400)))
    sides = rng.integers(2**15, 2**31, 2).astype(">u4")
    large = body[:16] + sides.tobytes() + body[24:]
    long = b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"x" * 40_000 + b"\r\n\r\n"
    paths = "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//", "/classify/..%2fpolicy", "/\x00"
    path = paths[rng.integers(len(paths))]
    json_text = [b"{", b"[]", b'{"policy": 1}', b'{"policy": "../x.json"}', b"[" * 5000, b"\xff", b'"x"']
    length = b"Content-Length: "
    kinds = [
        *(post(part) for part in (cut, noise, large, b"", body[:8] + noise)),
        *(post(body, kind=kind) for kind in ("", "text/html", "image/gif", "image/jpeg", "\t\xe4")),
        *(post(body, query) for query in ("?deadline_ms=x", "?deadline_ms=-1", "?deadline_ms=nan")),
        *(post(part, kind="application/json", method="PUT /policy") for part in json_text),
        *(post(body, method=f"{method} {path}") for method in ("GET", "POST", "PUT", "BREW")),
        post(body).replace(length, length + b"999999"),
        post(body).replace(length, length + b"x"),
        post(noise).replace(length, b"Transfer-Encoding: chunked\r\nX: "),
        noise,
        long,
        noise + b"\r\n\r\n",
    ]
    return kinds[rng.integers(len(kinds))]


async def attack(client: Client, count: int) -> tuple[Counter[int], int]:
    """Sends malformed requests: how many of them had a status, and replies that tell what is inside."""
    rng = np.random.default_rng(0)
    statuses: Counter[int] = Counter()
    leaks = 0

    async def some(number: int) -> None:
        nonlocal leaks
        for _ in range(number):
            said = await raw(client.connections.port, malformed(client.bodies[0], rng))
            statuses[int(said[9:12] or 0)] += 1
            leaks += any(word in said for word in (b"Traceback", b".py", str(ROOT).encode()))

    await asyncio.gather(*(some(-(-count // CLIENTS)) for _ in range(CLIENTS)))
    return statuses, leaks


class Server:
    """A server in a process of its own."""

    def __init__(self, flags: Flags) -> None:
        names = ("backend", "precision", "micro_batch", "threads", "deadline_ms")
        self.words = [str(flags.folder), *(f"--{name}={getattr(flags, name)}" for name in names)]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Starts the process, again on the same port."""
        command = [sys.executable, "-m", "deploy.server", *self.words, "--port", str(self.port)]
        begin = time.perf_counter()
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        line = self._line()
        if not line.startswith("serving on port"):
            raise UserError("the server did not start")
        self.port = int(line.split()[-1])
        self.started_s = time.perf_counter() - begin

    def _line(self) -> str:
        return self.process.stdout.readline() if self.process.stdout else ""

    @property
    def memory(self) -> float:
        """Its resident memory, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000

    def end(self, number: signal.Signals) -> str:
        """Sends a signal and waits: its exit code and its last words."""
        self.process.send_signal(number)
        line = self._line().strip()
        return f"exit code {self.process.wait(60)}; {line or 'nothing said'}"


def row_of(load: str, offered: float, seconds: float, replies: Sequence[Reply], memory: str) -> tuple:
    """A row of the table."""
    good = [one for one in replies if one.status == 200]
    percent = 100 / max(len(replies), 1)
    times = Latencies.of(np.array([1000 * one.seconds for one in good] or [np.nan]))
    statuses = Counter(one.status for one in replies)
    refused = statuses[503] * percent
    late = statuses[504] * percent
    of_good = 100 / max(len(good), 1)
    cut = sum(one.cut for one in good) * of_good
    accuracy = sum(one.correct for one in good) * of_good
    exits = np.bincount([one.exit for one in good] or [0]) * of_good
    mix = " ".join(f"{share:.0f}" for share in exits)
    speeds = offered, len(good) / seconds
    failed = refused, late, cut, statuses[LOST]
    return load, *speeds, *times.quantiles_ms, *failed, accuracy, mix, memory


def counted(statuses: Iterable[tuple[int, int]]) -> str:
    """Statuses and how many requests had each."""
    return ", ".join(f"{count} x {status or 'no answer'}" for status, count in statuses)


async def until(
    server: Server, number: signal.Signals, after: float, load: Awaitable[list[Reply]]
) -> tuple[list[Reply], str]:
    """The replies to a load under which the server is sent a signal."""
    task = asyncio.ensure_future(load)
    await asyncio.sleep(after)
    said = await asyncio.to_thread(server.end, number)
    return await task, said


async def measure(flags: Flags, client: Client, server: Server) -> None:
    """Prints the table of loads, and then what came of the rest."""
    rows = []
    await client.closed_loop(flags.seconds / 20, 60_000)  # connections are made, and what is lazy
    capacity = 0.0
    for load, factor in {"capacity": 0.0, "0.8 of it": 0.8, "twice it": 2.0}.items():
        before = server.memory
        start = time.perf_counter()
        if factor:
            replies = await client.open_loop(factor * capacity, flags.seconds, flags.deadline_ms)
        else:
            replies = await client.closed_loop(flags.seconds / 6, 60_000)
        seconds = time.perf_counter() - start
        offered = len(replies) / seconds
        capacity = capacity or offered
        memory = f"{before:.0f} to {server.memory:.0f}"
        rows.append(row_of(load, offered, seconds, replies, memory))
    print_table(HEADS, rows)
    if flags.malformed:
        before = server.memory
        statuses, leaks = await attack(client, flags.malformed)
        found = counted(sorted(statuses.items()))
        print(f"malformed requests by status: {found}; {leaks} replies tell what is inside", end="; ")
        print(f"memory {before:.0f} to {server.memory:.0f} MB")
    for number in (signal.SIGKILL, signal.SIGTERM):
        load = client.open_loop(capacity, flags.seconds / 10, flags.deadline_ms)
        replies, said = await until(server, number, flags.seconds / 20, load)
        statuses = Counter(one.status for one in replies)
        found = counted(statuses.items())
        print(f"{number.name} under load: {found}; {said}")
        if number == signal.SIGKILL:
            await asyncio.to_thread(server.start)
            print(f"started again, and ready after {server.started_s:.1f} s")


def main(argv: list[str]) -> None:
    """Starts a server, loads and attacks it, and prints what came of it."""
    flags = read_flags(Flags, argv, __doc__)
    client = Client(flags)
    server = Server(flags)
    client.connections.port = server.port
    print(f"{' '.join(server.words)} ready after {server.started_s:.1f} s")
    try:
        uvloop.run(measure(flags, client, server))
    finally:
        server.process.kill()


if __name__ == "__main__":
    run_main(main)
