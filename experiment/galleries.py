"""Test images by exit: those it is sure of, right or wrong, and those that deferring corrected or broke."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from adaptive.exit_tables import ExitTables
from adaptive.findings import Gallery, Picture
from adaptive.policy import Policy
from datasets import Split, Stream

SHOWN = 8  # images of a gallery, fewer where there are many exits:
ALL = 256  # images at most, about 1 MB
SIDE = 96  # pixels
EXACT = 32  # up to this side pixels are kept as they are


@dataclass(frozen=True)
class Pick:
    """Images of one kind that leave at an exit: how many there are, and the columns of tables to show."""

    exit: int
    kind: str
    total: int
    columns: list[int]


def pick(tables: ExitTables, policy: Policy) -> list[Pick]:
    """The images to show, by exit and kind; what is empty is left out.

    Images that an exit is sure of are those it is most confident of. Deferred images are those that leave
    later than at the first exit, whose answer they are compared with; the confidence of those picked rises
    most.
    """
    met, first = policy.outcome(tables), policy.on[0]
    before, later = tables.correct[first], met.exits > first
    rise = met.confidence - tables.confidence[first]
    kinds = [
        ("sure and right", met.correct, met.confidence),
        ("sure and wrong", ~met.correct, met.confidence),
        ("deferred and corrected", later & ~before & met.correct, rise),
        ("deferred and broken", later & before & ~met.correct, rise),
    ]
    shown = max(1, min(SHOWN, ALL // (len(kinds) * len(policy.on))))
    picks = []
    for k in policy.on:
        for kind, wanted, score in kinds:
            found = (wanted & (met.exits == k)).nonzero()[:, 0]
            order = score[found].argsort(descending=True, stable=True)[:shown]
            if len(found):
                picks.append(Pick(k, kind, len(found), found[order].tolist()))
    return picks


def galleries(
    images: Split | Stream, indices: Tensor, tables: ExitTables, policy: Policy, class_names: Sequence[str]
) -> list[Gallery]:
    """The galleries of what a policy does with the images of tables, which must be read as it reads.

    `indices` [N] say which of the test images each one is. Only images that are shown are read. A stream
    has none to read again, which the only gallery then says.
    """
    if isinstance(images, Stream):
        return [Gallery("No images", "The test images are a stream: none can be read again to show it.", [])]
    first, found = policy.on[0], []
    for one in pick(tables, policy):
        pictures = []
        for column in one.columns:
            index = int(indices[column])
            lines = [f"class {class_names[tables.targets[column]]}"]
            for k in sorted({first, one.exit}):
                answer, confidence = class_names[tables.answers[k, column]], tables.confidence[k, column]
                lines.append(f"exit {k}: {answer}, {confidence:.5g}")
            lines.append(f"image {index}")
            pictures.append(Picture(data_uri(images.read(index)[0]), lines[0], "\n".join(lines)))
        found.append(Gallery(f"Exit {one.exit}: {one.kind}", _note(one, first, len(tables)), pictures))
    return found


def _note(one: Pick, first: int, total: int) -> str:
    """How many images there are, and where some are left out, which are shown."""
    many = f"{one.total:,} of {total:,} images"
    if one.kind.startswith("sure"):
        what = f"{many} leave here with a {one.kind.rpartition(' ')[2]} answer"
        which = "the most confident are shown"
    else:
        was, then = ("wrong", "right") if one.kind.endswith("corrected") else ("right", "wrong")
        what = f"{many}: exit {first} is {was}, this one {then}"
        which = "those whose confidence rises most are shown"
    return f"{what}; {which}." if one.total > len(one.columns) else f"{what}."


def data_uri(image: Image.Image) -> str:
    """An RGB image as a URI that holds it: a PNG of its own pixels, or of a large one a small JPEG."""
    file = io.BytesIO()
    if max(image.size) <= EXACT:
        kind = "png"
        image.save(file, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image = image.copy()
        image.thumbnail((SIDE, SIDE))
        image.save(file, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
