"""Trains a detector on drawn shapes for a few minutes and shows what it finds on shapes that it has not seen.

    python scripts/bench_detection.py runs/shapes [--model faster_rcnn_rexnet_090] [--epochs 4] [--count 480]

Draws circles, squares and triangles with polygons around them, in COCO's format; trains from random weights
as scripts/main_detection.py does; prints the average precision on held-out drawings and writes
predictions.png: three of them with the boxes that score above 0.5.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import read_flags, timed, word

import torch
from PIL import Image
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

from detection.shapes import SIDE, draw_shapes
from detection.train import Detection, Job, fit
from experiment.record import describe_machine
from utils import option, run_main

SCALE = 3  # how much larger than the drawings the picture shows them


@dataclass(frozen=True)
class Flags:
    """What is trained."""

    output_dir: Path = word("where the data, the run and the picture go")
    model: str = option("faster_rcnn_rexnet_090", "detector")
    epochs: int = option(4, low=1)
    count: int = option(480, "training images", low=4)
    held_out: int = option(100, "images to evaluate on", low=3)


@torch.no_grad()
def picture_of(job: Job, count: int = 3) -> Image.Image:
    """The first held-out images side by side, with what the detector finds in them."""
    names = [name for _, name in job.held_out.categories]
    shown = []
    for i in range(count):
        image, _ = job.held_out[i]
        (found,) = job.detector.eval()([image.to(job.device)])
        sure = found["scores"] > 0.5
        labels = found["labels"][sure].tolist()
        scores = found["scores"][sure].tolist()
        texts = [f"{names[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        large = resize(image, [SCALE * SIDE, SCALE * SIDE], antialias=True)
        boxes = SCALE * found["boxes"][sure].cpu()
        shown.append(draw_bounding_boxes(large, boxes, texts, colors="yellow", width=2))
    return to_pil_image(torch.cat(shown, 2))


def main(argv: list[str]) -> None:
    """Draws, trains, evaluates and prints a table."""
    flags = read_flags(Flags, argv, __doc__)
    data = flags.output_dir / "data"
    draw_shapes(data, "train", flags.count, seed=0)
    draw_shapes(data, "val", flags.held_out, seed=1)
    detection = Detection(
        model=flags.model,
        data_path=str(data),
        output_dir=str(flags.output_dir),
        train_split="train",
        val_split="val",
        min_size=SIDE,
        max_size=SIDE,
        smallest_anchor=8,
        proposals=50,
        sampled=32,
        epochs=flags.epochs,
        decay_epochs=(flags.epochs - 1,),
        batch_size=4,
        lr=0.01,
        warmup_steps=60,
        clip_grad=10,
        num_workers=1,
    )
    job, seconds = timed(partial(fit, detection))
    figures = json.loads((flags.output_dir / "log.txt").read_text(encoding="utf-8").splitlines()[-1])
    print(describe_machine(job.device))
    print(f"{flags.model}, {flags.count} drawings, {flags.epochs} epochs")
    shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items() if "AP" in name)
    print(f"{shown}  in {seconds:.0f} s")
    path = flags.output_dir / "predictions.png"
    picture_of(job).save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
