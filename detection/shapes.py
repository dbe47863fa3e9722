"""Drawn shapes as data in COCO's format, for trials without a download."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils import writing

SIDE = 128  # pixels of a drawing
CORNERS = {"circle": 24, "square": 4, "triangle": 3}


def draw_shapes(folder: Path, split: str, count: int, seed: int) -> None:
    """Writes `count` pictures of one to three shapes, and their annotations, as a split in COCO's layout.

    Each shape is a polygon; they do not overlap.
    """
    rng = np.random.default_rng(seed)
    objects: list[dict] = []
    with writing(folder):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / "annotations").mkdir(exist_ok=True)
    numbers = range(1, count + 1)
    for number in numbers:
        picture = Image.fromarray(rng.integers(60, 110, (SIDE, SIDE, 3), dtype=np.uint8))
        for category, points in _shapes(rng):
            colour = tuple(rng.integers(0, 256, 3).tolist())
            ImageDraw.Draw(picture).polygon(list(map(tuple, points)), fill=colour)
            size = np.ptp(points, 0)
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [*points.min(0).tolist(), *size.tolist()],
                    "area": float(size.prod()),
                    "iscrowd": 0,
                    "segmentation": [points.flatten().tolist()],
                }
            )
        picture.save(folder / split / f"{number}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in numbers]
    categories = [{"id": i, "name": name} for i, name in enumerate(CORNERS, 1)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _shapes(rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """One picture's shapes: category from 1, and corners [N, 2] in pixels."""
    taken: list[tuple[np.ndarray, float]] = []
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(12, 26)
        centre = rng.uniform(radius + 1, SIDE - radius - 1, 2)
        if any(np.hypot(*(centre - other)) < radius + size for other, size in taken):
            continue
        taken.append((centre, radius))
        category = int(rng.integers(len(CORNERS)))
        corners = list(CORNERS.values())[category]
        angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        yield category + 1, centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
