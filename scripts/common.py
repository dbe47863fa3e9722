"""What the scripts share: flags as a dataclass, tables of text, timing.

    @dataclass(frozen=True)
    class Flags:
        images: Path = word("an .npz file")  # given by its place
        rounds: int = option(5, "how often every call is timed", low=1)

    flags = read_flags(Flags, argv, __doc__)

Imported before the repository's modules, which it puts on the path.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import installed  # noqa: F401

# isort: split
import torch
from torch import Tensor

from adaptive.costs import StageCosts
from adaptive.policy import Policy
from adaptive.timing import interleaved
from experiment.options import Parser, fill, options_of, parse, underscored
from experiment.samples import Seen
from models import MultiExitModel, nearest
from training.losses import Losses, exit_weights, joint_objective
from training.optim import Update
from utils import UserError

Flags = TypeVar("Flags")
Answer = TypeVar("Answer")
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def word(about: str) -> Any:
    """A positional argument as a field of a dataclass; a tuple takes one or more words."""
    return field(metadata={"about": about})


def read_known(group: type[Flags], argv: Sequence[str], about: str | None) -> tuple[Flags, list[str]]:
    """The fields of a dataclass from a command line, and the words that are not its flags.

    Fields are made by `utils.option` or `word`; a flag that is true or false may stand alone for true.
    `about` is the help, a module's docstring. Raises ValueError in one line.
    """
    parser = Parser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for entry, option in zip(fields(group), options_of(group), strict=True):
        add = partial(parser.add_argument, help=option.about)
        if entry.default is MISSING:
            add(option.name, type=option.kind, nargs="+" if option.many else None)
        elif option.kind is bool:
            add(f"--{option.name}", type=option.convert, nargs="?", const=True)
        else:
            option.add_to(parser)
    given, rest = parser.parse_known_args(list(map(underscored, argv)))
    return fill(group, vars(given)), rest


def read_flags(group: type[Flags], argv: Sequence[str], about: str | None) -> Flags:
    """`read_known` where all words must be known."""
    flags, rest = read_known(group, argv, about)
    if rest:
        known = [f"--{option.name}" for option in options_of(group)]
        raise UserError(f"unknown flag {rest[0]}; {nearest(rest[0], known)}")
    return flags


def network_options(group: type, model: str, words: Sequence[str]) -> dict[str, Any]:
    """Options of the registered network `model`, such as --nBlocks 2, beside the flags of a group."""
    return parse([group], ["--model", model, *words]).options


def check_policy_alone(flags: Any, *replaced: str) -> None:
    """Raises ValueError where a flag that `--policy` replaces is given beside it.

    Without being given, these are None or empty.
    """
    for name in replaced if flags.policy else ():
        value = getattr(flags, name)
        if value not in (None, ""):
            raise UserError(f"--policy {flags.policy} and --{name} {value}: give one of them")


def policy_for(file: str, network: MultiExitModel) -> Policy | None:
    """The saved policy of a file, None without a file; ValueError if it was made for another network."""
    return Policy.load(file).check_network(network) if file else None


def rivals_of(policy: Policy, seen: Seen, costs: StageCosts) -> list[int]:
    """The last exit, and the cheapest one that alone is as accurate as early exit, if that is another."""
    goal = policy.simulate(seen.read_by(policy), costs).accuracy
    *earlier, last = seen.own.correct.double().mean(1).tolist()
    good = [k for k, right in enumerate(earlier) if right >= goal]
    alone = costs.alone()
    best = sorted(good, key=lambda k: alone[k])[:1]
    return [len(earlier), *best]


def percents(shares: Iterable[float], digits: int = 2) -> str:
    """Fractions as percentages in a row."""
    return " ".join(f"{100 * share:.{digits}f}" for share in shares)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints aligned columns, the first to the left; heads carry cell formats, as in "images/s:.0f".

    Text is printed as it is.
    """
    names, _, formats = zip(*(head.partition(":") for head in heads), strict=True)
    lines = [names]
    for row in rows:
        cells = zip(row, formats, strict=True)
        lines.append([one if isinstance(one, str) else format(one, kind) for one, kind in cells])
    first_width, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(first_width), *map(str.rjust, others, widths)]
        print("   ".join(cells).rstrip())


class Steps:
    """Training steps of a network on one batch of random images, under the loss of all its exits."""

    def __init__(self, network: MultiExitModel, update: Update, batch_size: int, side: int) -> None:
        self.network, self.update = network, update
        self.objective = joint_objective(Losses(exit_weights(network.num_exits)))
        self.images = torch.randn(batch_size, 3, side, side)
        self.targets = torch.randint(10, (batch_size,))

    def __call__(self) -> None:
        for loss, _ in self.objective(self.network, self.images, self.targets):
            self.update(loss)


def timed(call: Callable[[], Answer]) -> tuple[Answer, float]:
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - start


def warm_times(calls: Mapping[Any, Callable[[], Any]], rounds: int, device: torch.device) -> dict[Any, float]:
    """Median seconds of every call, timed in turn after an unmeasured call each."""
    for call in calls.values():
        call()
    return interleaved(calls, rounds=rounds, device=device)


def matrix_products(side: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Products of two square matrices, by precision: `2 * side**3` operations, as fast as a machine gets."""
    calls = {}
    for name, dtype in PRECISIONS.items():
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        calls[name] = partial(torch.mm, a, b)
    return calls


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def add_bytes(digest: Any, value: Any) -> None:
    """Feeds nested plain types and tensors to a hash, keys in the order of their text."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            add_bytes(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            add_bytes(digest, item)
    else:
        digest.update(repr(value).encode())


def digest_of(value: Any) -> str:
    """The sha256 of a nested value, in hexadecimal digits."""
    add_bytes(digest := hashlib.sha256(), value)
    return digest.hexdigest()
