"""The data of a run: a data set opened, cut into train, calib and test, transformed; and its loaders."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from loading.bad_images import with_readable
from loading.device import DeviceLoader
from loading.loaders import TrainLoader, ordered_loader
from loading.pixels import to_rgb
from loading.relabel import only_popular
from loading.sources import IMAGENET_STATS, Data, Source, open_source
from loading.split import Split, default_num_calib, make_split, split_train
from loading.streams import PREFIXES, Stream
from loading.transforms import Mixing, Transform, View, eval_transform, mixer, mixup_collate, train_transform
from utils import UserError

__all__ = [
    "IMAGENET_STATS",
    "PREFIXES",
    "Data",
    "DeviceLoader",
    "Mixing",
    "Source",
    "Split",
    "Splits",
    "Stream",
    "TrainLoader",
    "Transform",
    "View",
    "eval_transform",
    "mixer",
    "mixup_collate",
    "open_splits",
    "ordered_loader",
    "to_rgb",
    "with_readable",
]


@dataclass(frozen=True)
class Splits:
    """An opened data set, cut; `calib_indices` are the rows of `source.train` that `calib` holds."""

    source: Source
    view: View  # with every field filled in
    train: Split | Stream
    calib: Split | Stream
    test: Split | Stream
    calib_indices: list[int]


@contextmanager
def one_process_first(wanted: bool) -> Iterator[None]:
    """If `wanted`, the first process runs the block before the others, which then find its results.

    One use is a download, another the index of shards.
    """
    wanted = wanted and dist.is_initialized()
    if wanted and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if wanted and dist.get_rank() == 0:
            dist.barrier()


def open_splits(
    data: Data,
    view: View | None = None,
    transform: Transform | None = None,
    calib_indices: list[int] | None = None,
) -> Splits:
    """Opens a data set and cuts it; `calib_indices`: the rows that a checkpoint held out, if any.

    Raises ValueError for data, a view or a transform that cannot be had, and for rows that are not there.
    """
    with one_process_first(data.download or data.data_set == "shards"):
        source = open_source(data)
    if data.popular_classes:
        source = only_popular(source, data.popular_classes)
    view = (view or View()).resolved(source)
    clean, augmented = eval_transform(view), train_transform(view, transform or Transform())
    test = make_split(source.test, None, clean)
    if source.calib is not None:
        train = make_split(source.train, None, augmented)
        return Splits(source, view, train, make_split(source.calib, None, clean), test, [])
    total = len(source.train)
    if calib_indices is None:
        wanted = default_num_calib(data.data_set, total) if data.num_calib is None else data.num_calib
        _, calib_indices = split_train(total, wanted, data.seed)
    if max(calib_indices, default=0) >= total:
        held = f"image {max(calib_indices)} of its training set"
        raise UserError(f"the checkpoint held out {held}, but {data.data_path} has {total} images")
    train = make_split(source.train, sorted({*range(total)}.difference(calib_indices)), augmented)
    calib = make_split(source.train, calib_indices, clean)
    return Splits(source, view, train, calib, test, calib_indices)
