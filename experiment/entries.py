"""What the entries of a checkpoint about its run may be."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from reprlib import repr as shortened
from typing import Any, NamedTuple

from torch import Tensor

from utils import UserError

NUMBERS = int, float
PACE = {"world_size", "images", "at_start"}  # see experiment.resume.Pace
LARGE = 4096  # the largest side of images; also of integers in an arch, unless its weights are larger


class Entry(NamedTuple):
    """What an entry about the run may be, in words and as a test of a value that is not None."""

    accepted: str
    fits: Callable[[Any], bool]


def _counts(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_epoch(value: object) -> bool:
    return value == -1 or _counts(value)


def _fits_pace(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == PACE and all(_counts(n) and n for n in value.values())


def _fits_partial(value: object) -> bool:
    """See experiment.place.Place."""
    if not isinstance(value, dict) or not value:
        return value == {}
    norm, shards = value.get("grad_norm"), value.get("processes")
    return (
        all(_counts(value.get(name)) for name in ("batch", "micro_batch", "step"))
        and value["micro_batch"] > 0
        and type(value.get("seconds")) is float
        and _are_numbers(value.get("figures"))
        and (norm is None or (isinstance(norm, Tensor) and norm.ndim == 0))
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and _are_sums(shard.get("meters")) for shard in shards)
        and all(_fits_weighting(shard["l2w"]) for shard in shards if "l2w" in shard)
    )


def _fits_weighting(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("tables"), dict):
        return False
    tables = value["tables"].values()
    return _are_sums(value.get("meters")) and all(isinstance(t, Tensor) and t.ndim == 2 for t in tables)


def _are_sums(value: object) -> bool:
    """Whether it is a state of `utils.Meters`."""
    if not isinstance(value, dict) or value.keys() != {"sums", "counts"}:
        return False
    sums, counts = value["sums"], value["counts"]
    one_each = isinstance(sums, dict) and isinstance(counts, dict) and sums.keys() == counts.keys()
    return one_each and all(map(_counts, counts.values())) and _are_numbers(sums)


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(type(k) is str and _is_number(v) for k, v in value.items())


def _is_number(value: object) -> bool:
    """Whether it is a number, or a vector of them."""
    return type(value) in NUMBERS or (isinstance(value, Tensor) and value.ndim <= 1)


def _fits_record(value: object) -> bool:
    return isinstance(value, dict) and (not value or value.keys() >= {"epoch", "seconds"})


def _are_words(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(name) is str for name in value)


ROWS = "distinct numbers of rows, from 0"
ENTRIES = {
    "arch": Entry("name, options and num_classes", lambda value: isinstance(value, (dict, str))),
    "epoch": Entry("a number from -1, or a word", lambda value: isinstance(value, str) or _is_epoch(value)),
    "best": Entry("a finite number", lambda value: type(value) in NUMBERS and math.isfinite(value)),
    "calib_indices": Entry(ROWS, lambda value: isinstance(value, list)),
    "class_names": Entry("a list of words", _are_words),
    "pace": Entry(f"numbers for {', '.join(sorted(PACE))}", _fits_pace),
    "record": Entry("a line of log.txt", _fits_record),
    "partial": Entry("what is done of an epoch", _fits_partial),
}


def check_entries(content: Mapping[str, Any], source: object) -> None:
    """Raises ValueError, naming entry and value, for one about the run that no run writes."""

    def check(name: str, value: object, accepted: str, right: bool) -> None:
        if not right:
            held = f"checkpoint {source} has {name} {shortened(value)}"
            raise UserError(f"{held}; accepted: {accepted}")

    lacks = content.get("partial") and not content.get("pace")
    check("pace", None, "that of its partial epoch", not lacks)
    for name, entry in ENTRIES.items():
        value = content.get(name)
        check(name, value, entry.accepted, value is None or entry.fits(value))
    seen: set[int] = set()
    for row in content.get("calib_indices") or ():
        check("among calib_indices", row, ROWS, _counts(row) and row not in seen)
        seen.add(row)
    args = content.get("args")
    flags = vars(args) if isinstance(args, Namespace) else args
    side = flags.get("input_size") if isinstance(flags, dict) else None
    check("input_size", side, f"at most {LARGE}", type(side) is not int or side <= LARGE)
