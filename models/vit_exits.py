"""Exits on timm's vision transformers, self-supervised ones (DINOv2, DINOv3) among them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbones import check_timm_name, stochastic_depth
from models.bases import Spans
from models.errors import UserError
from models.layers import VectorHead
from models.registry import register


class VitExits(Spans):
    """Exits after blocks of timm's `VisionTransformer` or `Eva`, such as vit_*, deit_*, *_dinov2, *_dinov3.

    An exit reads the class token beside the mean of the patches' tokens, both after the network's last norm:
    [B, 2 * width], which is small enough to be kept for all images; [B, width] where there is no class token.
    Weights of the backbone have timm's names with "backbone." before them, as `--finetune FILE
    --model_prefix backbone.` expects.

    Args:
        backbone: timm's name of the model.
        exits: how many exits, evenly spaced over the blocks; the last one is after the last block.
        head_width: channels that an exit classifies by.
        img_size: pixels at the side of the images; by default any, with positions interpolated in each pass.
        pretrained: start from timm's published weights (needs network access).
        drop_rate: dropout before each exit's last linear layer.
        drop_path_rate: stochastic depth of the backbone.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        backbone: str = "vit_small_patch16_224",
        exits: int = 4,
        head_width: int = 512,
        img_size: int | None = None,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_timm_name(backbone)
        size = {"img_size": img_size} if img_size else {"dynamic_img_size": True}
        self.backbone = _transformer(backbone, pretrained, size | stochastic_depth(drop_path_rate))
        blocks = len(self.backbone.blocks)
        if not 1 <= exits <= blocks:
            raise UserError(f"exits is {exits}; {backbone} has {blocks} blocks, so accepted: 1 to {blocks}")
        self.num_exits = exits
        self.ends = [blocks * (k + 1) // exits for k in range(exits)]
        # Networks that pool by the mean have their last norm after it.
        averages = isinstance(self.backbone.norm, nn.Identity)
        self.norm_name = "fc_norm" if averages else "norm"
        self.has_class_token = self.backbone.cls_token is not None
        width = self.backbone.embed_dim * (1 + self.has_class_token)
        self.add_exits([width] * exits, head_width, num_classes, drop_rate, VectorHead)

    def span(self, k: int, *values: Tensor) -> Sequence[Tensor]:
        """Features [B, 2 * C] of exit k; then, for later spans, tokens [B, N, C] and rotary positions."""
        tokens, *rotary = values if k else self._embedded(*values)
        start = self.ends[k - 1] if k else 0
        for block in self.backbone.blocks[start : self.ends[k]]:
            tokens = block(tokens, *rotary)
        features = self.pooled(self.normed(tokens))
        return [features, tokens, *rotary] if k + 1 < self.num_exits else [features]

    def _embedded(self, images: Tensor) -> Sequence[Tensor]:
        """Tokens [B, N, C] and, of `Eva`, rotary positions [B, 1, patches, D]."""
        net = self.backbone
        tokens = net._pos_embed(net.patch_embed(images))
        rotary = []
        if isinstance(tokens, tuple):
            tokens, positions = tokens
            rotary = [] if positions is None else [positions.expand(len(tokens), 1, *positions.shape)]
        return [net.norm_pre(tokens), *rotary]

    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] after the network's last norm."""
        return getattr(self.backbone, self.norm_name)(tokens)

    def pooled(self, tokens: Tensor) -> Tensor:
        """The class token, if there is one, beside the mean of the patches: [B, N, C] to [B, 2 * C]."""
        mean = tokens[:, self.backbone.num_prefix_tokens :].mean(1)
        return torch.cat([tokens[:, 0], mean], 1) if self.has_class_token else mean


def _transformer(name: str, pretrained: bool, options: dict) -> nn.Module:
    """timm's network without its head. Raises ValueError for other architectures."""
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    accepted = "a VisionTransformer or Eva of timm, such as vit_small_patch16_224"
    if not issubclass(_class_of(name), (VisionTransformer, Eva)):
        raise UserError(f"backbone is {name!r}; accepted: {accepted}")
    network = timm.create_model(name, num_classes=0, pretrained=pretrained, **options)
    if getattr(network, "rope_mixed", False):
        raise UserError(f"backbone is {name!r}, whose rotary positions differ by block; accepted: {accepted}")
    return network


def _class_of(name: str) -> type:
    """The class of timm's network, which is built without memory."""
    import timm

    with torch.device("meta"):
        return type(timm.create_model(name))


register(VitExits, "vit_ee", "exits on timm's vision transformers, DINOv2 and DINOv3 too")
