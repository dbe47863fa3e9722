"""COCO's measures of what is found."""

import pytest
import torch

from detection.data import CocoImages
from detection.measure import precision


def test_what_is_drawn_is_found_perfectly_and_nothing_scores_zero(shapes):
    data = CocoImages(shapes, "val", masks=True)
    perfect = {}
    for _, target in (data[i] for i in range(len(data))):
        scores = torch.ones(len(target["labels"]))
        found = {"boxes": target["boxes"], "labels": target["labels"], "scores": scores}
        perfect[int(target["image_id"])] = found | {"masks": target["masks"][:, None].float()}
    figures = precision(data, perfect)
    assert figures["AP"] == pytest.approx(1) and figures["mask_AP50"] == pytest.approx(1)
    assert list(figures) == ["AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"]
    assert set(precision(data, {}).values()) == {0.0}
    assert list(precision(CocoImages(shapes, "val"), perfect)) == ["AP", "AP50", "AP75"]
    again = data[0][1]["masks"]  # measuring leaves the data as they were
    assert torch.equal(again, perfect[1]["masks"][:, 0].to(torch.uint8))
