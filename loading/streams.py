"""Data sets that timm opens: Hugging Face's, TensorFlow's, shards of a tar stream, torchvision's."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.data import IterableImageDataset, create_dataset

from loading.pixels import read_image
from utils import UserError

Stream = IterableImageDataset  # images that come one after another, without rows or names
PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")
ROOT = Path(__file__).resolve().parents[1]


def open_timm(name: str, path: str | None, splits: Sequence[str], seed: int) -> list[Any]:
    """These splits of a data set, the first to train on: a `Stream` each, or one that has rows.

    Raises ValueError in one line for a package that is not installed and for what timm cannot open.
    """
    try:
        with _hugging_face_visible():
            opened = [
                create_dataset(name, path, split, is_training=split == splits[0], seed=seed)
                for split in splits
            ]
    except ImportError as error:
        package = str(error.name).replace("_", "-")
        raise UserError(f"data set {name} needs a package: pip install {package}") from None
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot open {name} in {path}: {' '.join(str(error).split())}") from None
    for images in opened:
        images._max_retries = 1  # else timm puts the next image in a broken one's place
        images.input_img_mode, images.loader = None, read_image  # ours scales greys of 16 bits
    return opened


def classes_of(images: Any) -> list[str]:
    """The names of the classes by number; none where the data set does not tell."""
    numbers = getattr(getattr(images, "reader", images), "class_to_idx", {})
    return list(map(str, sorted(numbers, key=numbers.__getitem__)))


@contextmanager
def _hugging_face_visible() -> Iterator[None]:
    """Inside, `import datasets` means Hugging Face's package, which our file of that name hides."""
    folders, ours = sys.path[:], sys.modules.pop("datasets", None)
    sys.path[:] = [folder for folder in folders if Path(folder).resolve() != ROOT]
    reader = sys.modules.get("timm.data.readers.reader_hfds")
    if reader is not None:  # a second import of the package would give it two lives
        sys.modules["datasets"] = reader.datasets
    try:
        yield
    finally:
        sys.path[:] = folders
        sys.modules.pop("datasets", None)
        if ours is not None:
            sys.modules["datasets"] = ours
