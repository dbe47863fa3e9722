"""What tests of scripts share: their modules, a few images, and files of untrained networks."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from experiment.checkpoint import save
from models import create_model

DIGITS = {"data_set": "DIGITS", "seed": 0, "mean": [0.5] * 3, "std": [0.25] * 3, "input_size": 32}
NETWORKS = {"msdnet": {"nBlocks": 2, "nChannels": 4, "growthRate": 4}, "cifar_resnet": {"depth": 8}}


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """`script(name)` is the module of scripts/NAME.py."""
    return import_module


@pytest.fixture
def printed(capsys) -> Callable[..., str]:
    """`printed(name, *words)`: what scripts/NAME.py prints with these words behind it."""

    def run(name: str, *words: object) -> str:
        capsys.readouterr()
        import_module(name).main([str(one) for one in words])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    """A file of eight random images of ten classes."""
    path, rng = tmp_path_factory.mktemp("npz") / "images.npz", np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), labels=np.arange(8))
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Files of untrained networks by name: two exits, and one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, options in NETWORKS.items():
        arch = {"name": name, "options": options, "num_classes": 10}
        weights = create_model(name, 10, **options).state_dict()
        content = {"model": weights, "arch": arch, "args": DIGITS, "calib_indices": [1, 2]}
        save(folder / f"{name}.pth", content)
    return {name: str(folder / f"{name}.pth") for name in NETWORKS}
