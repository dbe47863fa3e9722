"""Data sets by name: digits, CIFAR and others of small images, folders, shards, and what timm opens."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import ConcatDataset
from torchvision import datasets as vision

from loading.folders import Folders
from loading.pixels import to_rgb
from loading.shards import Shards, read_classes
from loading.split import Images, split_train
from loading.streams import PREFIXES, Stream, classes_of, open_timm
from utils import UserError, option

# Mean and std per channel for pixels in 0..1, and side; CIFAR's as in MSDNet's script.
CIFAR10_STATS = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616), 32
CIFAR100_STATS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32
DIGITS_STATS = (0.3057,) * 3, (0.3234,) * 3, 32
FASHION_STATS = (0.2860,) * 3, (0.3530,) * 3, 32
IMAGENET_STATS = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 224
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclass(frozen=True)
class Source:
    """An opened data set: `train[i]` and `test[i]` are (PIL RGB image, label)."""

    train: Images | Stream
    test: Images | Stream
    class_names: tuple[str, ...]  # by label; numbers where the data set has none
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int  # native side in pixels
    calib: Images | Stream | None = None  # only where a split of its own is named for it
    notes: tuple[str, ...] = ()  # what the user should know of the files, a line each

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.class_names)


class ArrayImages(Images):
    """Images uint8 [N, 32, 32, 3] in memory and labels [N]."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], title: str) -> None:
        super().__init__(images, title=title)
        self.images = images
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def _named(num_classes: int, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names where there is one for every class, else numbers."""
    return tuple(names) if len(names) == num_classes else tuple(map(str, range(num_classes)))


def _resized(images: np.ndarray) -> np.ndarray:
    """Grey images uint8 [N, H, W] -> RGB [N, 32, 32, 3], bilinear."""
    resized = [Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image.convert("RGB")) for image in resized])


def _open_digits(_: "Data") -> Source:
    """scikit-learn's 1,797 digits of 8 x 8 pixels and 17 greys; every fifth of a class is for test."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images, labels = _resized(np.rint(digits.images * 255 / 16).astype(np.uint8)), digits.target
    # NumPy has frozen this generator, so the split never changes
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    rows = {"train": np.setdiff1d(order, order[::5]), "test": np.sort(order[::5])}
    train, test = (ArrayImages(images[part], labels[part], f"DIGITS {name}") for name, part in rows.items())
    return Source(train, test, _named(10), *DIGITS_STATS)


def _open_small(data: "Data") -> Source:
    """A data set of small images, from two .npz files or from torchvision's folder."""
    data_class, names, stats = SMALL[data.data_set]
    if str(data.data_path).endswith(".npz"):
        for path in filter(None, (data.data_path, data.eval_data_path)):
            if not Path(path).exists():
                raise UserError(f"no such file: {path}")
        if not data.eval_data_path:
            raise UserError(
                f"{data.data_path} needs test images beside it: name their .npz file in --eval_data_path"
            )
        train, test = (load_npz(str(path), len(names)) for path in (data.data_path, data.eval_data_path))
        return Source(train, test, tuple(names), *stats)
    parts = []
    for split in ("train", "test"):
        found = _fetched(data_class, data, train=split == "train")
        images = found.data if np.ndim(found.data) == 4 else _resized(np.asarray(found.data))
        parts.append(ArrayImages(images, found.targets, f"{data_class.__name__} {split}"))
    return Source(*parts, tuple(found.classes), *stats)


def _fetched(data_class: Any, data: "Data", **split: Any) -> Any:
    """A data set in torchvision's folder."""
    try:
        return data_class(data.data_path, download=data.download, **split)
    except (RuntimeError, OSError) as error:
        place = f"no {data_class.__name__} in {data.data_path}"
        raise UserError(f"{place}, --download true fetches it ({error})") from None


def load_npz(path: str | Path, num_classes: int) -> ArrayImages:
    """Read `images` [N, 32, 32, 3], `labels` [N], or `jpeg` (joined), `offsets` [N + 1], `labels`.

    Raises ValueError in one line that names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if {"jpeg", "offsets"} <= arrays.keys():
            files = [io.BytesIO(arrays["jpeg"][start:stop]) for start, stop in pairwise(arrays["offsets"])]
            arrays["images"] = np.stack([np.asarray(to_rgb(Image.open(file))) for file in files])
    except Exception as error:  # damaged bytes can fail anywhere in the readers
        raise UserError(f"cannot read {path}: {str(error) or type(error).__name__}") from None
    if not {"images", "labels"} <= arrays.keys():
        raise UserError(
            f"{path} holds {sorted(arrays)}; expected images and labels, or jpeg, offsets and labels"
        )
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
        raise UserError(f"{path}: images are {images.dtype} {images.shape}, expected uint8 (N, 32, 32, 3)")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: labels are {labels.dtype} {labels.shape}, expected integers ({len(images)},)"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{path}: labels go from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
        )
    return ArrayImages(images, labels, str(path))


def _open_folders(data: "Data") -> Source:
    """Class folders with a test tree given, with train/ and val/ or test/, or with a tenth drawn for test."""
    path = Path(data.data_path or "")
    if data.eval_data_path:
        return _open_trees(path, Path(data.eval_data_path))
    for held_out in ("val", "test"):
        if (path / "train").is_dir() and (path / held_out).is_dir():
            return _open_trees(path / "train", path / held_out)
    tree = Folders(path)
    rows = split_train(len(tree), max(1, len(tree) // 10), seed=0)  # the same test images for every --seed
    train, test = (Images(tree, part) for part in rows)
    return Source(train, test, tuple(tree.classes), *IMAGENET_STATS, notes=tuple(tree.notes))


def _open_imagenet(data: "Data") -> Source:
    return _open_trees(Path(data.data_path or "", "train"), Path(data.data_path or "", "val"))


def _open_trees(*paths: Path) -> Source:
    """One tree to train on and one for test."""
    train, test = map(Folders, paths)
    if train.classes != test.classes:
        differ = ", ".join(sorted({*train.classes} ^ {*test.classes})[:3])
        both = f"{paths[0]} and {paths[1]} must have the same class folders"
        raise UserError(f"{both}; only in one, say: {differ}")
    return Source(train, test, tuple(train.classes), *IMAGENET_STATS, notes=(*train.notes, *test.notes))


def _open_shards(data: "Data") -> Source:
    """Tar shards, with those for test in a folder given, in val/ or test/ beside train/, or named so."""
    path = Path(data.data_path or "")
    trees = [path, Path(data.eval_data_path)] if data.eval_data_path else []
    for held_out in ("val", "test"):
        if not trees and (path / "train").is_dir() and (path / held_out).is_dir():
            trees = [path / "train", path / held_out]
    if trees:
        train, test = map(Shards, trees)
    else:
        train, test = (Shards(path, f"*{name}*.tar", f"{name}-index.npz") for name in ("train", "val"))
    names = read_classes(path, *trees) or _named(data.nb_classes or 0)
    if not names:
        raise UserError(f"shards in {path} do not say how many classes there are: give --nb_classes")
    for images in (train, test):
        images.check_labels(len(names))
    return Source(train, test, names, *IMAGENET_STATS, notes=(*train.notes, *test.notes))


def _open_transfer(data: "Data") -> Source:
    """A data set that ImageNet networks are usually fine-tuned on, from torchvision's folder."""
    name = data.data_set
    num_classes, *splits = TRANSFER[name]
    *parts, test = (_fetched(getattr(vision, name), data, split=split) for split in (*splits, "test"))
    train = Images(ConcatDataset(parts), title=f"{name} {'+'.join(splits)}")
    names = _named(num_classes, test.classes)
    return Source(train, Images(test, title=f"{name} test"), names, *IMAGENET_STATS)


def _open_timm(data: "Data") -> Source:
    """Any data set that timm opens; a stream cannot be split by rows, so its calib is a split named."""
    name = data.data_set
    splits = [split for split in (data.train_split, data.val_split, data.calib_split) if split]
    opened = open_timm(name, data.data_path, splits, data.seed)
    if isinstance(opened[0], Stream) and data.calib_split is None:
        raise UserError(
            f"{name} is a stream from which nothing can be held out: name a third split (--calib_split)"
        )
    names = classes_of(opened[0]) or _named(data.nb_classes or 0)
    if not names:
        raise UserError(f"{name} does not say how many classes it has: give --nb_classes")
    parts = []
    for images, split in zip(opened, splits, strict=True):
        parts.append(images if isinstance(images, Stream) else Images(images, title=f"{name} {split}"))
    return Source(*parts[:2], tuple(names), *IMAGENET_STATS, *parts[2:])


# torchvision's class, the names of its classes, and its statistics.
SMALL: dict[str, tuple[Any, Sequence[str], tuple]] = {
    "CIFAR10": (vision.CIFAR10, CIFAR10_NAMES, CIFAR10_STATS),
    "CIFAR100": (vision.CIFAR100, _named(100), CIFAR100_STATS),
    "CIFAR": (vision.CIFAR100, _named(100), IMAGENET_STATS),  # as in Dyn-Perceiver's script
    "FashionMNIST": (vision.FashionMNIST, vision.FashionMNIST.classes, FASHION_STATS),
}
# The number of classes, and the split to train on.
TRANSFER: dict[str, Any] = {
    "Food101": (101, "train"),
    "StanfordCars": (196, "train"),
    "FGVCAircraft": (100, "trainval"),
    "Flowers102": (102, "train", "val"),
    "OxfordIIITPet": (37, "trainval"),
}
OPENERS: dict[str, Callable[["Data"], Source]] = {
    "DIGITS": _open_digits,
    **dict.fromkeys(SMALL, _open_small),
    "IMNET": _open_imagenet,
    "image_folder": _open_folders,
    "shards": _open_shards,
    **dict.fromkeys(TRANSFER, _open_transfer),
}
NAMES = f"{', '.join(OPENERS)} or a timm name (hfds/..., wds/..., tfds/..., torch/...)"


@dataclass(frozen=True)
class Data:
    """Data set and its splits."""

    data_set: str = option("DIGITS", f"{NAMES}; IMNET where only --data_path is given")
    data_path: str | None = option(None, "folder or .npz file of the training images")
    eval_data_path: str | None = option(None, "folder or .npz file of the test images")
    popular_classes: tuple[int, ...] = option((), "only these classes, and all others as one more", low=0)
    nb_classes: int | None = option(None, "number of classes, where the data set does not tell", low=1)
    num_calib: int | None = option(
        None, "training images held out for calibration; default: a tenth, at most 5,000", low=0
    )
    drop_last: bool = option(
        True,
        "leave out an epoch's last, partial batch; false: train on it too, as MSDNet, RANet and L2W do, "
        "if it has 2 images (L2W: 4) or more per process, with mixup or cutmix of an even number",
    )
    epoch_images: int = option(
        0, "training images in an epoch, other ones at random every epoch; 0: all of them", low=0
    )
    seed: int = option(0, "seed of the splits, the weights and the training", low=0)
    download: bool = option(False, "fetch torchvision data sets that are missing")
    train_split: str = option("train", "timm data sets: name of the training split")
    val_split: str = option("validation", "timm data sets: name of the test split")
    calib_split: str | None = option(None, "timm data sets that are streams: name of the calibration split")
    on_bad_image: Literal["error", "skip"] = option(
        "error", "training images that cannot be read: stop, or train without them"
    )
    max_bad_images: float = option(0.001, "share of the training images that may be skipped", low=0, high=1)


def open_source(data: Data) -> Source:
    """Opens a data set by name: a key of `OPENERS`, or a timm name with a slash such as `hfds/user/name`.

    Raises ValueError in one line for an unknown name and for data that is missing or malformed.
    """
    name = data.data_set
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # one line, and not a warning beside it
    if name.startswith(PREFIXES):
        source = _open_timm(data)
    elif name not in OPENERS:
        raise UserError(
            f"unknown data set {name!r}: not {', '.join(OPENERS)}, nor timm's hfds/, tfds/, wds/..."
        )
    elif bool(data.data_path) == (name == "DIGITS"):
        raise UserError(f"data set {name} {'reads no' if data.data_path else 'needs'} --data_path")
    else:
        source = OPENERS[name](data)
    if data.nb_classes not in (None, source.num_classes):
        raise UserError(f"--nb_classes {data.nb_classes}, but {name} has {source.num_classes} classes")
    return source
