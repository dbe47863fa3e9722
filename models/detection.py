"""Faster R-CNN and Mask R-CNN with a feature pyramid on ReXNet, built from torchvision's detection stack.

https://arxiv.org/abs/1506.01497, https://arxiv.org/abs/1703.06870, https://arxiv.org/abs/1612.03144; the
pyramid reads ReXNetV1's maps behind blocks 2, 4, 10 and 15, at strides 4, 8, 16 and 32. The detectors of the
ReXNet paper were not released; its table of results names no more than their backbones.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.registry import create_model, nearest

LEVELS = {
    5: 38,
    7: 61,
    13: 128,
    18: 185,
}  # number in ReXNetV1.features of each map, and its channels at width 1
WIDTHS = ("090", "100", "130", "150", "200", "220", "300")
KINDS = ("faster_rcnn", "mask_rcnn")
PYRAMID, PROPOSALS = 256, 1000


def list_detectors() -> list[str]:
    """All names, sorted."""
    return sorted(f"{kind}_rexnet_{width}" for kind in KINDS for width in WIDTHS)


def create_detector(
    name: str,
    num_classes: int = 91,
    *,
    backbone_weights: dict[str, Tensor] | None = None,
    freeze_norm: bool = False,
    min_size: int = 800,
    max_size: int = 1333,
    smallest_anchor: int = 32,
    proposals: int = PROPOSALS,
    sampled: int = 512,
) -> nn.Module:
    """A detector under torchvision's protocol; `num_classes` includes the background, which is class 0.

    In training it maps a list of images [3, H, W] (pixels in 0..1) and a list of dicts (boxes [N, 4] as x1 y1
    x2 y2 in pixels, labels [N], for Mask R-CNN masks [N, H, W]) to a dict of losses, in evaluation the images
    to a list of dicts with boxes, labels, scores and masks [N, 1, H, W].

    Args:
        backbone_weights: a ReXNetV1 classifier's state dict, whose features are taken.
        freeze_norm: the backbone's batch norms keep their weights and statistics, for batches too small to
            renew them.
        min_size, max_size: images are resized until the short side has `min_size` or the long one `max_size`
            pixels.
        smallest_anchor: side of the finest level's anchors in pixels; each coarser level's are twice as
            large.
        proposals: boxes that are classified per image in evaluation; in training twice as many are proposed.
        sampled: of these, boxes per image that training classifies.

    Raises ValueError for an unknown name, or weights that do not fit.
    """
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    if name not in list_detectors():
        raise ValueError(f"unknown detector {name!r}; {nearest(name, list_detectors())}")
    kind, _, width = name.rpartition("_rexnet_")
    classifier = create_model(f"rexnetv1_{width}")
    if backbone_weights is not None:
        _load_features(classifier, backbone_weights)
    features = classifier.features[: max(LEVELS) + 1]
    channels = [features[i].out[-2].out_channels for i in LEVELS]
    if freeze_norm:
        from timm.layers import freeze_batch_norm_2d

        features = freeze_batch_norm_2d(features)
    backbone = BackboneWithFPN(features, {str(i): str(n) for n, i in enumerate(LEVELS)}, channels, PYRAMID)
    sizes = tuple(
        (smallest_anchor * 2**level,) for level in range(len(LEVELS) + 1)
    )  # one more: the last map, pooled
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    network = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[kind]
    return network(
        backbone,
        num_classes,
        min_size,
        max_size,
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_train=2 * proposals,
        rpn_post_nms_top_n_test=proposals,
        box_batch_size_per_image=sampled,
    )


def _load_features(classifier: nn.Module, weights: dict[str, Tensor]) -> None:
    own = {key: value for key, value in classifier.state_dict().items() if key.startswith("features.")}
    wrong = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"these are not the backbone's weights: {len(wrong)} of {len(own)} do not fit, say {wrong[0]}"
        )
    classifier.load_state_dict({key: weights[key] for key in own}, strict=False)


class DetectorCosts(NamedTuple):
    """Multiply-adds of a detector's parts on one image, and its parameters."""

    params: int
    backbone: int
    pyramid: int
    proposals: int  # the network that proposes boxes
    boxes: int  # classifying and refining PROPOSALS of them
    masks: int  # of the detections, at most 100; 0 where there are none

    @property
    def total(self) -> int:
        """All parts."""
        return self.backbone + self.pyramid + self.proposals + self.boxes + self.masks


@torch.no_grad()
def detector_costs(detector: nn.Module, height: int, width: int) -> DetectorCosts:
    """Costs of a detector that was built on the meta device, for an image of this size as the backbone reads
    it."""

    def macs(part: nn.Module, *inputs: object) -> tuple[int, object]:
        with FlopCounterMode(display=False) as counter:
            out = part(*inputs)
        return counter.get_total_flops() // 2, out

    detector.eval().requires_grad_(False)
    image = torch.empty(1, 3, height, width, device="meta")
    backbone, maps = macs(detector.backbone.body, image)
    pyramid, levels = macs(detector.backbone.fpn, maps)
    proposals, _ = macs(detector.rpn.head, list(levels.values()))
    heads = detector.roi_heads
    box, vectors = macs(heads.box_head, torch.empty(PROPOSALS, PYRAMID, 7, 7, device="meta"))
    masks = 0
    if heads.has_mask():
        regions = torch.empty(heads.detections_per_img, PYRAMID, 14, 14, device="meta")
        first, regions = macs(heads.mask_head, regions)
        masks = first + macs(heads.mask_predictor, regions)[0]
    params = sum(p.numel() for p in detector.parameters())
    return DetectorCosts(
        params, backbone, pyramid, proposals, box + macs(heads.box_predictor, vectors)[0], masks
    )
