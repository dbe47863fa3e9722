"""Results without the paths of the machine that made them: they are for others, who cannot use those."""

import re
from collections.abc import Iterator
from typing import Any

# A path from the root or from a home, where a word starts; the address of a page is none.
PATH = re.compile(r"(?<![^\s'\"=,;:(\[])(?:/|~[\w.-]*/)\w[^\s'\",;)\]]*")


def portable(content: Any) -> Any:
    """Plain types with the last name of each path alone: "x.pth" for "/home/me/x.pth", also in a command."""
    if isinstance(content, dict):
        return {name: portable(part) for name, part in content.items()}
    if isinstance(content, (list, tuple)):
        return [portable(part) for part in content]
    return PATH.sub(_last_name, content) if isinstance(content, str) else content


def paths_in(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The paths that `portable` would cut, each behind the place of its text: "origin.made.command"."""
    if isinstance(content, dict):
        parts = [(f"{place}.{name}" if place else name, part) for name, part in content.items()]
    elif isinstance(content, (list, tuple)):
        parts = [(f"{place}.{i}", part) for i, part in enumerate(content)]
    else:
        parts = []
    for name, part in parts:
        yield from paths_in(part, name)
    if isinstance(content, str):
        yield from ((place, path) for path in PATH.findall(content))


def _last_name(match: re.Match) -> str:
    return match[0].rstrip("/").rpartition("/")[2]
