"""What every entry script needs: flags, processes and devices, seeds, meters, progress and logs."""

import argparse
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import Parameter
from types import NoneType
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class Flag(NamedTuple):
    """One command-line flag. `kind` is int, float, str or bool; `many` takes a list; `low` is the least value accepted."""

    name: str
    kind: type
    default: Any
    help: str = ""
    many: bool = False
    low: float | None = None
    choices: tuple[str, ...] = ()

    def convert(self, word: str) -> Any:
        """The value that `word` stands for; a list if `many`, of numbers joined by dashes or commas or of one."""
        if self.many:
            one = self._replace(many=False)
            return [one.convert(part) for part in re.split(r"[-,]" if self.kind is int else ",", word)]
        if self.kind is bool:
            if word.lower() not in TRUE + FALSE:
                raise argparse.ArgumentTypeError(f"{word!r} is not true or false")
            return word.lower() in TRUE
        try:
            value = self.kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not of type {self.kind.__name__}") from None
        if self.low is not None and not value >= self.low:
            raise argparse.ArgumentTypeError(f"{word} is below the least value accepted, {self.low}")
        if self.choices and value not in self.choices:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(self.choices)}")
        return value

    def add_to(self, group: Any) -> None:
        """Declares the flag in an argparse group."""
        text = "; ".join(filter(None, [self.help, ", ".join(self.choices), f"default: {_words(self.default)}"]))
        group.add_argument(
            f"--{self.name}",
            type=self.convert,
            nargs="+" if self.many else None,
            action=_Flatten if self.many else "store",
            metavar="LIST" if self.many else self.kind.__name__.upper(),
            help=text.replace("%", "%%"),
        )


def flags_of_signature(parameters: dict[str, Parameter]) -> list[Flag]:
    """The flags that a constructor's keyword parameters make, by their annotations and defaults."""
    flags = []
    for name, parameter in parameters.items():
        kinds = [k for k in get_args(parameter.annotation) or [parameter.annotation] if k is not NoneType]
        many = hasattr(parameter.annotation, "__origin__")
        flags.append(Flag(name, kinds[0], parameter.default, many=many))
    return flags


def parse_flags(
    groups: dict[str, list[Flag]],
    argv: list[str],
    options_of: Callable[[str], dict[str, Parameter]],
    nearest: Callable[[str, Iterable[str]], str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parses a command line by a table of flags and the options of the model that `--model` names.

    `options_of(name)` gives a model's options, `nearest(word, words)` the end of a message about a misspelt word. Returns
    what was given of the table's flags and of the model's options. "-" equals "_" in flag names. Raises ValueError.
    """
    argv = [_underscored(word) for word in argv]
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", default="")
    model = finder.parse_known_args(argv)[0].model
    table = {flag.name for flags in groups.values() for flag in flags}
    options = [flag for flag in flags_of_signature(options_of(model) if model else {}) if flag.name not in table]
    title = f"options of {model}" if model else "options of the model (name one with --model to list them)"
    parser = _Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, flags in {**groups, title: options}.items():
        group = parser.add_argument_group(name)
        for flag in flags:
            flag.add_to(group)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name}" for name in (*table, *(flag.name for flag in options))]
        raise ValueError(f"unknown flag {unknown[0]}; {nearest(unknown[0], names)[:300]}")
    chosen = {flag.name for flag in options}
    return tuple({k: v for k, v in vars(given).items() if (k in chosen) == wanted} for wanted in (False, True))


def with_defaults(groups: dict[str, list[Flag]], *given: dict[str, Any]) -> argparse.Namespace:
    """The table's flags: defaults, replaced by what each of `given` has of them, the later ones first."""
    flags = {flag.name: flag.default for flags in groups.values() for flag in flags}
    for values in given:
        flags.update({name: value for name, value in values.items() if name in flags})
    return argparse.Namespace(**flags)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


class _Flatten(argparse.Action):
    """Joins the lists that the words of a list flag stand for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs an entry script; what its user did wrong is one line and exit code 2, not a traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, FileNotFoundError) as error:
        if os.environ.get("DYNEXIT_TRACEBACK"):
            raise
        # An error from a data loader's worker carries the worker's traceback before its own last line.
        line = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        sys.exit(f"error: {line}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Compute:
    """Where and how a network runs. `amp` is None, torch.bfloat16 or torch.float16; `rank` of `world_size` processes."""

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

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where it is asked for."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def start_compute(device: str, amp: str, channels_last: bool) -> Compute:
    """Joins the processes of torchrun or SLURM, if there are any, and picks the device; `amp`: none, bf16 or fp16."""
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
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo", rank=rank, world_size=world_size)
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return Compute(torch.device(kind), dtype, channels_last, rank, world_size)


def describe_machine(device: torch.device) -> str:
    """Processor, threads and torch version, for the record of a measurement."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return f"{model or platform.processor() or 'CPU'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seeds Python, NumPy and torch for one epoch of one process.

    Every epoch starts from its own seed, so a run that stops and resumes needs no saved generator states to be the same.
    """
    mixed = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def gather(part: Any, compute: Compute) -> list[Any]:
    """The `part` of every process, by rank."""
    if compute.world_size == 1:
        return [part]
    parts = [None] * compute.world_size
    dist.all_gather_object(parts, part)
    return parts


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
        return {name: sum(p[name][0] for p in everybody) / sum(p[name][1] for p in everybody) for name in pairs}


class Progress:
    """A loop with a live line (bar, time left, notes), or plain lines every few seconds where there is no terminal."""

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
                print(f"{self.title}: {done}/{self.total or '?'}, {spent:.0f} s{left} {self.text}", flush=True)


class Board:
    """TensorBoard, mirrored to a Weights & Biases project if one is given; without a folder it does nothing."""

    def __init__(self, log_dir: str | None, wandb_project: str | None, config: dict[str, Any]) -> None:
        self.writer = None
        if log_dir is None:
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


def append_json(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Adds one JSON object as a line to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file in one piece: a reader sees the old file or the new one."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.replace(part, path)
