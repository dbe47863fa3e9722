"""Drawn shapes, a tiny detector and a short run on them, built once for all tests of detection."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from detection import detectors
from detection.detectors import DetectorOptions
from detection.shapes import draw_shapes
from detection.train import Detection, fit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def script():
    """Loads a file of scripts/ by its name."""

    def load_script(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.fixture(scope="session")
def tiny():
    """Options of a detector that is built and run in no time."""
    return DetectorOptions(min_size=64, max_size=64, smallest_anchor=8, proposals=8, sampled=8)


@pytest.fixture
def narrow(monkeypatch):
    """Detectors have a pyramid of few channels, so that a run takes a second."""
    monkeypatch.setattr(detectors, "PYRAMID", 16)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of drawn shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder, "train", 6, seed=0)
    draw_shapes(folder, "val", 2, seed=1)
    return folder


@pytest.fixture(scope="session")
def detection(shapes, tiny):
    """The flags of a run of two short epochs, with masks."""
    return Detection(
        **vars(tiny),
        model="mask_rcnn_rexnet_090",
        data_path=str(shapes),
        train_split="train",
        val_split="val",
        epochs=2,
        lr=0.01,
        warmup_steps=2,
        decay_epochs=(1,),
        num_workers=0,
    )


@pytest.fixture(scope="session")
def whole(detection, tmp_path_factory):
    """The folder of that run, unbroken; open it with `narrow`."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "PYRAMID", 16)
        fit(replace(detection, output_dir=str(folder)))
    return folder
