"""Names for networks: a preset is a name for a dict of options of a class."""

import difflib
import inspect
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from models.errors import UnknownOption, UserError
from models.multi_exit import MultiExitModel


class Entry(NamedTuple):
    """What a registered name stands for."""

    model_class: type[MultiExitModel]
    options: dict[str, Any]
    about: str


_ENTRIES: dict[str, Entry] = {}


def register(model_class: type[MultiExitModel], name: str, about: str, **options: Any) -> None:
    """Registers `name` as `model_class` with other defaults for some of its options; `about` describes it.

    A name that ends in "/" stands for all names with this prefix: the rest is the class's option `name`. A
    class with a parameter `options` wraps the registered network `name`, and takes that one's options too.
    """
    assert name not in _ENTRIES, f"{name} is registered twice"
    _ENTRIES[name] = Entry(model_class, options, about)


def create_model(name: str, num_classes: int = 1000, **options: Any) -> MultiExitModel:
    """Builds the registered network `name` with `num_classes` outputs per exit.

    Options are keyword parameters of the network's class. Raises ValueError for an unknown name and TypeError
    for an unknown option; both suggest the nearest ones.
    """
    entry = _find(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            raise UnknownOption(f"model {name} has no option {option!r}; {nearest(option, known)}")
    options = {**entry.options, **options}
    own = inspect.signature(entry.model_class).parameters
    if "options" in own:
        inner = {key: value for key, value in options.items() if key not in own}
        options = {key: value for key, value in options.items() if key in own}
        options["options"] = inner
    return entry.model_class(num_classes=num_classes, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Sorted registered names that match a shell-style pattern; "timm/..." looks among timm's own names."""
    if pattern.startswith("timm/"):
        import timm

        return [f"timm/{name}" for name in timm.list_models(pattern.removeprefix("timm/"))]
    return sorted(name for name in _ENTRIES if not name.endswith("/") and fnmatchcase(name, pattern))


def model_options(name: str) -> dict[str, inspect.Parameter]:
    """Options of a registered network: name to parameter, with the preset's default, annotated by type.

    Raises ValueError for an unknown name.
    """
    entry = _find(name)
    parameters = dict(inspect.signature(entry.model_class).parameters)
    del parameters["num_classes"]
    if "/" in name:
        del parameters["name"]
    inner = model_options(entry.options["name"]) if parameters.pop("options", None) else {}
    own = {key: p.replace(default=entry.options.get(key, p.default)) for key, p in parameters.items()}
    return own | inner


def model_class(name: str) -> type[MultiExitModel]:
    """The class of a registered network; ValueError for an unknown name."""
    return _find(name).model_class


def kind_of(annotation: Any) -> tuple[type, bool]:
    """The type of a value or of a list's elements, and whether it is a list (of a union: its first)."""
    if isinstance(annotation, UnionType):
        return kind_of(next(kind for kind in get_args(annotation) if kind is not NoneType))
    if get_origin(annotation) is Literal:
        return str, False
    if get_origin(annotation):
        return kind_of(get_args(annotation)[0])[0], True
    return annotation, False


def spelled_out(arch: dict[str, Any]) -> dict[str, Any]:
    """The architecture with every option, those at their defaults too, lists for tuples."""
    defaults = {name: parameter.default for name, parameter in model_options(arch["name"]).items()}
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (defaults | arch["options"]).items()
    }
    return {**arch, "options": options}


def nearest(word: str, words: Any) -> str:
    """The end of an error message: the words nearest to a misspelt one, or all if none is near."""
    close = difflib.get_close_matches(word, words, n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"accepted: {', '.join(words)}"


def _find(name: str) -> Entry:
    prefix, slash, rest = name.partition("/")
    if slash and prefix + slash in _ENTRIES:
        entry = _ENTRIES[prefix + slash]
        return entry._replace(options={**entry.options, "name": rest})
    if name.endswith("/") or name not in _ENTRIES:
        raise UserError(f"unknown model {name!r}; {nearest(name, list_models())}")
    return _ENTRIES[name]
