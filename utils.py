"""What every entry script needs: how it ends, processes and devices, seeds, meters, progress, files."""

import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from models.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk


# What gloo and NCCL say where another process has ended.
LOST = r"Connection (reset|closed) by peer|Broken pipe|remote process exited"


def option(
    default: Any,
    about: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a frozen dataclass that is also a flag of the command line (`experiment.options`).

    `about` is its help, `low` and `high` are the least and the greatest value accepted, `choices` the words
    without a Literal annotation.
    """
    return field(default=default, metadata={"about": about, "low": low, "high": high, "choices": choices})


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs an entry script: a user's mistake ends it with one line and exit code 2, Ctrl-C with one and 130.

    Anything else is a bug and keeps its traceback. Of several processes, the first that fails speaks for all:
    the others fail by the same mistake, or because it is gone.
    """
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the place of `installed`'s
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        code, line = _ending(error)
        first = _first_failure(code)
        if first is None and not line:
            raise
        if first is None:
            print(line, file=sys.stderr)
        sys.exit(first or code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and the line that says it; none for a bug."""
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would break into the ending
        return 130, "interrupted"
    if isinstance(error, RuntimeError) and re.search(LOST, str(error)) and dist.is_initialized():
        return 1, f"error: process {dist.get_rank()} has lost another one, which ended before it"
    if not isinstance(error, (UserError, BrokenPipeError)) or os.environ.get("DYNEXIT_TRACEBACK"):
        return 1, ""
    # An error from a data loader's worker carries the worker's traceback before its own last line.
    return 2, "error: " + " ".join(str(error).rpartition("UserError: ")[2].splitlines())


def _first_failure(code: int) -> int | None:
    """None if this process is the first to fail among those of torchrun, else the exit code of that one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if code == 130:
        return code  # Ctrl-C reaches torchrun too, which says it
    try:  # the store belongs to torchrun: it outlives the processes, and is there before they join each other
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
        mine = f"{code} {os.environ['RANK']}"
        first = store.compare_set(f"failed/{os.environ['TORCHELASTIC_RESTART_COUNT']}", "", mine).decode()
    except RuntimeError:  # torchrun is gone too
        return None
    return None if first == mine else int(first.split()[0])


Network = TypeVar("Network", bound=nn.Module)
# By default a data loading process per core that this process may use, up to 8.
WORKERS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class Compute:
    """Where and how a network runs; `amp` is None or a half type, `rank` one of `world_size` processes."""

    device: torch.device
    amp: torch.dtype | None = None
    channels_last: bool = False
    rank: int = 0
    world_size: int = 1

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, maps in the memory format of the network."""
        maps = self.channels_last and tensor.ndim == 4
        layout = torch.channels_last if maps else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=layout)

    def place(self, network: Network) -> Network:
        """The network on the device, in its memory format."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return network.to(self.device, memory_format=layout)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where it is asked for."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


@dataclass(frozen=True)
class Runtime:
    """Where and how things run."""

    output_dir: str = option(
        "", "where results go; default: runs/MODEL-DATA_SET-TIME, when evaluating: beside the checkpoint"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    batch_size: int = option(
        64, "images per process and micro-batch; evaluation takes 1.5 times as many", low=1
    )
    num_workers: int = option(WORKERS, "data loading processes; 0: the process itself loads", low=0)
    pin_mem: bool = option(True, "load into pinned memory (GPU only)")
    use_amp: bool = option(False, "mixed precision")
    amp_dtype: Literal["auto", "bf16", "fp16"] = option("auto", "its type; auto: GPU fp16, CPU bf16 or none")
    channels_last: bool = option(False, "channels-last memory format")
    flops: bool = option(False, "print what every exit costs, under each convention")


def seed_everything(*place: int) -> None:
    """Seeds Python, NumPy and torch for a place in a run, such as (seed, epoch, batch, rank).

    So what is drawn there can be repeated alone.
    """
    seed_draws(int(np.random.SeedSequence(place).generate_state(1)[0]))


def seed_draws(seed: int) -> None:
    """Seeds Python, NumPy and torch with 32 bits, in a tenth of the time of `torch.manual_seed`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def gather(part: Any, compute: Compute) -> list[Any]:
    """The `part` of every process, by rank."""
    if compute.world_size == 1:
        return [part]
    parts = [None] * compute.world_size
    dist.all_gather_object(parts, part)
    return parts


class Meters:
    """Means of named values, summed on the device, divided once; a vector [K] gives name0, name1 ..."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, total: Tensor | float, count: int) -> None:
        """Adds the sum of `count` values."""
        self.sums[name] = self.sums.get(name, 0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    def state_dict(self) -> dict[str, Any]:
        """Sums, on the CPU, and counts so far."""
        sums = {name: sum.cpu() if isinstance(sum, Tensor) else sum for name, sum in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts)}

    @classmethod
    def of(cls, states: Sequence[dict[str, Any]], device: torch.device) -> "Meters":
        """Meters that go on from the sum of these states."""
        meters = cls()
        for state in states:
            for name, total in state["sums"].items():
                on_device = total.to(device) if isinstance(total, Tensor) else total
                meters.add(name, on_device, state["counts"][name])
        return meters

    def means(self, compute: Compute | None = None) -> dict[str, float]:
        """Mean of each value so far; over all processes if `compute` is given."""
        pairs: dict[str, tuple[float, int]] = {}
        for name, total in self.sums.items():
            values = total.tolist() if isinstance(total, Tensor) else total
            parts = {name: values}
            if isinstance(values, list):
                parts = {f"{name}{k}": value for k, value in enumerate(values)}
            pairs |= {part: (value, self.counts[name]) for part, value in parts.items()}
        everybody = [pairs] if compute is None else gather(pairs, compute)
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for pairs in everybody for name in pairs):
            counted = [pairs[name] for pairs in everybody if name in pairs]
            means[name] = sum(total for total, _ in counted) / sum(count for _, count in counted)
        return means


class Progress:
    """A loop with a progress line: live in a terminal, else a plain line every `every` seconds."""

    def __init__(
        self,
        items: Iterable[Any],
        title: str,
        total: int | None,
        *,
        shown: bool,
        first: int = 0,
        every: float = 15.0,
    ) -> None:
        looks: dict[str, Any] = {"dynamic_ncols": True}
        if not sys.stderr.isatty():
            words = "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
            looks = {"mininterval": every, "delay": every, "bar_format": words, "file": _Lines()}
        looks |= {"leave": False, "miniters": 1, "initial": first}
        self.bar = tqdm(items, title, total, disable=not shown, **looks)

    def note(self, values: dict[str, float]) -> None:
        """Replaces the values at the end of the line."""
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(text, refresh=False)

    def __iter__(self) -> Iterator[Any]:
        yield from self.bar


class _Lines(io.StringIO):
    """What a progress bar writes over and over on one line, as separate lines of standard output."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line:
            print(line, flush=True)
        return len(text)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says in the block, such as that the disk is full, into a UserError of `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own upon that of the file
        said = error if isinstance(error, OSError) else error.__context__
        if not isinstance(said, OSError) or said.errno is None:
            raise
        line = f"cannot write {path}: {said.strerror}"
        if said.errno in FULL:
            place = next(folder for folder in path.absolute().parents if folder.exists())
            line += f"; {shutil.disk_usage(place).free / 1e6:,.1f} MB are free there"
        raise UserError(line) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it replaces `path` on success and is deleted on failure.

    Raises UserError where the system cannot write, such as on a full disk; `path` is then as it was.
    """
    temp = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield temp
            _sync(temp)
            os.replace(temp, path)
            _sync(path.parent)  # a rename is safe from a power cut only once its folder is written
        finally:
            temp.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes the file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece: a reader sees the old one or the new one."""
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text. A number that is NaN or infinite, for which JSON has no word, becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
