"""Training detectors on data in COCO's format (https://cocodataset.org/#format-data), and COCO's measures."""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from models.detection import create_detector
from training.checkpoint import load_weights
from utils import Meters, Progress

MEASURES = ("AP", "AP50", "AP75")
BUILD = (
    "freeze_norm",
    "min_size",
    "max_size",
    "smallest_anchor",
    "proposals",
    "sampled",
)  # options of a detector


def detector_of(content: dict[str, Any], source: str | Path) -> nn.Module:
    """The detector in a checkpoint of scripts/main_detection.py; ValueError if `content` is of something
    else."""
    if not {"model_name", "args", "categories", "model"} <= content.keys():
        raise ValueError(f"checkpoint {source} holds no detector of scripts/main_detection.py")
    options = {name: content["args"][name] for name in BUILD}
    detector = create_detector(content["model_name"], len(content["categories"]) + 1, **options)
    load_weights(detector, content["model"], f"checkpoint {source}")
    return detector


class CocoImages(Dataset):
    """The images of one split and their objects: [i] -> (image [3, H, W] in 0..1, target as torchvision takes
    it).

    Reads `path`/annotations/instances_{split}.json and the images in `path`/{split}. Labels count the
    categories from 1, by their number in the file. Objects that are crowds or have no extent are left out;
    the measures know crowds. With `flip`, half of the images, drawn anew each time, are mirrored.
    """

    def __init__(self, path: str | Path, split: str, *, masks: bool = False, flip: bool = False) -> None:
        self.path, self.images = Path(path) / "annotations" / f"instances_{split}.json", Path(path) / split
        self.masks, self.flip = masks, flip
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.records = sorted(content["images"], key=lambda record: record["id"])
            self.categories = sorted([entry["id"], entry["name"]] for entry in content["categories"])
            objects = content["annotations"]
            self.objects = defaultdict(list)
            known = {number for number, _ in self.categories}
            for entry in objects:
                if (
                    entry["category_id"] not in known
                    or len(entry["bbox"]) != 4
                    or (masks and not entry["segmentation"])
                ):
                    raise ValueError(
                        f"{self.path}: object {entry['id']} has no known category, box or segmentation"
                    )
                if not entry.get("iscrowd") and min(entry["bbox"][2:]) > 0:
                    self.objects[entry["image_id"]].append(entry)
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror}") from error
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is not in COCO's format: {error!r}") from error
        if not self.records or not self.objects:
            raise ValueError(f"{self.path} has {len(self.records)} images and {len(objects)} objects")
        self.labels = {number: label for label, (number, _) in enumerate(self.categories, 1)}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.records[index]
        try:
            with Image.open(self.images / record["file_name"]) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"cannot read image {self.images / record['file_name']}: {error}") from error
        found = self.objects[record["id"]]
        boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.labels[entry["category_id"]] for entry in found], dtype=torch.int64),
            "image_id": torch.tensor(record["id"]),
        }
        if self.masks:
            drawn = [mask_of(entry["segmentation"], *image.size) for entry in found]
            target["masks"] = (
                torch.stack(drawn) if drawn else torch.zeros(0, *image.size[::-1], dtype=torch.uint8)
            )
        pixels = pil_to_tensor(image).float() / 255
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
            target["boxes"] = torch.stack(
                [image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1
            )
            if self.masks:
                target["masks"] = target["masks"].flip(2)
        return pixels, target


def mask_of(segmentation: list | dict, width: int, height: int) -> Tensor:
    """An object's mask [height, width], uint8, from polygons or from COCO's run lengths."""
    if isinstance(segmentation, dict):
        from pycocotools import mask

        counts = segmentation["counts"]
        packed = mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        return torch.from_numpy(mask.decode(packed))
    canvas = Image.new("1", (width, height))
    for polygon in segmentation:
        ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return torch.from_numpy(np.asarray(canvas, np.uint8))


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of any size, and their targets, as two lists."""
    return tuple(map(list, zip(*samples, strict=True)))


def train_epoch(
    detector: nn.Module, loader: Iterable[Any], update: Any, device: torch.device, epoch: int
) -> dict[str, float]:
    """Trains once through the loader; the means of `loss` and of its parts. Raises ValueError if it is not
    finite."""
    detector.train()
    meters, progress = Meters(), Progress(loader, f"epoch {epoch}", len(loader), shown=True)
    for images, targets in progress:
        images = [image.to(device) for image in images]
        losses = detector(
            images, [{key: value.to(device) for key, value in target.items()} for target in targets]
        )
        loss = sum(losses.values())
        if not loss.isfinite():
            raise ValueError(f"the loss is not finite in epoch {epoch}; lower --lr or give --clip_grad 10")
        update(loss)
        for name, value in {"loss": loss, **losses}.items():
            meters.add(name, value.detach(), 1)
        progress.note(meters.means())
    return meters.means()


@torch.no_grad()
def detect(detector: nn.Module, loader: Iterable[Any], device: torch.device) -> dict[int, dict[str, Tensor]]:
    """What the detector finds (boxes, labels, scores, masks) in every image, by image id, on the CPU."""
    detector.eval()
    found = {}
    for images, targets in Progress(loader, "evaluate", len(loader), shown=True):
        for target, output in zip(targets, detector([image.to(device) for image in images]), strict=True):
            found[int(target["image_id"])] = {key: value.cpu() for key, value in output.items()}
    return found


def precision(data: CocoImages, found: dict[int, dict[str, Tensor]]) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of the boxes, and of the masks (`mask_AP` ...) if there are any; 0 where
    nothing is found. Raises ImportError without pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [entry for number, output in found.items() for entry in _entries(data, number, output)]
    kinds = {"": "bbox", **({"mask_": "segm"} if data.masks else {})}
    if not results:
        return {prefix + name: 0.0 for prefix in kinds for name in MEASURES}
    figures = {}
    with contextlib.redirect_stdout(io.StringIO()):  # these classes print as they go
        truth = COCO(data.path)
        for prefix, kind in kinds.items():
            other = (
                "bbox" if kind == "segm" else "segmentation"
            )  # pycocotools would take the box for the mask
            given = [{key: value for key, value in entry.items() if key != other} for entry in results]
            judge = COCOeval(truth, truth.loadRes(given), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            figures |= {
                prefix + name: float(value) for name, value in zip(MEASURES, judge.stats, strict=False)
            }
    return figures


def _entries(data: CocoImages, number: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One image's detections in COCO's format of results."""
    boxes = output["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    entries = [
        {"image_id": number, "category_id": data.categories[label - 1][0], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True
        )
    ]
    if data.masks:
        from pycocotools import mask

        for entry, shape in zip(entries, output["masks"][:, 0] > 0.5, strict=True):
            packed = mask.encode(np.asfortranarray(shape.numpy().astype(np.uint8)))
            entry["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
    return entries
