"""Images in class folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading.pixels import read_image
from loading.split import Images
from utils import UserError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")


class Folders(Images):
    """Image files at any depth below the class folders of `root`: [i] -> (PIL RGB image, int label).

    They are ordered by class, folder and name. Links to folders are followed, but not back to a folder that
    holds them or was seen. `notes` say in a line which files are left out. Raises ValueError in one line for
    a root without classes, for classes without images, and for an image that is a pipe or a device.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"image folder {root}: there is no such folder")
        above = _lineage(root)
        try:
            folders = [entry for entry in os.scandir(root) if os.path.isdir(entry.path)]
            self.classes = sorted(e.name for e in folders if os.path.realpath(e.path) not in above)
            files = []
            for label, name in enumerate(self.classes):
                found = _files(root / name, above | _lineage(root / name))
                files += [(path, label) for path in sorted(found, key=os.path.split)]
        except (OSError, ValueError) as error:
            raise UserError(f"image folder {root}: {error}") from None
        images = [(path, label) for path, label in files if _is_image(path)]
        # GIFs were left out once: they come last, so that the rows in older checkpoints mean the same images.
        images.sort(key=lambda image: image[0].lower().endswith(".gif"))
        super().__init__([path for path, _ in images])
        self.labels = [label for _, label in images]
        self._check(root, set(self.labels))
        others = [path for path, _ in files if not _is_image(path)]
        count = f"{root}: left out {len(others)} not named as images"
        self.notes = [f"{count}, such as {others[0]}"] if others else []

    def _check(self, root: Path, filled: set[int]) -> None:
        empty = ", ".join(name for label, name in enumerate(self.classes) if label not in filled)
        if empty or not self.classes:
            lack = f"no image in the classes {empty}" if empty else "there is not any class folder in it"
            raise UserError(f"image folder {root}: {lack}; accepted: CLASS/NAME with {', '.join(EXTENSIONS)}")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.base[index]), self.labels[index]

    def file(self, index: int) -> str:
        """The path of an image."""
        return self.base[index]


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def _lineage(folder: Path) -> set[str]:
    """A folder and all that hold it, without links."""
    real = os.path.realpath(folder)
    return {real, *map(str, Path(real).parents)}


def _files(folder: str | Path, seen: set[str]) -> Iterator[str]:
    """The files at any depth below a folder; folders `seen` are not entered, and others are added to them."""
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
        path = entry.path
        if entry.is_file(follow_symlinks=False):  # nearly always; known from the folder, without a look at it
            yield path
        elif not os.path.isdir(path):
            if _is_image(path) and os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"{path} is a pipe or a device, accepted: regular files")
            yield path
        elif (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield from _files(path, seen)
