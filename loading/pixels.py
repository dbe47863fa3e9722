"""Pixels of image files, whatever their format, as RGB of 8 bits."""

import zipfile
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import UserError

# What PIL, NumPy and timm raise for a file they cannot read, or should not.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
GREYS = 65_535  # of an image with 16 bits per pixel


def read_image(path: str) -> Image.Image:
    """The image in a file, of a film the first frame, in RGB; raises one of `UNREADABLE`."""
    with open(path, "rb") as file:
        return decode(file)


def decode(file: BinaryIO) -> Image.Image:
    """The image in an open file, as `read_image` gives it."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its text is about Python's file object
        raise UserError("what it holds is of no image format known here") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, as PIL converts it, but 16-bit greys scaled and not cut off at 255.

    Raises ValueError for greys of more than 16 bits, and for as many pixels as only a decompression bomb has.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:  # PIL only warns, up to twice as many
        raise UserError(f"{image.width} x {image.height} pixels; accepted: at most {limit} in all")
    if image.mode.startswith("I"):
        greys = np.asarray(image)
        if greys.min() < 0 or greys.max() > GREYS:
            raise UserError(f"its greys go from {greys.min()} to {greys.max()}; accepted: 0 to {GREYS}")
        image = Image.fromarray(np.rint(greys * (255 / GREYS)).astype(np.uint8))
    return image.convert("RGB")
