"""Loaders: shuffled for training, where any epoch can be repeated on its own, and in order for evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from loading.relabel import Popular, balanced
from loading.split import Images, Split
from loading.streams import Stream
from utils import Compute, Runtime, UserError, seed_everything


def shuffled_shard(
    size: int,
    compute: Compute,
    group: int,
    seed: int,
    chances: np.ndarray | None,
    epoch: int,
    *,
    least: int = 0,
    multiple: int = 1,
) -> list[int]:
    """This process's share of `size` shuffled samples, cut to full groups of all processes.

    With `least`, each process also keeps a last group of at least so many, in `multiple`s; where the samples
    do not share out evenly, the first ones come again, as in torch's DistributedSampler. `chances` [size] are
    the samples' sampling weights, where they are not uniform.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(size)
    if chances is not None:
        order = rng.choice(size, size, p=chances)
    count = size // (compute.world_size * group) * group  # of each process
    if least:
        share = -(-size // compute.world_size)
        rest = share % group
        count = share - (rest if rest < least else rest % multiple)
    return np.resize(order, count * compute.world_size)[compute.rank :: compute.world_size].tolist()


class TrainLoader(DataLoader):
    """Full micro-batches, equally many per process and a multiple of `update_freq`; ValueError if none.

    With `least`, the images left over are used too, and so is a last micro-batch of at least so many of them,
    of an even number if `collate` mixes them. Every process has the same sizes. Order and augmentation of an
    epoch depend on its number alone. `order` is that of this epoch on this process, as indices of the split's
    samples; a stream has none. Popular classes are `balanced`.
    """

    def __init__(
        self,
        split: Split | Stream,
        runtime: Runtime,
        compute: Compute,
        *,
        update_freq: int = 1,
        least: int = 0,
        collate: Callable | None = None,
        seed: int = 0,
    ) -> None:
        self.split: Any = split
        self.seed = seed
        self.rank = compute.rank
        self.draws = torch.Generator()  # its own, to leave the global one, which dropout uses, alone
        self.order: list[int] = []
        group = runtime.batch_size * (1 if least else update_freq)
        if isinstance(split, Stream):
            if least:
                raise UserError("--drop_last false: the batches of a stream are always filled up")
            split.reader.batch_size = group  # each worker's images are rounded up to full groups
            split.set_loader_cfg(runtime.num_workers)
        else:
            popular = isinstance(split.base, Popular)
            chances = balanced(split.labels, len(split.base.numbers)) if popular else None
            last = {"least": least, "multiple": 2 if collate else 1}
            self.draw = partial(shuffled_shard, len(split), compute, group, seed, chances, **last)
            self.order += self.draw(0)
            if not self.order:
                product = f"{runtime.batch_size} x update_freq {update_freq} x {compute.world_size} processes"
                needed = f"one global batch of batch size {least or product}"
                raise UserError(f"{len(split)} training images are fewer than {needed}")
        super().__init__(
            split,
            runtime.batch_size,
            sampler=self.order or None,
            # timm's readers shuffle a pass anew only in a new process
            num_workers=max(runtime.num_workers, int(isinstance(split, Stream))),
            collate_fn=collate,
            pin_memory=runtime.pin_mem and compute.device.type == "cuda",
            generator=self.draws,
        )

    def set_epoch(self, epoch: int) -> None:
        """Seeds the next pass by (seed, epoch, rank), whatever ran before."""
        if isinstance(self.dataset, Stream):
            self.dataset.set_epoch(epoch)
        else:
            self.order[:] = self.draw(epoch)
        drawn = np.random.default_rng((self.seed, epoch, 1 + self.rank)).integers(2**63)
        self.draws.manual_seed(int(drawn))
        if self.num_workers == 0:  # the transforms then draw from the global generators
            seed_everything(self.seed, epoch, self.rank)

    def names(self, step: int) -> list[str]:
        """Names of the samples in micro-batch `step` of this epoch on this process; none for a stream."""
        size = self.batch_size or 1
        return [self.split.name(i) for i in self.order[step * size : (step + 1) * size]]


class OrderedLoader(DataLoader):
    """What `ordered_loader` makes."""

    def name(self, position: int) -> str:
        """The name of an image in messages, by its position from 0 in what this process reads."""
        images: Any = self.dataset
        index = position if isinstance(images, Stream) else self.sampler[position]
        while isinstance(images, Subset):
            images, index = images.dataset, images.indices[index]
        return images.name(index) if isinstance(images, Images) else f"image {index}"


def ordered_loader(split: Split | Subset | Stream, runtime: Runtime, compute: Compute) -> OrderedLoader:
    """Every image once over all processes, in order, the last batch kept.

    Batches are 1.5 times those of training. timm distributes a stream over processes only roughly evenly.
    """
    sampler = None
    if isinstance(split, Stream):
        split.set_loader_cfg(runtime.num_workers)
    else:
        sampler = range(compute.rank, len(split), compute.world_size)
    return OrderedLoader(
        split,
        max(1, int(1.5 * runtime.batch_size)),
        sampler=sampler,
        num_workers=runtime.num_workers,
        pin_memory=runtime.pin_mem and compute.device.type == "cuda",
        generator=torch.Generator(),
    )
