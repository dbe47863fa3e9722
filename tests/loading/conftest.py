"""Small data sets in files, and the ways to write them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from loading.sources import Data, open_source


def _pixels(count, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def _write_npz(path, count=20, num_classes=10, seed=0):
    np.savez(path, images=_pixels(count, seed), labels=np.arange(count) % num_classes)
    return path


def _write_tree(root, classes=("cat", "dog"), count=2):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def _encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def _as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def pixels():
    """Random images: (count, seed) -> uint8 [count, 32, 32, 3]."""
    return _pixels


@pytest.fixture
def write_npz():
    """Writes a file of random images, labels in turn."""
    return _write_npz


@pytest.fixture
def write_tree():
    """Writes folders of classes."""
    return _write_tree


@pytest.fixture
def encoded():
    """An array of pixels as the bytes of an image file."""
    return _encoded


@pytest.fixture
def as_tensor():
    """PIL image to uint8 [3, H, W]."""
    return _as_tensor


@pytest.fixture
def cifar(tmp_path):
    """20 training images in a.npz and 10 test images in b.npz, opened as CIFAR-10."""
    train, test = _write_npz(tmp_path / "a.npz"), _write_npz(tmp_path / "b.npz", 10, seed=1)
    return open_source(Data("CIFAR10", str(train), str(test)))
