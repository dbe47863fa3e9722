"""Whether a checkpoint can be trusted: its bytes, its size, its network, its weights."""

import math
import stat
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from experiment.entries import LARGE, NUMBERS
from experiment.members import upgraded
from experiment.options import Option, options_of_signature
from models import create_model, model_options
from utils import UserError

RATIO = 20  # a file that unpacks to more than so many times its size is refused
KINDS = {stat.S_IFDIR: "Is a directory", stat.S_IFIFO: "Is a FIFO"}
PARAMETER = 10**6  # the numbers that one parameter counts for, besides its own


class Damaged(UserError):
    """The file is not as it was written."""


def check_file(path: Path) -> bool:
    """Raises Damaged for bytes that have changed, ValueError for no regular file and for one that swells.

    Every entry of a zip, which torch writes, has a checksum; to compare them takes 0.6 s per GB. Older
    pickles and safetensors have none, for which this returns False: a change in those shows only where it
    breaks the structure, or in one of the later checks. Raises OSError for what cannot be read.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        kind = KINDS.get(stat.S_IFMT(info.st_mode), "Is a device or a socket")
        raise UserError(f"cannot read checkpoint {path}: {kind}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch takes for a zip
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            # Where torch was told to write no checksums (`set_crc32_options`), all are 0.
            summed = any(entry.CRC for entry in entries)
            for entry in entries if summed and unpacked <= _most(info.st_size) else ():
                with archive.open(entry) as part:
                    while part.read(1 << 20):
                        pass
    except Exception as error:  # damaged bytes can fail anywhere in the reader
        raise Damaged(f"{path} is truncated or not a checkpoint: {error}") from error
    _check_ratio(unpacked, info.st_size, path)
    return summed


def _most(size: int) -> int:
    """The bytes that a file of `size` bytes may unpack to."""
    return max(RATIO * size, 1 << 20)


def _check_ratio(unpacked: float, size: int, source: object) -> None:
    if unpacked > _most(size):
        swells = f"it unpacks to more than {RATIO} times its {size} bytes"
        raise UserError(f"checkpoint {source} is refused: {swells}")


def check_unpacked(content: object, size: int, source: object) -> None:
    """Raises ValueError if the content of a file of `size` bytes is larger than that lets expect.

    Tensors may repeat one number without end, and lists may hold each other.
    """
    try:
        unpacked = _unpacked(content, {})
    except RecursionError:
        unpacked = math.inf
    except TypeError as error:
        raise UserError(f"checkpoint {source} is refused: it holds {error}") from None
    _check_ratio(unpacked, size, source)


def _unpacked(value: object, known: dict[int, float]) -> float:
    """About the bytes of a nest written out; `known` are those of containers and storages met before."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise TypeError(f"a tensor that is {value.layout}, on {value.device}")
        storage, size = value.untyped_storage().data_ptr(), value.numel() * value.element_size()
        before = known.get(storage, 0)
        known[storage] = max(before, size)
        return max(0, size - before)
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    if isinstance(value, Namespace):
        value = vars(value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(parts, (list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # of one that holds itself
        known[id(value)] = 1 + sum(_unpacked(part, known) for part in parts)
    return known[id(value)]


def checked_arch(arch: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The `arch` of a file; nothing in it makes its network fetch weights. Raises ValueError in one line."""
    for key, kind in {"name": str, "options": dict, "num_classes": int}.items():
        value = arch.get(key)
        if type(value) is not kind or (kind is int and value < 1):
            accepted = "1 and more" if kind is int else f"a {kind.__name__}"
            raise UserError(f"checkpoint {source} has arch {key} {shortened(value)}; accepted: {accepted}")
    try:
        return _unfetched(upgraded(arch))
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {source} has a strange arch: {error}") from error


def _unfetched(value: Any) -> Any:
    """The same nest without entries `pretrained`: the weights are in the file."""
    if isinstance(value, dict):
        return {key: _unfetched(part) for key, part in value.items() if key != "pretrained"}
    return type(value)(map(_unfetched, value)) if type(value) in (list, tuple) else value


def check_network(arch: Mapping[str, Any], weights: Mapping[str, Tensor], source: object) -> None:
    """Raises ValueError if the network of `arch` cannot be built, or is far larger than `weights`.

    It is built without memory for its own weights, and no further than these make plausible.
    """
    where = f"checkpoint {source} has arch"
    for option in options_of_signature(model_options(arch["name"])):
        value = arch["options"].get(option.name)
        if value is not None and not _is_of(option, value):
            accepted = f"{'a list of ' if option.many else ''}{option.kind.__name__}"
            raise UserError(f"{where} option {option.name} {shortened(value)}; accepted: {accepted}")
    elements = sum(value.numel() for value in weights.values())
    largest = max([LARGE, *(size for value in weights.values() for size in value.shape)])
    for number in _integers(arch):
        if abs(number) > largest:
            raise UserError(f"{where} with {number} in it, more than its weights make plausible: {largest}")
    try:
        with torch.device("meta"), _at_most(10 * (elements + PARAMETER * len(weights)) + 10**10):
            network = create_model(arch["name"], arch["num_classes"], **arch["options"])
        own = sum(value.numel() for value in network.state_dict().values())
        if own > 2 * elements + PARAMETER:
            raise UserError(f"it has {own} numbers, and the file's weights {elements}")
    except Exception as error:  # strange options can fail anywhere in a network
        if "meta tensor" not in str(error):  # some of timm's networks look at numbers, which are not there
            line = (str(error) or repr(error)).splitlines()[0]
            raise UserError(f"{where} {arch['name']} that cannot be built: {line}") from error


def _is_of(option: Option, value: Any) -> bool:
    """Whether a stored value has the type of a network's option."""
    many = isinstance(value, (list, tuple))
    if many and option.kind is str:  # networks of a cascade, in words or dicts
        return option.many
    kinds = NUMBERS if option.kind is float else (option.kind,)
    return many == option.many and all(type(one) in kinds for one in (value if many else [value]))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        yield len(value)
        for part in value:
            yield from _integers(part)
    elif isinstance(value, int):
        yield value


@contextmanager
def _at_most(elements: int) -> Iterator[None]:
    """Stops building a network that makes more parameters, some of which it may drop in the end."""
    left = elements

    def count(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= PARAMETER + (0 if parameter is None else parameter.numel())
        if left < 0:
            raise UserError(f"it is far larger than the file's weights, already at a {name}")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError, naming the tensor, if some of `weights` cannot be those of a trained network.

    They are finite, floating where the network's `own` are, and variances are not negative.
    """
    for key, value in weights.items():
        if key not in own:
            continue
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{where}: {key} is of type {value.dtype}, accepted: {own[key].dtype}")
        check_finite(value, f"{where}: {key}")
        if key.endswith("running_var") and value.numel() and value.min() < 0:
            raise UserError(f"{where}: {key} is {value.min():.4g} somewhere, but variances are 0 or more")


def check_finite(state: Any, where: str) -> None:
    """Raises ValueError, naming the place, where a nest of tensors and numbers holds NaN or infinity."""
    if isinstance(state, Tensor) and state.is_floating_point() and state.numel():
        # NaN or infinite where one is, in a tenth of the time of isfinite.
        state = sum(map(float, state.detach().aminmax()))
    if isinstance(state, float) and not math.isfinite(state):
        raise UserError(f"{where} holds {state}, not finite numbers")
    for key, part in _parts(state):
        check_finite(part, f"{where} {key}")


def check_numbers(state: Any, own: Any, where: str) -> None:
    """Raises ValueError, naming the place, where the nest `own` has a number and `state` something else."""
    if type(own) in NUMBERS and type(state) not in NUMBERS:
        raise UserError(f"{where} is {shortened(state)}, accepted: a number")
    there = dict(_parts(state))
    for key, part in _parts(own):
        if key in there:
            check_numbers(there[key], part, f"{where} {key}")


def _parts(state: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(state, dict):
        return state.items()
    return enumerate(state) if isinstance(state, (list, tuple)) else ()
