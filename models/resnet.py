"""ResNet (https://arxiv.org/abs/1512.03385, with the stride on the 3x3) in several widths, as a core.

Weights are named as timm's; networks of the usual widths give the same answers.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone, register_core
from models.layers import conv_norm, drop_path, init_he_out, rising


class ResNetBlock(nn.Sequential):
    """Convolutions of (kernel, width, stride) with batch norm, ReLU between, added to the shortcut."""

    def __init__(self, n_in: int, convs: list[tuple[int, int, int]], drop: float) -> None:
        super().__init__()
        channels = n_in
        for i, (kernel, width, stride) in enumerate(convs, 1):
            act = nn.ReLU if i < len(convs) else None
            unit = conv_norm(channels, width, kernel, stride=stride, act=act)
            for name, layer in zip(("conv", "bn", "act"), unit, strict=False):
                self.add_module(f"{name}{i}", layer)
            channels = width
        self.drop_path = drop_path(drop)
        stride = max(stride for _, _, stride in convs)
        changes = stride > 1 or n_in != channels
        self.downsample = conv_norm(n_in, channels, stride=stride) if changes else nn.Identity()
        init_he_out(self)
        nn.init.zeros_(self.get_submodule(f"bn{len(convs)}").weight)  # every block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, width, H / stride, W / stride]."""
        *main, downsample = self.children()
        y = x
        for layer in main:
            y = layer(y)
        return F.relu(y + downsample(x), inplace=True)


def resnet(
    drop_path: float | None,
    dropout: float | None,
    *,
    depths: Sequence[int],
    width_mult: float = 1.0,
    bottleneck: bool,
) -> Backbone:
    """ResNet of these blocks per stage, its widths times `width_mult`.

    Published with drop path and dropout of 0.2.
    """
    width = int(64 * width_mult)
    stem = conv_norm(3, width, 7, stride=2, act=nn.ReLU)
    stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    init_he_out(stem)
    rates = iter(rising(0.2 if drop_path is None else drop_path, sum(depths)))
    stages = []
    widths = [width]
    for i, depth in enumerate(depths):
        planes = int(64 * 2**i * width_mult)
        out = int(256 * 2**i * width_mult) if bottleneck else planes
        stage = nn.Sequential()
        for j in range(depth):
            stride = 2 if i and not j else 1
            convs = [(3, planes, stride), (3, out, 1)]
            if bottleneck:
                convs = [(1, planes, 1), (3, planes, stride), (1, out, 1)]
            stage.append(ResNetBlock(out if j else widths[-1], convs, next(rates)))
        stages.append(stage)
        widths.append(out)
    names = ["conv1", "bn1", "act1", "maxpool", *(f"layer{i}" for i in range(1, len(stages) + 1))]
    return Backbone(
        stem,
        stages,
        widths=tuple(widths),
        strides=(4, 4, 8, 16),
        plain=list(zip(names, [*stem, *stages], strict=True)),
        classifier_name="fc",
        classifier_before="dwc1_x2z",
        dropout=0.2 if dropout is None else dropout,
    )


register_core("resnet18", partial(resnet, depths=(2, 2, 2, 2), bottleneck=False))
register_core("resnet34", partial(resnet, depths=(3, 4, 6, 3), bottleneck=False))
for _suffix, _width in (("", 1.0), ("_0375", 0.375), ("_050", 0.5), ("_0625", 0.625), ("_075", 0.75)):
    _build = partial(resnet, depths=(3, 4, 6, 3), bottleneck=True, width_mult=_width)
    register_core(f"resnet50{_suffix}", _build)
