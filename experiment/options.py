"""Fields of frozen dataclasses, and parameters of a network's constructor, as flags of a command line.

A group of flags is a dataclass whose fields are made by `utils.option`; it is written once and read here for
the parser, for the values stored in a checkpoint, and for files of recipes.
"""

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from models import kind_of, model_options, nearest
from utils import UserError

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
Group = TypeVar("Group")


@dataclass(frozen=True)
class Option:
    """One flag: `kind` is int, float, str or bool; `many` takes a list; `low` to `high` are accepted."""

    name: str
    kind: type
    default: Any
    about: str = ""
    many: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def convert(self, word: str) -> Any:
        """The value of a word of the command line; a list where the flag takes one.

        Numbers of a list may be joined by dashes or commas. Raises argparse.ArgumentTypeError.
        """
        if not self.many:
            return self._one(word)
        parts = [word] if self.kind is str else re.split(r"(?<=\d)-|,", word)
        return [self._one(part) for part in parts]

    def restore(self, value: Any) -> Any:
        """A value read from a file, as the command line would have it; None stays None."""
        if value is None:
            return None
        if self.many:
            return [self._one(part) for part in value]
        return self._one(value)

    def _one(self, word: Any) -> Any:
        word = str(word)
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
        if self.high is not None and not value <= self.high:
            raise argparse.ArgumentTypeError(f"{word} is above the greatest value accepted, {self.high}")
        if self.kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{word} is not accepted: give a finite number")
        if self.choices and value not in self.choices:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(self.choices)}")
        return value

    def add_to(self, group: Any) -> None:
        """Declares the flag in an argparse group."""
        text = "; ".join(
            filter(None, [self.about, ", ".join(self.choices), f"default: {_words(self.default)}"])
        )
        group.add_argument(
            f"--{self.name}",
            type=self.convert,
            nargs="+" if self.many else None,
            action=_Flatten if self.many else "store",
            metavar="LIST" if self.many else self.kind.__name__.upper(),
            help=text.replace("%", "%%"),
        )


def options_of(group: type) -> list[Option]:
    """The flags of a dataclass, in the order of its fields."""
    options = []
    for entry in fields(group):
        kind, many = kind_of(entry.type)
        words = (
            get_args(entry.type) if get_origin(entry.type) is Literal else entry.metadata.get("choices", ())
        )
        limits = {name: entry.metadata.get(name) for name in ("low", "high")}
        about = entry.metadata.get("about", "")
        options.append(Option(entry.name, kind, entry.default, about, many, choices=words, **limits))
    return options


def options_of_signature(parameters: Mapping[str, Parameter]) -> list[Option]:
    """The flags for a constructor's keyword parameters, by their annotations and defaults."""
    options = []
    for name, parameter in parameters.items():
        kind, many = kind_of(parameter.annotation)
        options.append(Option(name, kind, parameter.default, many=many))
    return options


class Given(NamedTuple):
    """Values from a command line or a file: of the flags of groups, and of the network's own options."""

    values: dict[str, Any]
    options: dict[str, Any]


def parse(groups: Iterable[type], argv: list[str]) -> Given:
    """Reads a command line: the flags of these groups and options of the network that `--model` names.

    "-" equals "_" in flag names. Raises ValueError that names the flags nearest to an unknown one.
    """
    argv = [underscored(word) for word in argv]
    model = given_of("model", argv)
    own = {group: options_of(group) for group in groups}
    table = [option.name for options in own.values() for option in options]
    network = [o for o in options_of_signature(model_options(model) if model else {}) if o.name not in table]
    epilog = None if model else "With --model NAME, the options of that network are listed too."
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, epilog=epilog)
    titles = {_title(group): options for group, options in own.items()}
    for title, options in {**titles, f"options of {model}": network}.items():
        part = parser.add_argument_group(title)
        for option in options:
            option.add_to(part)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name}" for name in [*table, *(option.name for option in network)]]
        hint = "" if model else "; a network's options need --model NAME"
        raise UserError(f"unknown flag {unknown[0]}; {nearest(unknown[0], names)[:300]}{hint}")
    values = vars(given)
    options = {option.name: values.pop(option.name) for option in network if option.name in values}
    return Given(values, options)


def fill(group: type[Group], *values: Mapping[str, Any]) -> Group:
    """The group with its defaults, overridden by its fields in each of `values`; later ones win."""
    found: dict[str, Any] = {}
    for option in options_of(group):
        for mapping in values:
            if option.name in mapping:
                value = mapping[option.name]
                found[option.name] = tuple(value) if isinstance(value, list) else value
    return group(**found)


def restore(groups: Iterable[type], stored: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Values of these groups' flags stored in file `source`; ValueError for any that no flag accepts."""
    found = {}
    for option in [option for group in groups for option in options_of(group)]:
        if option.name in stored:
            found[option.name] = restored(option, stored[option.name], source)
    return found


def restored(option: Option, value: Any, source: object) -> Any:
    """One value stored in file `source`, checked."""
    try:
        return option.restore(value)
    except (argparse.ArgumentTypeError, TypeError) as error:
        raise UserError(f"checkpoint {source} was trained with a strange --{option.name}: {error}") from error


def plain(*groups: Any) -> dict[str, Any]:
    """The fields of these groups as one dict of plain types, with lists for tuples."""
    pairs = [(entry.name, getattr(group, entry.name)) for group in groups for entry in fields(group)]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError in one line, where argparse's own ends the program."""

    def error(self, message: str) -> Any:
        """Raises for a command line that cannot be read."""
        raise UserError(message.removeprefix("argument "))


class _Flatten(argparse.Action):
    """Joins the lists that the words of a list flag give."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def given_of(name: str, argv: list[str]) -> str:
    """The value of one flag in a command line, or ""."""
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{name}", default="")
    return getattr(finder.parse_known_args(argv)[0], name)


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).splitlines()[0].partition(";")[0].rstrip(".")


def underscored(word: str) -> str:
    """A word of a command line; "-" in the name of a flag equals "_"."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
