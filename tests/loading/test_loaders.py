import itertools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, Subset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from loading import loaders
from loading.loaders import TrainLoader, ordered_loader, shared_out, shuffled
from loading.relabel import only_popular
from loading.sources import Data, open_source
from loading.split import Split
from loading.transforms import Mixing, Transform, View, mixup_collate, train_transform
from utils import Compute, Runtime

CPU = Compute(torch.device("cpu"))


def runtime(batch_size, num_workers=0):
    """Batches of this size in training, half as large again in evaluation."""
    return Runtime(batch_size=batch_size, num_workers=num_workers)


def processes(world_size):
    """Every one of so many processes."""
    return [Compute(torch.device("cpu"), rank=rank, world_size=world_size) for rank in range(world_size)]


def shuffled_shard(size, compute, group, seed, chances, epoch, **options):
    """The share of one process."""
    order = shared_out(shuffled(size, seed, epoch, chances), compute, group, **options)
    return order[compute.rank :: compute.world_size].tolist()


def augmented_loader(source, num_workers, compute=CPU):
    view = View().resolved(source)
    split = Split(source.train, None, train_transform(view, Transform(reprob=0.9)))
    collate = mixup_collate(Mixing(), smoothing=0.1, num_classes=10)
    return TrainLoader(split, runtime(4, num_workers), compute, collate=collate, seed=7)


def one_epoch(loader, epoch):
    loader.start(epoch)
    return [torch.cat([images.flatten(1), targets], 1) for images, targets in loader]


@pytest.mark.parametrize("size, world_size", [(7, 2), (10, 3), (2, 4), (8, 1)])
def test_evaluation_shards_cover_everything_once(size, world_size):
    split = Subset(list(range(size)), range(size))
    shards = [ordered_loader(split, runtime(3), compute).sampler for compute in processes(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(size))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert list(shards[0]) == list(range(0, size, world_size))


def test_training_shards_are_equally_long_disjoint_and_cut_to_full_groups():
    def shards(epoch):
        return [shuffled_shard(23, compute, 4, 1, None, epoch) for compute in processes(2)]

    first = shards(0)
    assert [len(rows) for rows in first] == [8, 8]
    assert len(set(first[0] + first[1])) == 16
    assert shards(1)[0] != first[0]
    assert shards(0)[0] == first[0]


@pytest.mark.parametrize(
    ("size", "world_size", "least", "multiple", "count"),
    [
        (23, 2, 2, 1, 12),  # the first sample comes again, and no group is partial
        (21, 2, 2, 1, 11),
        (21, 2, 2, 2, 10),  # mixed in pairs
        (21, 2, 4, 1, 8),  # halves of 2 or more
        (9, 1, 2, 1, 8),  # batch norm needs more than one
        (10, 4, 2, 1, 3),  # two of the samples come again
        (3, 8, 1, 1, 1),
    ],
)
def test_a_last_partial_group_is_kept_where_it_is_wanted(size, world_size, least, multiple, count):
    """Samples are shared as by torch's sampler; every process has as many."""
    order = shuffled_shard(size, CPU, 1, 5, None, 3)
    assert sorted(order) == list(range(size))
    for compute in processes(world_size):
        kept = shuffled_shard(size, compute, 4, 5, None, 3, least=least, multiple=multiple)
        torchs = DistributedSampler(order, world_size, compute.rank, shuffle=False)
        assert kept == [order[i] for i in torchs][:count] and len(kept) == count


@pytest.mark.parametrize(
    ("batch_size", "least", "mixed", "sizes"),
    [
        (6, 2, False, [6, 6, 6, 2]),
        (6, 4, False, [6, 6, 6]),
        (17, 2, False, [17, 3]),
        (17, 2, True, [17, 2]),
        (30, 2, False, [20]),
        (6, 0, False, [6, 6]),
    ],
)
def test_micro_batches_are_left_over_where_it_is_wanted(cifar, as_tensor, batch_size, least, mixed, sizes):
    collate = default_collate if mixed else None
    split = Split(cifar.train, None, as_tensor)
    loader = TrainLoader(split, runtime(batch_size), CPU, update_freq=2, least=least, collate=collate, seed=1)
    for epoch in range(2):
        loader.start(epoch)
        labels = [labels.tolist() for _, labels in loader]
        assert [len(batch) for batch in labels] == sizes and len(loader) == len(sizes)
        names = [loader.names(step) for step in range(len(loader))]
        assert [[int(name.split("[")[1][:-1]) % 10 for name in batch] for batch in names] == labels


def test_the_order_of_a_loader_is_its_share_of_the_epoch(cifar, as_tensor):
    split = Split(cifar.train, None, as_tensor)
    loader = TrainLoader(split, runtime(3), processes(2)[1], update_freq=2, seed=1)
    assert len(loader) == 2 and len(loader.order) == 6
    assert loader.order == shuffled_shard(20, processes(2)[1], 6, 1, None, 0)
    loader.start(4)
    assert loader.order == shuffled_shard(20, processes(2)[1], 6, 1, None, 4)
    assert [int(label) for _, labels in loader for label in labels] == [i % 10 for i in loader.order]


@pytest.mark.parametrize(("world_size", "least", "count"), [(1, 0, 6), (1, 2, 8), (2, 0, 6), (3, 2, 9)])
def test_an_epoch_of_some_images_is_the_first_of_its_order(cifar, as_tensor, world_size, least, count):
    """Other ones every epoch, and all of them in the long run."""
    split, seen = Split(cifar.train, None, as_tensor), set()
    loaders = [
        TrainLoader(split, runtime(3), one, least=least, seed=1, epoch_images=8)
        for one in processes(world_size)
    ]
    for epoch in range(24):
        for loader in loaders:
            loader.start(epoch)
        whole = loaders[0].batches.order.tolist()
        wanted = shuffled(20, 1, epoch)[:8].tolist()
        assert whole == (wanted + wanted)[:count]
        assert [loader.order for loader in loaders] == [whole[r::world_size] for r in range(world_size)]
        seen |= set(whole)
    assert seen == set(range(20))
    labels = [label for _, labels in loaders[0] for label in labels.tolist()]
    assert labels == [i % 10 for i in loaders[0].order]


def test_an_epoch_of_all_images_is_as_without_a_number(cifar, as_tensor):
    split = Split(cifar.train, None, as_tensor)
    plain, whole = (TrainLoader(split, runtime(3), CPU, seed=1, epoch_images=n) for n in (0, 20))
    assert plain.order == whole.order
    with pytest.raises(ValueError, match="^--epoch_images 21; accepted: at most 20, the training images$"):
        TrainLoader(split, runtime(3), CPU, epoch_images=21)
    with pytest.raises(ValueError, match="^2 training images are fewer than one global batch"):
        TrainLoader(split, runtime(3), CPU, epoch_images=2)


def test_popular_classes_are_drawn_by_their_chances(cifar, as_tensor):
    source = only_popular(cifar, [3])
    loader = TrainLoader(Split(source.train, None, as_tensor), runtime(20), CPU, seed=1)
    chances = np.where(np.arange(20) % 10 == 3, 0.25, 0.5 / 18)
    assert (
        loader.order == shuffled_shard(20, CPU, 20, 1, chances, 0) != shuffled_shard(20, CPU, 20, 1, None, 0)
    )
    labels = [int(label) for _, labels in loader for label in labels]
    assert labels == [int(i % 10 != 3) for i in loader.order] and labels.count(0) > 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_is_the_same_whether_or_not_others_ran_before(cifar, num_workers):
    loader = augmented_loader(cifar, num_workers)
    epochs = [one_epoch(loader, epoch) for epoch in range(4)]
    torch.rand(5), np.random.rand(5)
    resumed = one_epoch(augmented_loader(cifar, num_workers), 3)
    assert len(resumed) == len(loader) == 5
    assert all(torch.equal(a, b) for a, b in zip(epochs[3], resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(epochs[2], epochs[3], strict=True))


def test_workers_augment_and_mix_differently_in_every_epoch_and_process(tmp_path, pixels):
    """With one picture throughout, whatever differs comes from the generators of the workers."""
    np.savez(tmp_path / "a.npz", images=pixels(1).repeat(8, 0), labels=np.arange(8))
    path = str(tmp_path / "a.npz")
    source = open_source(Data("CIFAR10", path, path))
    loader, other = augmented_loader(source, 1), augmented_loader(source, 1, processes(2)[1])
    passes = [one_epoch(loader, 0), one_epoch(loader, 1), one_epoch(other, 0)]
    shares = [{round(float(row.max()), 4) for row in rows[0][:, -10:]} for rows in passes]  # mixed targets
    assert shares[0] != shares[1] and shares[0] != shares[2]
    pictures = [rows[0][:, :-10] for rows in passes]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_reading_for_evaluation_leaves_the_global_generator_alone(cifar, as_tensor):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(ordered_loader(Split(cifar.test, None, as_tensor), runtime(3), CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_ordered_loader_keeps_order_and_the_last_batch(cifar, as_tensor):
    split = Split(cifar.test, None, as_tensor)
    shards = [ordered_loader(split, runtime(3), compute) for compute in processes(2)]
    batches = [[labels.tolist() for _, labels in loader] for loader in shards]
    assert batches == [[[0, 2, 4, 6], [8]], [[1, 3, 5, 7], [9]]]


def test_batch_names_are_those_of_the_current_epoch(tmp_path, cifar, as_tensor):
    split = Split(cifar.train, range(10, 20), as_tensor)
    loader = TrainLoader(split, runtime(3), CPU, seed=1)
    loader.start(2)
    names = [loader.names(step) for step in range(len(loader))]
    labels = [labels.tolist() for _, labels in loader]
    assert names == [[f"{tmp_path / 'a.npz'}[{10 + label}]" for label in batch] for batch in labels]


def test_too_few_images_for_one_step_is_refused(cifar, as_tensor):
    split = Split(cifar.train, None, as_tensor)
    with pytest.raises(ValueError, match="20 training images.*batch size 4 x update_freq 3 x 2 processes"):
        TrainLoader(split, runtime(4), processes(2)[0], update_freq=3)
    with pytest.raises(ValueError, match="1 training images are fewer than one global batch of batch size 2"):
        TrainLoader(Split(cifar.train, [0], as_tensor), runtime(4), CPU, least=2)


class Killer(Split):
    """A split, the first reader of whose image `index` is killed; `file` remembers that it was."""

    def __init__(self, split, file, index, always=False):
        super().__init__(split.base, split.indices, split.transform)
        self.file, self.index, self.always = file, index, always

    def __getitem__(self, index):
        if index == self.index and (self.always or not self.file.exists()):
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_batches_of_a_worker_that_died_are_read_again(tmp_path, cifar, as_tensor, capfd, monkeypatch):
    waits = _MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waits, "__defaults__", (0.1,))  # torch looks every 5 s whether workers live
    split = Split(cifar.train, None, as_tensor)
    whole = [labels.tolist() for _, labels in ordered_loader(split, runtime(3), CPU)]
    killer = Killer(split, tmp_path / "a", 9)
    assert [labels.tolist() for _, labels in ordered_loader(killer, runtime(3, 2), CPU)] == whole
    loader = TrainLoader(split, runtime(5), CPU, seed=1)
    loader.start(3)
    whole = [labels.tolist() for _, labels in loader]
    loader = TrainLoader(Killer(split, tmp_path / "b", loader.order[7]), runtime(5, 2), CPU, seed=1)
    loader.start(3)
    assert [labels.tolist() for _, labels in loader] == whole
    assert capfd.readouterr().out.count(" is read again, a loader's process died: ") == 2
    doomed = ordered_loader(Killer(split, tmp_path / "c", 9, always=True), runtime(3, 1), CPU)
    with pytest.raises((RuntimeError, ConnectionError, EOFError)):
        list(doomed)


def test_a_pass_can_start_at_any_batch(cifar):
    whole = one_epoch(augmented_loader(cifar, 0), 3)
    for num_workers in (0, 1):
        loader = augmented_loader(cifar, num_workers)
        loader.start(3, 2)
        rest = [torch.cat([images.flatten(1), targets], 1) for images, targets in loader]
        assert len(rest) == 3 and all(map(torch.equal, rest, whole[2:]))
    shares = [one_epoch(augmented_loader(cifar, 0, compute), 3) for compute in processes(2)]
    assert len(shares[0]) == 2


def test_augmentation_of_a_place_does_not_depend_on_the_number_of_processes(cifar):
    split = Split(cifar.train, None, train_transform(View().resolved(cifar), Transform(reprob=0.9)))
    alone = TrainLoader(split, runtime(4), CPU, seed=7)
    pairs = [TrainLoader(split, runtime(2), compute, seed=7) for compute in processes(2)]
    for batch, first, second in zip(alone, *pairs, strict=True):
        assert torch.equal(batch[0], torch.stack([first[0], second[0]], 1).flatten(0, 1))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        RuntimeError("received 0 items of ancdata"),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly\nmore"),
    ],
)
def test_what_a_worker_held_that_dies_is_read_again(cifar, monkeypatch, capsys, error):
    loader, read = augmented_loader(cifar, 0), loaders.DataLoader.__iter__
    whole, passes = one_epoch(loader, 2), []

    def broken(self):
        passes.append(self.sampler)
        yield from itertools.islice(read(self), 2)
        if len(passes) == 1:
            raise error
        yield from itertools.islice(read(self), 2, None)

    monkeypatch.setattr(loaders.DataLoader, "__iter__", broken)
    monkeypatch.setattr(loaders.signal, "signal", lambda *_: None)
    torch.testing.assert_close(one_epoch(loader, 2), whole, rtol=0, atol=0)
    assert [left.start for left in passes] == [0, 2]
    assert capsys.readouterr().out.startswith("batch 2 is read again, a loader's process died: ")


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), RuntimeError("Caught RuntimeError in DataLoader worker process 0."), EOFError()],
)
def test_what_no_worker_did_is_raised(cifar, monkeypatch, error):
    def broken(self):
        raise error
        yield

    monkeypatch.setattr(loaders.DataLoader, "__iter__", broken)
    with pytest.raises(type(error)):
        one_epoch(augmented_loader(cifar, 0), 0)


def test_a_worker_whose_run_was_killed_as_it_started_ends(monkeypatch):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(loaders.multiprocessing, "parent_process", lambda: SimpleNamespace(pid=os.getpid()))
    monkeypatch.setattr(loaders.os, "_exit", end)
    with pytest.raises(SystemExit):
        loaders.leave_signals(0)
