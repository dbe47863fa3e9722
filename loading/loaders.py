"""Loaders: shuffled for training, where any epoch can be repeated on its own, and in order for evaluation."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from loading.relabel import Popular, balanced
from loading.split import Images, Split
from loading.streams import Stream
from utils import Compute, Runtime, UserError, seed_draws, seed_everything


def shuffled(size: int, seed: int, epoch: int, chances: np.ndarray | None = None) -> np.ndarray:
    """`size` samples in an epoch's order.

    `chances` [size] are the samples' sampling weights, where they are not uniform.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(size)
    return order if chances is None else rng.choice(size, size, p=chances)


def shared_out(
    order: np.ndarray, compute: Compute, group: int, *, least: int = 0, multiple: int = 1
) -> np.ndarray:
    """An epoch's order cut to full groups of all processes; process r has [r::world size].

    With `least`, each process also keeps a last group of at least so many, in `multiple`s; where the samples
    do not share out evenly, the first ones come again, as in torch's DistributedSampler.
    """
    size = len(order)
    count = size // (compute.world_size * group) * group  # of each process
    if least:
        share = -(-size // compute.world_size)
        rest = share % group
        count = share - (rest if rest < least else rest % multiple)
    return np.resize(order, count * compute.world_size)


class Batches(Dataset):
    """The micro-batches of an epoch on one process: [b] -> (images [B, 3, H, W], targets), in any order.

    A sample draws from generators seeded by (seed, epoch, its place in the epoch's order), and what mixes a
    batch from those of its first sample's place: not by the row of the data set, as sampling weights repeat
    rows. So a batch depends neither on the worker that reads it nor on those read before.
    """

    def __init__(self, split: Any, batch_size: int, compute: Compute, seed: int, collate: Callable) -> None:
        self.split, self.batch_size, self.seed, self.collate = split, batch_size, seed, collate
        self.rank, self.world_size = compute.rank, compute.world_size

    def start(self, order: np.ndarray, epoch: int) -> None:
        """An epoch in this order, that of all processes."""
        self.order = order
        self.seeds = np.random.default_rng((self.seed, epoch, 1)).integers(
            2**32, size=(2, len(order)), dtype=np.uint32
        )

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.world_size))

    def places(self, batch: int) -> range:
        """Where the samples of a micro-batch are in the order."""
        size = self.batch_size * self.world_size
        return range(batch * size + self.rank, min((batch + 1) * size, len(self.order)), self.world_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor]:
        samples, places = [], self.places(batch)
        for place in places:
            seed_draws(int(self.seeds[0, place]))
            samples.append(self.split[int(self.order[place])])
        seed_draws(int(self.seeds[1, places[0]]))
        return self.collate(samples)


class TrainLoader:
    """Full micro-batches, equally many per process and a multiple of `update_freq`; ValueError if none.

    With `least`, the images left over are used too, and so is a last micro-batch of at least so many of them,
    of an even number if `collate` mixes them. Every process has the same sizes. Popular classes are
    `balanced`. A pass starts at (epoch, batch) of `start`, and what the training step draws at a batch is
    seeded by (seed, epoch, batch, rank) as it is handed over; so that is the whole state of the loader. With
    `epoch_images`, an epoch is the first so many of its order. A stream has no rows: it can only be read from
    an epoch's beginning.
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
        epoch_images: int = 0,
    ) -> None:
        self.split: Any = split
        self.seed, self.compute = seed, compute
        self.reading: Generator[tuple[Tensor, Tensor], None, None] | None = None
        self.micro_batch = runtime.batch_size * compute.world_size  # images that all processes read at once
        group = runtime.batch_size * (1 if least else update_freq)
        self.options = worker_options(runtime, compute)
        if isinstance(split, Stream):
            if least:
                raise UserError("--drop_last false: the batches of a stream are always filled up")
            if epoch_images:
                raise UserError(f"--epoch_images {epoch_images}: a stream's epoch is all of it; accepted: 0")
            split.reader.batch_size = group  # each worker's images are rounded up to full groups
            split.set_loader_cfg(max(runtime.num_workers, 1))
            # timm's readers shuffle a pass anew only in a new process
            self.options |= {"batch_size": runtime.batch_size, "collate_fn": collate}
            self.options["num_workers"] = max(runtime.num_workers, 1)
        else:
            if epoch_images > len(split):
                held = f"accepted: at most {len(split)}, the training images"
                raise UserError(f"--epoch_images {epoch_images}; {held}")
            self.epoch_images = epoch_images or len(split)
            popular = isinstance(split.base, Popular)
            self.chances = balanced(split.labels, len(split.base.numbers)) if popular else None
            last = {"least": least, "multiple": 2 if collate else 1}
            self.share_out = partial(shared_out, compute=compute, group=group, **last)
            self.batches = Batches(split, runtime.batch_size, compute, seed, collate or default_collate)
        self.start(0)
        if not len(self):
            product = f"{runtime.batch_size} x update_freq {update_freq} x {compute.world_size} processes"
            needed = f"one global batch of batch size {least or product}"
            raise UserError(f"{epoch_images or len(split)} training images are fewer than {needed}")

    @property
    def seekable(self) -> bool:
        """Whether a pass can start in the middle of an epoch."""
        return not isinstance(self.split, Stream)

    def start(self, epoch: int, batch: int = 0) -> None:
        """The next pass is the epoch's from this micro-batch on, whatever ran before."""
        self.epoch, self.first = epoch, batch
        if self.seekable:
            order = shuffled(len(self.split), self.seed, epoch, self.chances)
            self.batches.start(self.share_out(order[: self.epoch_images]), epoch)
        else:
            self.split.set_epoch(epoch)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch; an estimate for a stream."""
        return len(self.batches) if self.seekable else len(DataLoader(self.split, **self.options))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.reading = self._read()
        for batch, (images, targets) in enumerate(self.reading, self.first):
            seed_everything(self.seed, self.epoch, batch, self.compute.rank)
            yield images, targets

    def _read(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        draws = torch.Generator().manual_seed(self.epoch)  # its own: DataLoader draws a seed for its workers
        if not self.seekable:
            yield from DataLoader(self.split, generator=draws, **self.options)
            return

        def loader_from(batch: int) -> DataLoader:
            left = range(batch, len(self))
            return DataLoader(self.batches, None, sampler=left, generator=draws, **self.options)

        yield from with_new_workers(loader_from, self.first, len(self))

    def close(self) -> None:
        """Ends the processes of a pass that is broken off; they might be waited for at the program's end."""
        if self.reading:
            self.reading.close()

    @property
    def order(self) -> list[int]:
        """This process's samples in this epoch, as indices of the split's; none of a stream."""
        mine = slice(self.compute.rank, None, self.compute.world_size)
        return self.batches.order[mine].tolist() if self.seekable else []

    @property
    def rows(self) -> list[int]:
        """The same as rows of the data set."""
        return [self.split.indices[i] for i in self.order]

    def names(self, batch: int) -> list[str]:
        """Names of the samples in a micro-batch of this epoch on this process; none for a stream."""
        if not self.seekable:
            return []
        return [self.split.name(int(self.batches.order[place])) for place in self.batches.places(batch)]


def _is_of_dead_worker(error: Exception) -> bool:
    """Whether a loader raised this upon the death of a worker, maybe while that handed over a batch."""
    if str(error).startswith("Caught "):  # by a worker, which lives
        return False
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error) or "ancdata" in str(error)
    return True


def worker_options(runtime: Runtime, compute: Compute) -> dict[str, Any]:
    """What a DataLoader is told of its processes."""
    pin_memory = runtime.pin_mem and compute.device.type == "cuda"
    return {
        "num_workers": runtime.num_workers,
        "pin_memory": pin_memory,
        "worker_init_fn": leave_signals,
    }


def leave_signals(worker: int) -> None:
    """In a loader's process: what is sent to the run's group of processes is for the run to answer.

    torch's worker ends with the run, unless that was killed just before: then it ends here.
    """
    run = multiprocessing.parent_process()
    if run and multiprocessing.get_start_method() == "fork" and os.getppid() != run.pid:
        os._exit(1)
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def with_new_workers(loader_from: Callable[[int], DataLoader], first: int, count: int) -> Iterator[Any]:
    """The batches of `loader_from(first)`; where a worker dies, those of it that are left are read by others.

    Raises what torch says where a batch cannot be had twice.
    """
    batch, died_at = first, -1
    while batch < count:
        try:
            loader = loader_from(batch)
            batches = iter(loader)
            if loader.num_workers and threading.current_thread() is threading.main_thread():
                # torch would raise in the middle of a step; without that, waiting for a batch finds it out.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for read in batches:
                batch += 1
                yield read
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _is_of_dead_worker(error) or died_at == batch:
                raise
            died_at = batch
            said = str(error).partition("\n")[0] or type(error).__name__
            print(f"batch {batch} is read again, a loader's process died: {said}", flush=True)


class OrderedLoader(DataLoader):
    """What `ordered_loader` makes."""

    def __iter__(self) -> Any:
        if isinstance(self.dataset, Stream):
            return super().__iter__()
        return with_new_workers(self._from, 0, len(self))

    def _from(self, batch: int) -> DataLoader:
        """The same without the batches before this one."""
        assert isinstance(self.sampler, range) and self.batch_size
        return DataLoader(
            self.dataset,
            self.batch_size,
            sampler=self.sampler[batch * self.batch_size :],
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
            worker_init_fn=leave_signals,
        )

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
    options = worker_options(runtime, compute)
    size = max(1, int(1.5 * runtime.batch_size))
    return OrderedLoader(split, size, sampler=sampler, generator=torch.Generator(), **options)
