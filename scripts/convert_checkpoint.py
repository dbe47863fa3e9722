"""Rewrites a checkpoint so that it loads safely: tensors and plain types only, on the CPU.

    python scripts/convert_checkpoint.py checkpoint.pth.tar converted.pth
    python scripts/convert_checkpoint.py lite0.pth lite0_timm.pth --model timm/tf_efficientnet_lite0  # rename
    in order

Reads with torch's restricted unpickler and, besides what that allows, NumPy scalars, which become Python
numbers; a file that holds anything else is refused by name and nothing in it is run. With `--model` the
weights, which must be the network's in number, order and shape, get the network's names.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.checkpoint import load, save
from training.foreign import named_in_order, weights_of
from utils import run_main

NUMBERS = [np.dtype(kind) for kind in "?bhilqBHILQefd"]


def latin1(text, encoding):
    """What old pickles call to spell bytes; other encodings, which could do more, are refused."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"GLOBAL _codecs.encode to {encoding}")
    return text.encode("latin1")


def allowed():
    """NumPy's scalars under their old and new names, and what these are made of."""
    scalar = np._core.multiarray.scalar
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *{type(kind) for kind in NUMBERS}, (latin1, "_codecs.encode")]


def read(path):
    """The content of a checkpoint. Raises ValueError in one line for what is not allowed."""
    try:
        with torch.serialization.safe_globals(allowed()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes can fail anywhere in the reader
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {held[1]}" if held else "it is damaged or no checkpoint"
        raise ValueError(f"{path} is refused: {why}") from error


def plain(value):
    """The same nest with Python numbers in the place of NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return type(value)((key, plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--model", help="registered network whose names the weights get")
    args = parser.parse_args(argv)
    content = read(args.source)
    if not isinstance(content, dict):
        raise ValueError(f"{args.source} is not a checkpoint: it holds a {type(content).__name__}")
    content = plain(content)
    if args.model:
        content = {"state_dict": named_in_order(weights_of(content, args.source), args.model, args.source)}
    save(args.target, content)
    print(f"wrote {args.target}: {', '.join(map(str, list(load(args.target))[:8]))}")


if __name__ == "__main__":
    run_main(main)
