"""Dataclasses of plain types in JSON files: whatever is wrong with a file is said in one line."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from utils import UserError, to_json, write_text

Value = TypeVar("Value")
LARGEST = 1e300  # what a number may be; JSON has numbers that no float holds
MOST = 2**63 - 1  # what a whole number may be


def write_plain(path: Path, value: Any, schema: int) -> None:
    """Writes a dataclass, which may hold others, as JSON; None is left out where it is the default."""
    write_text(path, to_json({"schema": schema, **_without_defaults(value)}, indent=1))


def _without_defaults(value: Any) -> dict[str, Any]:
    content = asdict(value)
    absent = [entry.name for entry in fields(value) if entry.default is None and content[entry.name] is None]
    return {name: part for name, part in content.items() if name not in absent}


def read_plain(path: Path, kind: type[Value], schemas: Collection[int], what: str) -> Value:
    """The dataclass `kind` from a file with one of these schemas, which holds `what`.

    Raises ValueError, in one line that names the file and the entry, for everything that `write_plain` does
    not write: other entries, other types, numbers that are not finite. What the dataclass refuses itself is
    said in the same way.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "schema" not in content:
            raise UserError("it has no schema")
        schema = content.pop("schema")
        if type(schema) is not int or schema not in schemas:
            raise UserError(f"its schema is {shortened(schema)}, accepted: {', '.join(map(str, schemas))}")
        return restored(kind, content)
    except OSError as error:
        raise UserError(f"{path} is no {what} that can be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no {what} that can be read: {error}") from error


def restored(kind: type[Value], content: Mapping[str, Any], where: str = "") -> Value:
    """The dataclass `kind` from the entries of a JSON object; `where` is the name of that object's entry."""
    hints = get_type_hints(kind)
    if unknown := [name for name in content if name not in hints]:
        raise UserError(f"unknown entry {shortened(where + unknown[0])}")
    values = {name: _typed(hints[name], value, where + name) for name, value in content.items()}
    for entry in fields(kind):  # pyrefly: ignore[bad-argument-type]
        if entry.default is MISSING and entry.name not in values:
            raise UserError(f"it has no {where}{entry.name}")
    return kind(**values)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as a field of type `kind` has it; ValueError for another type."""
    if isinstance(kind, UnionType):  # X | None
        if value is None:
            return None
        (kind,) = set(get_args(kind)) - {NoneType}
    wrong = partial(_wrong, where, value)
    if is_dataclass(kind) and isinstance(kind, type):
        return restored(kind, value, f"{where}.") if isinstance(value, dict) else wrong("an object")
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            return wrong("a list")
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            return wrong(f"a list of {len(kinds)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(_typed(part, one, f"{where}[{i}]") for i, (part, one) in enumerate(pairs))
    if get_origin(kind) is dict:  # of names
        if not isinstance(value, dict):
            return wrong("an object")
        return {name: _typed(get_args(kind)[1], part, f"{where}.{name}") for name, part in value.items()}
    if get_origin(kind) is Literal:
        known = get_args(kind)
        return value if type(value) is str and value in known else wrong(f"{', '.join(known)}")
    if kind is Any:
        return value
    accepted, fits = _PLAIN[kind]
    return kind(value) if fits(value) else wrong(accepted)


def _wrong(where: str, value: Any, accepted: str) -> Any:
    raise UserError(f"{where} is {shortened(value)}; accepted: {accepted}")


def _is_text(value: Any) -> bool:
    # JSON can spell half a character, which cannot be printed.
    return type(value) is str and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # which no NaN is


_PLAIN: dict[type, tuple[str, Callable[[Any], bool]]] = {
    float: ("a finite number", _is_number),
    int: ("a whole number", lambda value: type(value) is int and abs(value) <= MOST),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("text", _is_text),
}
