"""Trains a detector on drawn shapes for a few minutes and shows what it finds on shapes that it has not seen.

    python scripts/bench_detection.py runs/shapes [--model faster_rcnn_rexnet_090] [--epochs 4] [--count 480]

Draws circles, squares and triangles with polygons around them, in COCO's format; trains from random weights
through scripts/main_detection.py; prints the average precision on held-out drawings and writes
predictions.png: three of them with the boxes that score above 0.5.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.detection import create_detector
from training.checkpoint import LAST, load
from training.detection import CocoImages
from utils import describe_machine, run_main

SIDE, SCALE = 128, 3  # pixels of a drawing, and how much larger the picture shows it
CORNERS = {"circle": 24, "square": 4, "triangle": 3}


def draw_shapes(folder, split, count, seed):
    """Writes `count` pictures of one to three shapes each, and their annotations, as a split in COCO's
    layout."""
    rng, images, objects = np.random.default_rng(seed), [], []
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number in range(1, count + 1):
        picture = Image.fromarray(rng.integers(60, 110, (SIDE, SIDE, 3), dtype=np.uint8))
        taken = []
        for _ in range(rng.integers(1, 4)):
            radius = rng.uniform(12, 26)
            centre = rng.uniform(radius + 1, SIDE - radius - 1, 2)
            if any(np.hypot(*(centre - other)) < radius + size for other, size in taken):
                continue  # shapes do not overlap
            taken.append((centre, radius))
            category = int(rng.integers(len(CORNERS)))
            corners = list(CORNERS.values())[category]
            angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
            points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)  # (corners, 2)
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            ImageDraw.Draw(picture).polygon([tuple(point) for point in points], fill=colour)
            low, size = points.min(0), np.ptp(points, 0)
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": [*low.tolist(), *size.tolist()],
                    "area": float(size.prod()),
                    "iscrowd": 0,
                    "segmentation": [points.flatten().tolist()],
                }
            )
        picture.save(folder / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
    categories = [{"id": i, "name": name} for i, name in enumerate(CORNERS, 1)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@torch.no_grad()
def picture_of(detector, data, count=3):
    """The first images of a split side by side, with what the detector finds in them."""
    names, shown = [name for _, name in data.categories], []
    for i in range(count):
        image, _ = data[i]
        (found,) = detector([image])
        sure = found["scores"] > 0.5
        boxes, scores = SCALE * found["boxes"][sure], found["scores"][sure].tolist()
        labels = [names[label - 1] for label in found["labels"][sure].tolist()]
        texts = [f"{label} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        large = resize(image, [SCALE * SIDE, SCALE * SIDE], antialias=True)
        shown.append(draw_bounding_boxes(large, boxes, texts, colors="yellow", width=2))
    return to_pil_image(torch.cat(shown, 2))


def main(argv):
    """Draws, trains, evaluates and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--model", default="faster_rcnn_rexnet_090")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--count", type=int, default=480, help="training images")
    args = parser.parse_args(argv)

    data = args.output_dir / "data"
    draw_shapes(data, "train", args.count, seed=0)
    draw_shapes(data, "val", 100, seed=1)
    build = {"min_size": SIDE, "max_size": SIDE, "smallest_anchor": 8, "proposals": 50, "sampled": 32}
    flags = build | {"epochs": args.epochs, "decay_epochs": args.epochs - 1, "batch_size": 4, "lr": 0.01}
    flags |= {
        "warmup_steps": 60,
        "clip_grad": 10,
        "num_workers": 1,
        "train_split": "train",
        "val_split": "val",
    }
    flags |= {"model": args.model, "data_path": data, "output_dir": args.output_dir}
    start = time.monotonic()
    program = [sys.executable, str(Path(__file__).with_name("main_detection.py"))]
    subprocess.run(
        [*program, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))], check=True
    )
    seconds = time.monotonic() - start
    figures = json.loads((args.output_dir / "log.txt").read_text().splitlines()[-1])
    print(
        f"{describe_machine(torch.device('cpu'))}\n{args.model}, {args.count} drawings, {args.epochs} epochs"
    )
    print(
        "  ".join(f"{name} {figures[name]:.3f}" for name in figures if "AP" in name) + f"  in {seconds:.0f} s"
    )

    detector = create_detector(args.model, len(CORNERS) + 1, **build).eval()
    detector.load_state_dict(load(args.output_dir / LAST)["model"])
    picture_of(detector, CocoImages(data, "val")).save(args.output_dir / "predictions.png")
    print(f"wrote {args.output_dir / 'predictions.png'}")


if __name__ == "__main__":
    run_main(main)
