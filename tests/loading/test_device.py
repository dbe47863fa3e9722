"""Images on the device against torchvision's functions and the transforms that read one image at a time."""

from functools import partial

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from loading import device
from loading.device import DeviceLoader
from loading.loaders import TrainLoader
from loading.split import Images, Split
from loading.transforms import Mixing, Transform, View, mixer, mixup_collate, train_transform
from utils import Compute, Runtime

CPU = Compute(torch.device("cpu"))
PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0, "device_data": True}


def loader_of(source, *, compute=CPU, batch_size=4, mixing=None, rows=None, epoch_images=0, **changes):
    """A loader of the training images, or of some rows of them."""
    view, transform = View().resolved(source), Transform(**{**PLAIN, **changes})
    split = Split(source.train, rows, train_transform(view, transform))
    options = {"view": view, "transform": transform, "mix": mixing and mixer(mixing, 0.1, 10)}
    return DeviceLoader(
        split, Runtime(batch_size=batch_size), compute, seed=7, epoch_images=epoch_images, **options
    )


def read(loader, epoch, batch=0):
    loader.start(epoch, batch)
    return list(loader)


def one_by_one(loader, source):
    """What an epoch's images are, from torchvision's crop and flip of every PIL image by what it draws."""
    view = View().resolved(source)
    for row, (top, left, flip) in zip(loader.batches.order, loader.batches.draws.tolist(), strict=True):
        image = functional.crop(functional.pad(source.train[row][0], 4), top, left, 32, 32)
        pixels = functional.to_tensor(functional.hflip(image) if flip else image)
        yield functional.normalize(pixels, view.mean, view.std)


def test_a_batch_is_torchvisions_crop_and_flip_of_every_image(cifar):
    loader = loader_of(cifar)
    images, labels = zip(*read(loader, 1), strict=True)
    expected = torch.stack(list(one_by_one(loader, cifar)))
    assert torch.equal(torch.cat(images), expected)
    assert torch.cat(labels).tolist() == [i % 10 for i in loader.order]
    assert loader.batches.images.dtype == torch.uint8 and expected.shape == (20, 3, 32, 32)
    draws = []
    for epoch in range(10):
        loader.start(epoch)
        draws.append(loader.batches.draws)
    draws = torch.cat(draws)
    assert draws.amin(0).tolist() == [0, 0, 0] and draws.amax(0).tolist() == [8, 8, 1]


def test_pixels_are_distributed_as_those_of_images_read_one_by_one(cifar):
    """Over 8 epochs: the mean, the spread and the black of the margins, which the crops decide."""
    loader, view = loader_of(cifar), View().resolved(cifar)
    split = Split(cifar.train, None, train_transform(view, Transform(**PLAIN)))
    reference = TrainLoader(split, Runtime(batch_size=20, num_workers=0), CPU, seed=7)

    def figures(loader):
        images = torch.cat([images for epoch in range(8) for images, _ in read(loader, epoch)])
        return torch.stack([images.mean((0, 2, 3)), images.std((0, 2, 3)), images[:, :, 0].mean((0, 2))])

    torch.testing.assert_close(figures(loader), figures(reference), rtol=0, atol=0.15)


@pytest.mark.parametrize("changes", [{}, {"reprob": 0.9, "mixing": Mixing()}, {"flip": "alternating"}])
def test_an_epoch_can_be_entered_anywhere_whatever_ran_before(cifar, changes):
    whole = read(loader_of(cifar, **changes), 3)
    loader = loader_of(cifar, **changes)
    read(loader, 2), torch.rand(5), np.random.rand(5)
    rest = read(loader, 3, 2)
    assert len(rest) == 3
    for found, wanted in zip(rest, whole[2:], strict=True):
        assert all(map(torch.equal, found, wanted))


def test_what_a_sample_draws_does_not_depend_on_the_number_of_processes(cifar):
    (alone,) = [read(loader_of(cifar, batch_size=20, reprob=0.9), 1)[0][0]]
    pair = [Compute(torch.device("cpu"), rank=rank, world_size=2) for rank in range(2)]
    shares = [read(loader_of(cifar, compute=one, batch_size=5, reprob=0.9), 1) for one in pair]
    together = torch.empty_like(alone)
    for rank, batches in enumerate(shares):
        together[rank::2] = torch.cat([images for images, _ in batches])
    assert torch.equal(together, alone)


def test_alternating_flips_change_every_epoch_and_are_those_of_the_image(cifar):
    loader = loader_of(cifar, flip="alternating")

    def flips(epoch):
        loader.start(epoch)
        drawn = dict(zip(loader.order, loader.batches.draws[:, 2].tolist(), strict=True))
        return [drawn[row] for row in range(20)]

    first = flips(0)
    assert 0 < sum(first) < 20 and flips(2) == first and flips(1) == flips(5) == [1 - flip for flip in first]


def test_batches_are_mixed_as_those_that_are_read(cifar):
    targets = [targets for _, targets in read(loader_of(cifar, mixing=Mixing()), 2)]
    view = View().resolved(cifar)
    split = Split(cifar.train, None, train_transform(view, Transform(**PLAIN)))
    runtime, collate = Runtime(batch_size=4, num_workers=0), mixup_collate(Mixing(), 0.1, 10)
    expected = read(TrainLoader(split, runtime, CPU, collate=collate, seed=7), 2)
    assert all(map(torch.equal, targets, [targets for _, targets in expected]))
    assert targets[0].shape == (4, 10)


def test_an_epoch_of_some_images_has_the_rows_that_are_read_one_by_one(cifar):
    loader = loader_of(cifar, flip="alternating", epoch_images=9)
    read_ones = TrainLoader(loader.split, Runtime(batch_size=4, num_workers=0), CPU, seed=7, epoch_images=9)
    for epoch in range(3):
        labels = torch.cat([labels for _, labels in read(loader, epoch)])
        read_ones.start(epoch)
        assert loader.order == read_ones.order and len(labels) == 8
        assert labels.tolist() == [i % 10 for i in loader.order]


def test_names_and_rows_are_those_of_the_split(cifar, tmp_path):
    loader = loader_of(cifar, rows=range(10, 20), batch_size=3)
    names = [loader.names(batch) for batch in range(len(loader))]
    labels = [labels.tolist() for _, labels in loader]
    assert names == [[f"{tmp_path / 'a.npz'}[{10 + label}]" for label in batch] for batch in labels]
    assert len(loader) == 3 and loader.seekable


def test_images_that_cannot_stay_on_the_device_are_refused(cifar, monkeypatch, write_tree, tmp_path):
    def refused(reason, split, side=32):
        with pytest.raises(ValueError, match=f"^--device_data true: {reason}$"):
            device.read_all(split, side)

    split = partial(Split, indices=None, transform=lambda image: image)
    refused("images of 224 pixels; accepted: at most 64", split(cifar.train), 224)
    refused(
        r"image .*a.npz\[0\] has 32 x 32 pixels; accepted: 28 x 28, as --input_size", split(cifar.train), 28
    )
    monkeypatch.setattr(device, "ROOM", 2**15)
    refused("20 images are 0.0 GiB on the device; accepted: at most 0.0", split(cifar.train))
    assert len(device.read_all(split(Images(cifar.train, range(10))), 32)[0]) == 10
