"""Rewrites a checkpoint so that it loads safely: tensors and plain types only, on the CPU.

    python scripts/convert_checkpoint.py checkpoint.pth.tar converted.pth
    python scripts/convert_checkpoint.py lite0.pth lite0_timm.pth --model timm/tf_efficientnet_lite0

Reads with torch's restricted unpickler and, besides what that allows, NumPy scalars, which become Python
numbers; a file that holds anything else is refused by name and nothing in it is run. With `--model` the
weights, which must be the network's in number, order and shape, get the network's names.
"""

import pickle
from dataclasses import dataclass
from typing import Any

from common import read_flags, word

import numpy as np

from experiment.checkpoint import load, save
from experiment.published import named_in_order, understood
from utils import option, run_main

NUMBERS = [np.dtype(kind) for kind in "?bhilqBHILQefd"]


@dataclass(frozen=True)
class Flags:
    """What is rewritten."""

    source: str = word("checkpoint to read")
    target: str = word("file to write")
    model: str = option("", "registered network whose names the weights get")


def latin1(text: str, encoding: str) -> bytes:
    """What old pickles call to encode bytes; other encodings, which could do more, are refused."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"GLOBAL _codecs.encode to {encoding}")
    return text.encode("latin1")


def allowed() -> list[Any]:
    """NumPy's scalars under their old and new names, and what these are made of."""
    scalar = np.float64(0).__reduce__()[0]  # of a module that NumPy 2 renamed
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *{type(kind) for kind in NUMBERS}, (latin1, "_codecs.encode")]


def plain(value: Any) -> Any:
    """The same nested value with Python numbers in place of NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return type(value)((key, plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def main(argv: list[str]) -> None:
    """The command line."""
    flags = read_flags(Flags, argv, __doc__)
    content = plain(load(flags.source, allowed()))
    if flags.model:
        weights = understood(content, flags.source).weights("model")
        content = {"state_dict": named_in_order(weights, flags.model, flags.source)}
    save(flags.target, content)
    print(f"wrote {flags.target}: {', '.join(map(str, list(load(flags.target))[:8]))}")


if __name__ == "__main__":
    run_main(main)
