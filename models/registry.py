"""Names for networks: a preset is a name for a dict of options of a class."""

import difflib
import inspect
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

from models.multi_exit import MultiExitModel


class Entry(NamedTuple):
    """What a registered name stands for."""

    model_class: type[MultiExitModel]
    options: dict[str, Any]
    about: str


_ENTRIES: dict[str, Entry] = {}


def register(model_class: type[MultiExitModel], name: str, about: str, **options: Any) -> None:
    """Registers `name` as `model_class` with other defaults for some of its options; `about` says what it is.

    A name that ends in "/" stands for all names with this prefix: the rest is the class's option `name`. A
    class with a parameter `options` is a network around the registered network `name`, and takes that one's
    options too.
    """
    assert name not in _ENTRIES, f"{name} is registered twice"
    _ENTRIES[name] = Entry(model_class, options, about)


def create_model(name: str, num_classes: int = 1000, **options: Any) -> MultiExitModel:
    """Builds the registered network `name` with `num_classes` outputs per exit.

    Options are keyword parameters of the network's class. Raises ValueError for an unknown name and TypeError
    for an unknown option; both say what comes close.
    """
    entry, known = _find(name), model_options(name)
    for option in options:
        if option not in known:
            raise TypeError(f"model {name} has no option {option!r}; {nearest(option, known)}")
    options = {**entry.options, **options}
    own = inspect.signature(entry.model_class).parameters
    if "options" in own:
        options = {key: options.pop(key) for key in list(options) if key in own} | {"options": options}
    return entry.model_class(num_classes=num_classes, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Sorted registered names that match a shell-style pattern; "timm/..." looks among timm's own names."""
    if pattern.startswith("timm/"):
        import timm

        return [f"timm/{name}" for name in timm.list_models(pattern.removeprefix("timm/"))]
    return sorted(name for name in _ENTRIES if not name.endswith("/") and fnmatchcase(name, pattern))


def model_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a registered network: name to parameter, with the preset's default and the type as
    annotation.

    Raises ValueError for an unknown name.
    """
    entry = _find(name)
    parameters = dict(inspect.signature(entry.model_class).parameters)
    for reserved in ("num_classes", *(["name"] if "/" in name else [])):
        del parameters[reserved]
    inner = model_options(entry.options["name"]) if parameters.pop("options", None) else {}
    return {
        key: p.replace(default=entry.options.get(key, p.default)) for key, p in parameters.items()
    } | inner


def model_class(name: str) -> type[MultiExitModel]:
    """The class of a registered network; ValueError for an unknown name."""
    return _find(name).model_class


def kind_of(annotation: Any) -> tuple[type, bool]:
    """The type of an option's value, or of a list's elements, and whether it is a list; `X | None` counts as
    X."""
    if isinstance(annotation, UnionType):
        return kind_of(next(kind for kind in get_args(annotation) if kind is not NoneType))
    return (get_args(annotation)[0], True) if get_origin(annotation) else (annotation, False)


def spelled_out(arch: dict[str, Any]) -> dict[str, Any]:
    """The architecture with every option, those at their defaults too, lists for tuples."""
    options = {name: parameter.default for name, parameter in model_options(arch["name"]).items()} | arch[
        "options"
    ]
    return {**arch, "options": {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}}


def nearest(word: str, words: Any) -> str:
    """The end of an error message: the words that come close to a misspelt one, or all of them if none
    does."""
    close = difflib.get_close_matches(word, words, n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"accepted: {', '.join(words)}"


def _find(name: str) -> Entry:
    prefix, slash, rest = name.partition("/")
    if slash and prefix + slash in _ENTRIES:
        entry = _ENTRIES[prefix + slash]
        return entry._replace(options={**entry.options, "name": rest})
    if name.endswith("/") or name not in _ENTRIES:
        raise ValueError(f"unknown model {name!r}; {nearest(name, list_models())}")
    return _ENTRIES[name]
