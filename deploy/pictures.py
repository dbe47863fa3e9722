"""Image files as an exported network reads them, as `loading/` prepares them, without PyTorch."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from deploy.decide import Array, RunnerError

GREYS = 65_535  # of an image with 16 bits per pixel


def prepared(image: Any, view: Mapping[str, Any]) -> Array:
    """A PIL image, or the file of one, resized, cropped and normalised: float32 [3, size, size].

    Raises RunnerError for what cannot be read, greys of more than 16 bits, and as many pixels as only a
    decompression bomb has.
    """
    from PIL import Image  # arrays need no Pillow

    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as picture:
            picture = _sized(_rgb(picture), view)
    except Exception as error:  # decoders raise anything
        raise _unreadable(image, error) from None
    pixels = np.asarray(picture, np.float32) / np.float32(255)
    pixels -= np.array(view["mean"], np.float32)
    pixels /= np.array(view["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_file(image: Any) -> None:
    """Refuses a file whose header is no image's; RunnerError."""
    from PIL import Image

    try:
        with Image.open(image) as picture:
            _check_size(*picture.size)
    except Exception as error:
        raise _unreadable(image, error) from None


def _unreadable(image: Any, error: Exception) -> RunnerError:
    why = getattr(error, "strerror", None) or str(error).partition(" '")[0] or type(error).__name__
    return RunnerError(f"{image} is no image that can be read: {why}")


def _check_size(width: int, height: int) -> None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:  # Pillow only warns, up to twice as many
        raise RunnerError(f"{width} x {height} pixels; accepted: at most {limit} in all")


def _rgb(picture: Any) -> Any:
    """As Pillow converts it, but 16-bit greys scaled and not cut off at 255."""
    from PIL import Image

    _check_size(*picture.size)
    if picture.mode.startswith("I"):
        greys = np.asarray(picture)
        if greys.min() < 0 or greys.max() > GREYS:
            raise RunnerError(f"its greys go from {greys.min()} to {greys.max()}; accepted: 0 to {GREYS}")
        picture = Image.fromarray(np.rint(greys * (255 / GREYS)).astype(np.uint8))
    return picture.convert("RGB")


def _sized(picture: Any, view: Mapping[str, Any]) -> Any:
    """The middle square of a picture whose short side becomes `resize`; 0: all of it, squeezed."""
    from PIL import Image

    size = view["size"]
    short = view["resize"]
    least = min(picture.size)
    sides = [int(short * side / least) for side in picture.size] if short else [size, size]
    _check_size(*sides)  # a line of pixels would become a wide band
    picture = picture.resize(sides, Image.Resampling[view["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in sides)
    return picture.crop((left, top, left + size, top + size))
