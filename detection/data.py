"""Data in COCO's format (https://cocodataset.org/#format-data), read by torchvision and pycocotools."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.functional import to_tensor

from loading.pixels import UNREADABLE, read_image
from utils import UserError

Target = dict[str, Tensor]


class CocoImages(CocoDetection):
    """The images of one split and their objects: [i] -> (image [3, H, W] in 0..1, target).

    A target has boxes [N, 4] as x1 y1 x2 y2 in pixels, labels [N], image_id and, with `masks`, masks
    [N, H, W], uint8. Reads `path`/annotations/instances_{split}.json and the images in `path`/{split}. Labels
    count the categories from 1, by their number in the file. Objects that are crowds or have no extent are
    left out; COCO's metrics account for crowds. With `flip`, half of the images, drawn anew each time, are
    mirrored. Raises ValueError, in one line, for files that cannot be read or are in another format.
    """

    def __init__(self, path: str | Path, split: str, *, masks: bool = False, flip: bool = False) -> None:
        self.path = Path(path) / "annotations" / f"instances_{split}.json"
        self.masks = masks
        try:
            with redirect_stdout(StringIO()):  # pycocotools prints its progress
                super().__init__(Path(path) / split, str(self.path))
            content = self.coco.dataset
            self.categories = sorted([entry["id"], entry["name"]] for entry in content["categories"])
            self.labels = {number: label for label, (number, _) in enumerate(self.categories, 1)}
            self._check(content)
        except ImportError as error:
            raise UserError("data in COCO's format needs a package: pip install pycocotools") from error
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{self.path} is not in COCO's format: {error!r}") from error
        self.mirror = v2.Compose([v2.RandomHorizontalFlip(0.5 * flip), v2.ToPureTensor()])

    def _check(self, content: dict[str, Any]) -> None:
        """Raises ValueError or KeyError where an entry lacks what is read later, or none is left."""
        images, objects = content["images"], content["annotations"]
        for entry in objects:
            whole = entry["category_id"] in self.labels and len(entry["bbox"]) == 4
            if not whole or (self.masks and not entry["segmentation"]):
                raise UserError(
                    f"{self.path}: object {entry['id']} has no known category, box or segmentation"
                )
        if not images or not any(map(_learned, objects)):
            raise UserError(f"{self.path} has {len(images)} images and {len(objects)} objects")

    def _load_image(self, id: int) -> Image.Image:
        path = Path(self.root, self.coco.imgs[id]["file_name"])
        try:
            return read_image(str(path))
        except UNREADABLE as error:
            raise UserError(f"cannot read image {path}: {error}") from error

    def _load_target(self, id: int) -> list[dict[str, Any]]:
        return list(filter(_learned, super()._load_target(id)))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, objects = super().__getitem__(index)
        size = (image.height, image.width)
        labels = [self.labels[entry["category_id"]] for entry in objects]
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        target = {
            # pyrefly: ignore[unexpected-keyword]
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": torch.tensor(self.ids[index]),
        }
        if self.masks:
            masks = np.array([self.coco.annToMask(entry) for entry in objects], np.uint8)
            target["masks"] = tv_tensors.Mask(masks.reshape(-1, *size))
        return self.mirror(tv_tensors.Image(to_tensor(image)), target)


def _learned(entry: dict[str, Any]) -> bool:
    """False for crowds and for boxes without extent."""
    return not entry.get("iscrowd") and min(entry["bbox"][2:]) > 0


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images of any size, and their targets, as two lists."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
