"""Networks of a cascade as words on a command line: "NAME:option=value,size=224"."""

import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from models import kind_of, model_options, nearest
from models.ebjr import Member
from utils import UserError

VIEW = Member._fields[2:]  # how a member sees images, after its name and options


def parse_member(text: str) -> Member:
    """A network from "NAME" or "NAME:option=value,option=value"; slashes join the numbers of a list.

    Options are the network's own and those of `Member`. Raises ValueError for an unknown network or option,
    or a value of another type.
    """
    name, _, rest = text.partition(":")
    own = {key: parameter.annotation for key, parameter in model_options(name).items()}
    hints = get_type_hints(Member)
    known = {**own, **{key: hints[key] for key in VIEW}}
    found = {}
    for part in filter(None, rest.split(",")):
        key, equals, word = part.partition("=")
        if key == "weights":
            raise UserError(
                f"network {text!r}: weights are for eval_dynamic.py --model ebjr, which loads them"
            )
        if not equals or key not in known:
            hint = nearest(key, [*VIEW, "weights", *own])[:300]
            raise UserError(f"network {text!r}: unknown option {part!r}; {hint}")
        found[key] = _values(text, key, word, known[key])
    view = {key: found.pop(key) for key in VIEW if key in found}
    member = Member(name, found, **view)
    try:
        member.check()
    except UserError as error:
        raise UserError(str(error).replace(repr(name), repr(text), 1)) from None
    return member


def _values(text: str, key: str, word: str, annotation: Any) -> Any:
    """The value of an option of this type. Raises ValueError where the word does not have it."""
    kind, many = kind_of(annotation)
    words = re.split(r"/|(?<=\d)-", word) if many else [word]
    try:
        values = tuple(_value(one, kind) for one in words)
    except ValueError:
        raise UserError(f"network {text!r}: {key}={word} is not of type {kind.__name__}") from None
    return values if many else values[0]


def _value(word: str, kind: type) -> Any:
    if kind is not bool:
        return kind(word)
    if word.lower() not in ("true", "false"):
        raise ValueError
    return word.lower() == "true"


def split_weights(text: str) -> tuple[str, str, str]:
    """The name, the other words and the file of "NAME:option=value,weights=FILE"; the name may be left out.

    Raises ValueError where there is no file, or more than one.
    """
    name, _, rest = ("", "", text) if text.startswith("weights=") else text.partition(":")
    words = [word for word in rest.split(",") if word]
    files = [word.removeprefix("weights=") for word in words if word.startswith("weights=")]
    if len(files) != 1:
        raise UserError(f"network {text!r}: name its file of weights, as in NAME:weights=FILE")
    return name, ",".join(word for word in words if not word.startswith("weights=")), files[0]


def upgraded(arch: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture in which a cascade names its networks in dicts; older files have them in words."""
    options = dict(arch["options"])
    if "networks" in options:
        options["networks"] = [
            parse_member(network).to_dict() if isinstance(network, str) and ":" in network else network
            for network in options["networks"]
        ]
    return {**arch, "options": options}
