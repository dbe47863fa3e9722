"""What every entry script needs: processes and devices, seeds, meters, progress and logs."""

import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler


def option(default: Any, about: str = "", *, low: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of a frozen dataclass that is also a flag of the command line (`experiment.options`).

    `about` is its help, `low` the least value accepted, `choices` the words where the annotation is no Literal.
    """
    return field(default=default, metadata={"about": about, "low": low, "choices": choices})


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs an entry script; what its user did wrong is one line and exit code 2, not a traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("DYNEXIT_TRACEBACK"):
            raise
        # An error from a data loader's worker carries the worker's traceback before its own last line.
        line = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ValueError: ")
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Compute:
    """Where and how a network runs: `amp` is None or a half-precision type, `rank` one of `world_size`
    processes."""

    device: torch.device
    amp: torch.dtype | None = None
    channels_last: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def ranks(self) -> dict[str, int]:
        """This process among all."""
        return {"rank": self.rank, "world_size": self.world_size}

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, maps in the memory format of the network."""
        maps = self.channels_last and tensor.ndim == 4
        layout = torch.channels_last if maps else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=layout)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where it is asked for."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def start_compute(device: str, amp: str, channels_last: bool) -> Compute:
    """Joins the processes of torchrun or SLURM, if there are any, and picks the device.

    `amp` is none, bf16, fp16, or auto: fp16 on a GPU and bf16 on a CPU. Raises ValueError for another or
    absent device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: accepted: auto, cpu, cuda, cuda:N")
    ranks = [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]
    names = next((names for names in ranks if all(name in os.environ for name in names)), None)
    rank, world_size, local_rank = (int(os.environ[name]) for name in names) if names else (0, 1, 0)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device here; accepted: auto, cpu")
    if kind == "cuda":
        kind = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if world_size > 1:
        # An average that is kept in main memory is shared over gloo.
        backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    if amp == "auto":
        amp = "fp16" if kind.startswith("cuda") else "bf16"
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return Compute(torch.device(kind), dtype, channels_last, rank, world_size)


def describe_machine(device: torch.device) -> str:
    """Processor, threads and torch version, for the record of a measurement."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), ""
            )
    return f"{model or platform.processor() or 'CPU'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seeds Python, NumPy and torch for one epoch of one process.

    Every epoch starts from its own seed, so that a resumed run needs no saved generator states to be the
    same.
    """
    mixed = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def one_process_first(wanted: bool) -> Iterator[None]:
    """If `wanted`, the first process runs the block before all others, for instance to download what they
    then find."""
    wanted = wanted and dist.is_initialized()
    if wanted and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if wanted and dist.get_rank() == 0:
            dist.barrier()


def share_buffers(module: nn.Module, compute: Compute) -> None:
    """Gives every process the first one's buffers: after a step each has batch-norm statistics of its own
    images."""
    for buffer in module.buffers() if compute.world_size > 1 else ():
        dist.broadcast(buffer, 0)


def gather(part: Any, compute: Compute) -> list[Any]:
    """The `part` of every process, by rank."""
    if compute.world_size == 1:
        return [part]
    parts = [None] * compute.world_size
    dist.all_gather_object(parts, part)
    return parts


class ShardSampler(Sampler[int]):
    """A process's share of `size` indices, unpadded; in order, or shuffled and cut to full groups of all
    processes."""

    def __init__(self, size: int, *, rank=0, world_size=1, shuffle=False, seed=0, group=1):
        self.size, self.rank, self.world_size, self.shuffle, self.seed = size, rank, world_size, shuffle, seed
        self.used = size - size % (world_size * group) if shuffle else size
        self.epoch, self.chances = (
            0,
            None,
        )  # of every index, where some are to be drawn more often than others

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.used, self.world_size))

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.size) if self.shuffle else np.arange(self.size)
        if self.chances is not None:
            order = rng.choice(self.size, self.size, p=self.chances)
        return iter(order[self.rank : self.used : self.world_size].tolist())


class Meters:
    """Means of named values: sums and counts are kept on the device and divided once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, total: Tensor | float, count: int) -> None:
        """Adds the sum of `count` values."""
        self.sums[name] = self.sums.get(name, 0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    def means(self, compute: Compute | None = None) -> dict[str, float]:
        """Mean of each value so far; over all processes if `compute` is given."""
        pairs = {name: (float(total), self.counts[name]) for name, total in self.sums.items()}
        everybody = [pairs] if compute is None else gather(pairs, compute)
        return {
            name: sum(p[name][0] for p in everybody) / sum(p[name][1] for p in everybody) for name in pairs
        }


class Progress:
    """A loop with a live line (bar, time left, notes), or plain lines every few seconds where there is no
    terminal."""

    def __init__(
        self, items: Iterable[Any], title: str, total: int | None, *, shown: bool, every: float = 15.0
    ) -> None:
        self.items, self.title, self.total, self.shown, self.every = items, title, total, shown, every
        self.text, self.bar = "", None

    def note(self, values: dict[str, float]) -> None:
        """Replaces the figures at the end of the line."""
        self.text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(self.text)

    def __iter__(self) -> Iterator[Any]:
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(self.items, self.title, self.total, dynamic_ncols=True, leave=False) as self.bar:
                yield from self.bar
            return
        start = last = time.monotonic()
        for done, item in enumerate(self.items, 1):
            yield item
            now = time.monotonic()
            if self.shown and now - last >= self.every:
                last, spent = now, now - start
                left = f", {spent / done * (self.total - done):.0f} s left" if self.total else ""
                print(
                    f"{self.title}: {done}/{self.total or '?'}, {spent:.0f} s{left} {self.text}", flush=True
                )


class Board:
    """TensorBoard, mirrored to a Weights & Biases project if one is given; without a folder it does
    nothing."""

    def __init__(self, log_dir: str | None, wandb_project: str | None, config: dict[str, Any]) -> None:
        self.writer = None
        if not log_dir:
            return
        if wandb_project:
            import wandb

            wandb.init(project=wandb_project, config=config, sync_tensorboard=True, dir=log_dir)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir)

    def add(self, values: dict[str, float], step: int, prefix: str = "") -> None:
        """Adds scalars at an optimizer step."""
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(prefix + name, value, step)

    def add_histograms(self, tables: dict[str, Tensor], step: int, prefix: str = "") -> None:
        """Adds the distribution of every column of tables [N, K] at an optimizer step."""
        for name, table in tables.items() if self.writer else ():
            for k, column in enumerate(table.T):
                self.writer.add_histogram(f"{prefix}{name}/exit{k}", column, step)


def append_json(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Adds one JSON object as a line to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. It replaces `path` when all went well and is gone when not."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        yield temp
        _sync(temp)
        os.replace(temp, path)
        _sync(path.parent)  # a rename is safe from a power cut only once its folder is written
    finally:
        temp.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the file or folder on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece: a reader sees the old one or the new one."""
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")
