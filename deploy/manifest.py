"""What lies in an exported folder: `manifest.json` as dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive.plain import read_plain, write_plain
from adaptive.policy import Made
from deploy.folder import Port
from loading.transforms import CROP_PCT, LARGE, SMALL, View

FILE = "manifest.json"
SCHEMAS = (1,)  # the last one is written


@dataclass(frozen=True)
class Architecture:
    """A registered network, as `models.create_model` takes it."""

    name: str
    options: dict[str, Any]
    num_classes: int


@dataclass(frozen=True)
class Pixels:
    """How an image becomes what the network reads, float32 [3, size, size].

    Its short side is resized to `resize` pixels, with an antialiased filter as Pillow has, and the middle cut
    out; where `resize` is 0 it is resized to the square as a whole. Pixels in 0..1 are normalised by `mean`
    and `std` per channel, in the order red, green, blue.
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, view: View) -> "Pixels":
        """What `loading.transforms.eval_transform` does for a resolved view."""
        resize = int(view.size / (view.crop_pct or CROP_PCT)) if SMALL < view.size < LARGE else 0
        interpolation = view.interpolation if view.size > SMALL else "bicubic"
        return cls(view.size, resize, interpolation, tuple(view.mean or ()), tuple(view.std or ()))


@dataclass(frozen=True)
class StageFiles:
    """A stage: the number of its exit in the network, its tensors, and its files.

    `inputs` are those of the ONNX file, in order; its outputs are the logits, then `outputs`. Absent files
    are None: `int8` is ONNX with quantised weights, `compiled` an AOTInductor package for the processor of
    the export.
    """

    exit: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    fp32: str
    pt2: str
    int8: str | None = None
    compiled: str | None = None


@dataclass(frozen=True)
class Manifest:
    """An exported network.

    `policies` are files by precision, the first of which is that in which they were found; `menu` are files
    of other policies for the same stages, for any of which that one may be swapped. `files` has the SHA-256
    of every file but this. `model_hash` identifies the weights before export.
    """

    network: Architecture
    class_names: tuple[str, ...]
    view: Pixels
    stages: tuple[StageFiles, ...]
    policies: dict[str, str]
    menu: tuple[str, ...]
    model_hash: str
    made: Made
    files: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes it into a folder."""
        write_plain(folder / FILE, self, SCHEMAS[-1])

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads what `save` wrote; ValueError for a damaged file or one of another schema."""
        return read_plain(folder / FILE, cls, SCHEMAS, "manifest")
