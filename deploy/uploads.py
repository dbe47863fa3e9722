"""Images that strangers send: limits before anything is decoded."""

import io
from typing import Any

from PIL import Image

from deploy.decide import RunnerError

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
LONGEST = 50  # times the short side; resizing makes the short side large, and the long one with it


class BadImage(RunnerError):
    """What was sent is no image of the type that it is said to be, or one that is too large."""


def decode(body: bytes, content_type: str, max_pixels: int) -> Any:
    """The PIL image in the body of a request; raises BadImage in one line, and nothing else.

    Its header is read first, so that an image of too many pixels is never decompressed.
    """
    try:
        picture = Image.open(io.BytesIO(body), formats=[FORMATS[content_type]])
        width, height = picture.size
    except Exception:  # decoders raise nearly anything on damaged bytes
        raise BadImage(f"the body is no {content_type} that can be read") from None
    if width * height > max_pixels:
        raise BadImage(f"an image of {width} x {height} pixels; accepted: {max_pixels} pixels")
    if max(width, height) > LONGEST * min(width, height):
        raise BadImage(f"an image of {width} x {height} pixels; accepted: sides of up to {LONGEST} to 1")
    try:
        picture.load()
    except Exception:
        raise BadImage(f"the body is no {content_type} that can be read") from None
    return picture
