"""Detectors: their maps, sizes and costs, and one training step."""

from dataclasses import replace

import pytest
import torch

from detection.detectors import create_detector, detector_costs, list_detectors
from models import create_model

# Parameters in millions and G multiply-adds as published, for 81 classes; the costs are those of 800 x 1280
# pixels without the mask head, although the table says 1200 x 800.
PUBLISHED = {
    "faster_rcnn_rexnet_090": (20.1, 123.0),
    "faster_rcnn_rexnet_100": (20.7, 124.1),
    "faster_rcnn_rexnet_220": (33.0, 153.8),
    "mask_rcnn_rexnet_090": (22.8, 123.0),
    "mask_rcnn_rexnet_100": (23.3, 124.1),
    "mask_rcnn_rexnet_220": (35.6, 153.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_costs_are_the_published_ones(name):
    with torch.device("meta"):
        detector = create_detector(name, 81)
    costs, (params, total) = detector_costs(detector, 800, 1280), PUBLISHED[name]
    assert costs.params / 1e6 == pytest.approx(params, abs=0.07)
    assert (costs.total - costs.masks) / 1e9 == pytest.approx(total, abs=0.15)
    assert (costs.masks > 0) == name.startswith("mask")


@torch.no_grad()
def test_the_pyramid_reads_a_map_of_every_stride(tiny):
    detector = create_detector("faster_rcnn_rexnet_100", 4, tiny).eval()
    maps = detector.backbone.body(torch.randn(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps.values()] == [(38, 16, 16), (61, 8, 8), (128, 4, 4), (185, 2, 2)]
    assert len(detector.rpn.anchor_generator.sizes) == len(detector.backbone(torch.randn(1, 3, 64, 64))) == 5


def test_a_training_step_of_masks_reaches_the_backbone(tiny):
    torch.manual_seed(0)
    detector = create_detector("mask_rcnn_rexnet_090", 4, tiny).train()
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:48, 8:40] = 1
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]}
    losses = detector(
        [torch.rand(3, 64, 64), torch.rand(3, 64, 64)],
        [{"boxes": boxes, "labels": torch.tensor([2]), "masks": masks}, empty],
    )
    assert "loss_mask" in losses and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert detector.backbone.body["0"].weight.grad.abs().sum() > 0


def test_published_classifiers_are_the_backbone(tiny):
    weights = create_model("rexnetv1_090").state_dict()
    body = create_detector("faster_rcnn_rexnet_090", 4, tiny, weights).backbone.body.state_dict()
    assert body and all(torch.equal(value, weights["features." + key]) for key, value in body.items())
    with pytest.raises(ValueError, match="not the backbone's weights: .* do not fit, say features.0"):
        create_detector("faster_rcnn_rexnet_200", 4, backbone_weights=weights)


def test_frozen_batch_norms_stay_in_training(tiny):
    detector = create_detector("faster_rcnn_rexnet_090", 4, replace(tiny, freeze_norm=True)).train()
    before = {key: value.clone() for key, value in detector.backbone.body.state_dict().items()}
    detector.backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in detector.backbone.body.state_dict().items())
    assert not any(
        name == "1.weight" or name.endswith(".bn.weight")
        for name, _ in detector.backbone.body.named_parameters()
    )


def test_an_unknown_detector_is_named_with_close_ones():
    assert len(list_detectors()) == 14
    with pytest.raises(ValueError, match="unknown detector 'faster_rcnn_rexnet_1'; did you mean"):
        create_detector("faster_rcnn_rexnet_1")
