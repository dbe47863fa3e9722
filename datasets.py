"""Data sets, their train / calib / test splits, and loaders any epoch of which can be repeated on its own."""

import copy
import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torchvision import datasets as vision

from utils import ShardSampler, seed_everything

# (mean, std) per channel for pixels in 0..1; CIFAR's as in MSDNet's script, digits' of the training images at
# 32 x 32
CIFAR10_STATS = ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616))
CIFAR100_STATS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
DIGITS_STATS = ((0.3057,) * 3, (0.3234,) * 3)
FASHION_STATS = ((0.2860,) * 3, (0.3530,) * 3)
IMAGENET_STATS = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
# what PIL, NumPy and timm raise for a file they cannot read
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Source:
    """An opened data set: `train[i]` and `test[i]` are (PIL RGB image, label); `calib` is set only for
    streams."""

    train: Dataset
    test: Dataset
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int  # native side in pixels
    calib: IterableDataset | None = None


def open_data(
    data_set: str,
    data_path: str | None = None,
    eval_data_path: str | None = None,
    *,
    splits: tuple[str, str] = ("train", "validation"),
    calib_split: str | None = None,
    num_classes: int | None = None,
    download: bool = False,
    seed: int = 0,
) -> Source:
    """Open a data set by name: a key of `OPENERS`, or a timm name with a slash such as `hfds/user/name` or
    `wds/name`.

    `splits`, `calib_split` (streams) and `num_classes` (used where the data does not tell) are for timm names
    only. Raises ValueError in one line for an unknown name and for data that is missing or malformed.
    """
    if data_set.startswith(("hfds/", "hfids/", "tfds/", "wds/", "torch/")):
        return _open_timm(data_set, data_path, splits, calib_split, num_classes, seed)
    if data_set not in OPENERS:
        raise ValueError(
            f"unknown data set {data_set!r}: not {', '.join(OPENERS)}, nor timm's hfds/, tfds/, wds/..."
        )
    if bool(data_path) == (data_set == "DIGITS"):
        raise ValueError(f"data set {data_set} {'reads no' if data_path else 'needs'} --data_path")
    return OPENERS[data_set](*(Path(p) if p else None for p in (data_path, eval_data_path)), download, seed)


class ArrayImages(Dataset):
    """Images uint8 [N, 32, 32, 3] in memory and labels [N]; `title` says in messages what they are."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], title: str):
        self.images, self.labels, self.title = images, labels, title

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def _resized(images: np.ndarray) -> np.ndarray:
    """Grey images uint8 [N, H, W] -> RGB [N, 32, 32, 3], bilinear."""
    return np.stack(
        [np.asarray(Image.fromarray(x).resize((32, 32), Image.BILINEAR).convert("RGB")) for x in images]
    )


def _open_digits(*_: object) -> Source:
    """scikit-learn's 1,797 digits of 8 x 8 pixels and 17 greys; every fifth of a class, in fixed order, is
    for test."""
    digits = load_digits()
    images, labels = _resized(np.rint(digits.images * 255 / 16).astype(np.uint8)), digits.target
    order = np.random.RandomState(0).permutation(
        len(labels)
    )  # NumPy has frozen this class: the same split for good
    order = order[np.argsort(labels[order], kind="stable")]
    rows = {"train": np.setdiff1d(order, order[::5]), "test": np.sort(order[::5])}
    train, test = (ArrayImages(images[r], labels[r], f"DIGITS {name}") for name, r in rows.items())
    return Source(train, test, 10, *DIGITS_STATS, 32)


def _open_small(
    data_class: type, num_classes: int, stats: tuple, path: Path, eval_path: Path | None, download, _
):
    """A data set of small images, from two .npz files or from torchvision's folder."""
    if path.suffix == ".npz":
        if eval_path is None:
            raise ValueError(f"{path} needs test images beside it: name their .npz file in --eval_data_path")
        return Source(load_npz(path, num_classes), load_npz(eval_path, num_classes), num_classes, *stats, 32)
    name, splits = data_class.__name__, []
    for split in ("train", "test"):
        try:
            data = data_class(path, train=split == "train", download=download)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"no {name} in {path}, --download true fetches it ({error})") from None
        images = np.asarray(data.data)
        splits.append(
            ArrayImages(images if images.ndim == 4 else _resized(images), data.targets, f"{name} {split}")
        )
    return Source(*splits, num_classes, *stats, 32)


def load_npz(path: Path, num_classes: int) -> ArrayImages:
    """Read `images` [N, 32, 32, 3], `labels` [N], or `jpeg` (joined), `offsets` [N + 1], `labels`, or
    ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if {"jpeg", "offsets"} <= arrays.keys():
            files = [io.BytesIO(arrays["jpeg"][start:stop]) for start, stop in pairwise(arrays["offsets"])]
            arrays["images"] = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    except UNREADABLE as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not {"images", "labels"} <= arrays.keys():
        raise ValueError(
            f"{path} holds {sorted(arrays)}; expected images and labels, or jpeg, offsets and labels"
        )
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}, expected uint8 (N, 32, 32, 3)")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels are {labels.dtype} {labels.shape}, expected integers ({len(images)},)"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{path}: labels go from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
        )
    return ArrayImages(images, labels, str(path))


def _open_folders(path: Path, eval_path: Path | None, _: bool, seed: int) -> Source:
    """A tree of class folders; without an evaluation tree its train/ and val/ or test/, else a tenth drawn by
    seed."""
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if eval_path is None and held_out is not None and (path / "train").is_dir():
        path, eval_path = path / "train", held_out
    if eval_path is not None:
        return _open_trees(path, eval_path)
    images = _image_folder(path)
    rows = split_train(
        len(images), max(1, len(images) // 10), seed=0
    )  # whatever the seed, the same test images
    return Source(*(Subset(images, r) for r in rows), len(images.classes), *IMAGENET_STATS, 224)


def _open_trees(train_path: Path, test_path: Path) -> Source:
    train, test = _image_folder(train_path), _image_folder(test_path)
    if train.classes != test.classes:
        differ = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:3])
        raise ValueError(
            f"{train_path} and {test_path} must have the same class folders; only in one, say: {differ}"
        )
    return Source(train, test, len(train.classes), *IMAGENET_STATS, 224)


def _image_folder(path: Path) -> vision.ImageFolder:
    try:
        return vision.ImageFolder(path)
    except FileNotFoundError as error:  # says which: no such folder, no class folder in it, or empty ones
        raise ValueError(f"image folder {path}: {error}") from None


def _open_transfer(
    data_class: type,
    num_classes: int,
    train_splits: Sequence[str],
    path: Path,
    _: Path | None,
    download: bool,
    __: int,
) -> Source:
    """A data set that ImageNet networks are usually fine-tuned on, from torchvision's folder."""
    name, parts = data_class.__name__, []
    for split in (*train_splits, "test"):
        try:
            parts.append(data_class(path, split=split, download=download))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"no {name} in {path}, --download true fetches it ({error})") from None
        parts[-1].title = f"{name} {split}"
    *train, test = parts
    both = ConcatDataset(train)
    both.title = f"{name} {'+'.join(train_splits)}"
    return Source(both, test, num_classes, *IMAGENET_STATS, 224)


OPENERS: dict[str, Callable[..., Source]] = {  # each called with data_path, eval_data_path, download, seed
    "DIGITS": _open_digits,
    "CIFAR10": partial(_open_small, vision.CIFAR10, 10, CIFAR10_STATS),
    "CIFAR100": partial(_open_small, vision.CIFAR100, 100, CIFAR100_STATS),
    "CIFAR": partial(_open_small, vision.CIFAR100, 100, CIFAR100_STATS),  # as in Dyn-Perceiver's script
    "FashionMNIST": partial(_open_small, vision.FashionMNIST, 10, FASHION_STATS),
    "IMNET": lambda path, *_: _open_trees(path / "train", path / "val"),
    "image_folder": _open_folders,
    "Food101": partial(_open_transfer, vision.Food101, 101, ("train",)),
    "StanfordCars": partial(_open_transfer, vision.StanfordCars, 196, ("train",)),
    "FGVCAircraft": partial(_open_transfer, vision.FGVCAircraft, 100, ("trainval",)),
    "Flowers102": partial(_open_transfer, vision.Flowers102, 102, ("train", "val")),
    "OxfordIIITPet": partial(_open_transfer, vision.OxfordIIITPet, 37, ("trainval",)),
}


def _open_timm(
    name: str, path: str | None, splits: tuple, calib_split: str | None, num_classes: int | None, seed: int
):
    """Any data set that timm opens; from a stream nothing can be held out, so there calib is a split of its
    own."""
    named = [split for split in (*splits, calib_split) if split]
    # timm's `import datasets` means Hugging Face's package, which this file hides by its name: step aside
    # meanwhile
    here, folders, ours = Path(__file__).resolve().parent, sys.path[:], sys.modules.pop(__name__)
    sys.path[:] = [folder for folder in folders if Path(folder).resolve() != here]
    if (
        "timm.data.readers.reader_hfds" in sys.modules
    ):  # a second import of the package would give it two lives
        sys.modules[__name__] = sys.modules["timm.data.readers.reader_hfds"].datasets
    try:
        opened = [
            create_dataset(name, path, split, is_training=split == splits[0], seed=seed) for split in named
        ]
    except ImportError as error:
        raise ValueError(
            f"data set {name} needs a package: pip install {error.name.replace('_', '-')}"
        ) from None
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm cannot open {name} in {path}: {' '.join(str(error).split())}") from None
    finally:
        sys.path[:], sys.modules[__name__] = folders, ours
    if isinstance(opened[0], IterableDataset) and calib_split is None:
        raise ValueError(
            f"{name} is a stream from which nothing can be held out: name a third split (--calib_split)"
        )
    num_classes = len(getattr(getattr(opened[0], "reader", opened[0]), "class_to_idx", ())) or num_classes
    if num_classes is None:
        raise ValueError(f"{name} does not say how many classes it has: give --nb_classes")
    for data, split in zip(opened, named, strict=True):
        data.title, data._max_retries = (
            f"{name} {split}",
            1,
        )  # else timm puts the next image in a broken one's place
    return Source(*opened[:2], num_classes, *IMAGENET_STATS, 224, *opened[2:])


def split_train(num_train: int, num_calib: int, seed: int) -> tuple[list[int], list[int]]:
    """Draw which of `num_train` images to train on and which `num_calib` (fewer) to hold out: sorted index
    lists."""
    if not 0 <= num_calib < num_train:
        raise ValueError(f"cannot hold {num_calib} images out of {num_train}")
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_calib:]), sorted(order[:num_calib])


def default_num_calib(data_set: str, num_train: int) -> int:
    """How many training images to hold out: a tenth, at most 5,000, or 50,000 of ImageNet."""
    return min(num_train // 10, 50_000 if data_set == "IMNET" else 5_000)


class Split(Dataset):
    """The rows `indices` of a data set (None: all) behind a transform: [i] -> (tensor [3, H, W], int
    label)."""

    def __init__(self, base: Dataset, indices: Sequence[int] | None, transform: Callable):
        self.base, self.transform = base, transform
        self.indices = range(len(base)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        try:
            image, label = self.base[self.indices[i]]
        except UNREADABLE as error:
            raise ValueError(f"cannot read image {self.name(i)}: {error}") from None
        return self.transform(image.convert("RGB")), int(label)

    def name(self, i: int) -> str:
        """File of sample `i`, or the title of its data set with its index there."""
        base, index = self.base, self.indices[i]
        if isinstance(base, Subset):
            base, index = base.dataset, base.indices[index]
        return base.samples[index][0] if isinstance(base, vision.ImageFolder) else f"{base.title}[{index}]"


def make_split(base: Dataset, indices: Sequence[int] | None, transform: Callable) -> Split | IterableDataset:
    """A `Split`, or for a stream (which has no rows to select) the stream itself with the transform set."""
    if not isinstance(base, IterableDataset):
        return Split(base, indices, transform)
    stream = copy.copy(base)
    stream.transform = transform
    return stream


def train_loader(
    split, *, batch_size, update_freq, num_workers, pin_memory, collate=None, seed=0, rank=0, world_size=1
) -> DataLoader:
    """Shuffled full micro-batches, equally many a process and a multiple of `update_freq`; ValueError if
    none."""
    group = batch_size * update_freq
    if isinstance(split, IterableDataset):
        split.reader.batch_size = group  # timm rounds the samples of each worker up to full groups
    elif len(split) < group * world_size:
        product = f"batch size {batch_size} x update_freq {update_freq} x {world_size} processes"
        raise ValueError(f"{len(split)} training images are fewer than one global batch of {product}")
    shard = {"rank": rank, "world_size": world_size, "shuffle": True, "seed": seed, "group": group}
    loader = _loader(
        split,
        shard,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
    )
    loader.key = (seed, rank)
    return loader


def eval_loader(split, *, batch_size, num_workers, pin_memory, rank=0, world_size=1) -> DataLoader:
    """Every image once over all processes, in order, last batch kept. (timm deals a stream out, evenly but
    roughly.)"""
    shard = {"rank": rank, "world_size": world_size}
    return _loader(split, shard, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)


def _loader(split, shard: dict[str, int], **options) -> DataLoader:
    if isinstance(split, IterableDataset):
        split.set_loader_cfg(options["num_workers"])
    else:
        options["sampler"] = ShardSampler(len(split), **shard)
    # A generator of its own, so that reading data takes nothing from the global one that drop-out uses.
    return DataLoader(split, generator=torch.Generator(), **options)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Fix order and augmentation of a training loader's next pass by (seed, epoch, rank), whatever ran
    before."""
    seed, rank = loader.key
    (loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler).set_epoch(epoch)
    loader.generator.manual_seed(int(np.random.default_rng((seed, epoch, 1 + rank)).integers(2**63)))
    if loader.num_workers == 0:  # then the transforms draw from the global generators
        seed_everything(seed, epoch, rank)


def batch_names(loader: DataLoader, step: int) -> list[str]:
    """Names of the samples in micro-batch `step` of the current epoch on this process; none for a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return []
    indices = list(loader.sampler)[step * loader.batch_size : (step + 1) * loader.batch_size]
    return [loader.dataset.name(i) for i in indices]
