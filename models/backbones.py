"""Plain CNNs, each cut into a stem and four stages: RegNetY, ResNet and MobileNetV3, the latter two in
several widths.

Weights are named as torchvision's RegNet (https://arxiv.org/abs/2003.13678) and MobileNetV3
(https://arxiv.org/abs/1905.02244) and timm's ResNet (https://arxiv.org/abs/1512.03385, with the stride on the
3x3), and networks of the usual widths give the same outputs. They are registered as one-exit baselines.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import SqueezeExcite, conv_norm, drop_path, init_he_out, rising, rounded
from models.registry import nearest


@dataclass(frozen=True)
class Backbone:
    """A CNN in parts, and the names under which its parts are released.

    Attributes:
        stem, stages: images [B, 3, H, W] to the map that enters stage 1; then four stages, map to map.
        widths: channels of the maps that enter stages 1 to 4, and of the one that leaves stage 4.
        strides: pixels per position of the maps that enter stages 1 to 4.
        body: names and modules that hold the stages inside a two-stream network; stage i is at
            `stage_path.format(i)`.
        plain: names and modules of the CNN alone, in order of execution; its classifier is named
            `classifier_name`.
        hidden: width of the hidden layer of its classifiers; 0 where they are linear.
        dropout: rate before the last linear layer of its classifier.
        classifier_before: the part of a two-stream network that its classifier precedes in released files.
        classifier_std: standard deviation of a linear classifier's initial weights; None is PyTorch's
            default.
    """

    stem: nn.Sequential
    stages: list[nn.Sequential]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    body: list[tuple[str, nn.Module]]
    stage_path: str
    plain: list[tuple[str, nn.Module]]
    classifier_name: str
    classifier_before: str
    dropout: float
    hidden: int = 0
    classifier_std: float | None = None

    def classifier_layers(self, n_in: int, num_classes: int) -> list[nn.Module]:
        """The layers from pooled features [B, n_in] to logits [B, num_classes]."""
        if not self.hidden:
            return [nn.Linear(n_in, num_classes)]
        act, dropout = nn.Hardswish(inplace=True), nn.Dropout(self.dropout)
        return [nn.Linear(n_in, self.hidden), act, dropout, nn.Linear(self.hidden, num_classes)]

    def classifier(self, num_classes: int) -> nn.Module:
        """The classifier of the map that leaves stage 4, pooled: [B, widths[4]] to [B, num_classes]."""
        layers = self.classifier_layers(self.widths[-1], num_classes)
        if self.hidden:
            return nn.Sequential(*layers)
        if self.classifier_std:
            nn.init.normal_(layers[0].weight, 0.0, self.classifier_std)
            nn.init.zeros_(layers[0].bias)
        return layers[0]


# RegNetY


class RegNetBlock(nn.Module):
    """1x1, grouped 3x3, squeeze and excitation, 1x1, all `n_out` wide, added to the shortcut: [B, n_in, H, W]
    to [B, n_out, H / stride, W / stride]."""

    def __init__(self, n_in: int, n_out: int, *, stride: int, group_width: int, drop: float) -> None:
        super().__init__()
        self.proj = conv_norm(n_in, n_out, stride=stride) if stride > 1 or n_in != n_out else None
        self.f = nn.Sequential(
            OrderedDict(
                a=conv_norm(n_in, n_out, act=nn.ReLU),
                b=conv_norm(n_out, n_out, 3, stride=stride, groups=n_out // group_width, act=nn.ReLU),
                se=SqueezeExcite(n_out, round(0.25 * n_in), nn.Sigmoid),
                c=conv_norm(n_out, n_out),
            )
        )
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        shortcut = x if self.proj is None else self.proj(x)
        return F.relu(shortcut + self.drop_path(self.f(x)), inplace=True)


def regnet_y(
    drop_path: float | None,
    dropout: float | None,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    group_width: int,
) -> Backbone:
    """RegNetY with these widths, blocks per stage and channels per group; published without dropout of any
    kind."""
    stem, n_in, stages = conv_norm(3, 32, 3, stride=2, act=nn.ReLU), 32, []
    rates = iter(rising(drop_path or 0.0, sum(depths)))
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        blocks = OrderedDict()
        for j in range(depth):
            blocks[f"block{i}-{j}"] = RegNetBlock(
                n_in, width, stride=1 if j else 2, group_width=group_width, drop=next(rates)
            )
            n_in = width
        stages.append(nn.Sequential(blocks))
    body = nn.Sequential(OrderedDict((f"block{i}", stage) for i, stage in enumerate(stages, 1)))
    for part in (stem, body):
        part.apply(init_he_out)
    return Backbone(
        stem,
        stages,
        (32, *widths),
        (2, 4, 8, 16),
        body=[("cnn_body", body)],
        stage_path="cnn_body.block{}",
        plain=[("stem", stem), ("trunk_output", body)],
        classifier_name="fc",
        classifier_before="early_classifier3",
        dropout=dropout or 0.0,
        classifier_std=0.01,
    )


# ResNet


class ResNetBlock(nn.Sequential):
    """Convolutions of the given (kernel, width, stride), each with batch norm, ReLU between, added to the
    shortcut."""

    def __init__(self, n_in: int, convs: list[tuple[int, int, int]], drop: float) -> None:
        super().__init__()
        channels = n_in
        for i, (kernel, width, stride) in enumerate(convs, 1):
            conv = conv_norm(channels, width, kernel, stride=stride, act=nn.ReLU if i < len(convs) else None)
            for name, layer in zip(("conv", "bn", "act"), conv, strict=False):
                self.add_module(f"{name}{i}", layer)
            channels = width
        self.drop_path = drop_path(drop)
        stride = max(stride for _, _, stride in convs)
        self.downsample = (
            conv_norm(n_in, channels, stride=stride) if stride > 1 or n_in != channels else nn.Identity()
        )
        self.apply(init_he_out)
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
    """ResNet with these blocks per stage, widths times `width_mult`; published with drop path and dropout of
    0.2."""
    width, stages, widths = int(64 * width_mult), [], [int(64 * width_mult)]
    stem = conv_norm(3, width, 7, stride=2, act=nn.ReLU)
    stem.append(nn.MaxPool2d(3, stride=2, padding=1)).apply(init_he_out)
    rates = iter(rising(0.2 if drop_path is None else drop_path, sum(depths)))
    for i, depth in enumerate(depths):
        planes, blocks = int(64 * 2**i * width_mult), []
        out = int(256 * 2**i * width_mult) if bottleneck else planes
        for j in range(depth):
            stride = 2 if i and not j else 1
            convs = [(1, planes, 1), (3, planes, stride), (1, out, 1)]
            convs = convs if bottleneck else [(3, planes, stride), (3, out, 1)]
            blocks.append(ResNetBlock(widths[-1] if j == 0 else out, convs, next(rates)))
        stages.append(nn.Sequential(*blocks))
        widths.append(out)
    return Backbone(
        stem,
        stages,
        tuple(widths),
        (4, 4, 8, 16),
        body=[(f"cnn_body_stage{i}", stage) for i, stage in enumerate(stages, 1)],
        stage_path="cnn_body_stage{}",
        plain=[
            *zip(("conv1", "bn1", "act1", "maxpool"), stem, strict=True),
            *((f"layer{i}", stage) for i, stage in enumerate(stages, 1)),
        ],
        classifier_name="fc",
        classifier_before="dwc1_x2z",
        dropout=0.2 if dropout is None else dropout,
    )


# MobileNetV3

# Kernel, expanded and output channels, squeeze and excitation, activation, stride of every block (tables 1
# and 2).
RE, HS = nn.ReLU, nn.Hardswish
# fmt: off
LARGE = (
    (3, 16, 16, False, RE, 1), (3, 64, 24, False, RE, 2), (3, 72, 24, False, RE, 1), (5, 72, 40, True, RE, 2),
    (5, 120, 40, True, RE, 1), (5, 120, 40, True, RE, 1), (3, 240, 80, False, HS, 2), (3, 200, 80, False, HS, 1),
    (3, 184, 80, False, HS, 1), (3, 184, 80, False, HS, 1), (3, 480, 112, True, HS, 1), (3, 672, 112, True, HS, 1),
    (5, 672, 160, True, HS, 2), (5, 960, 160, True, HS, 1), (5, 960, 160, True, HS, 1),
)
SMALL = (
    (3, 16, 16, True, RE, 2), (3, 72, 24, False, RE, 2), (3, 88, 24, False, RE, 1), (5, 96, 40, True, HS, 2),
    (5, 240, 40, True, HS, 1), (5, 240, 40, True, HS, 1), (5, 120, 48, True, HS, 1), (5, 144, 48, True, HS, 1),
    (5, 288, 96, True, HS, 2), (5, 576, 96, True, HS, 1), (5, 576, 96, True, HS, 1),
)
# fmt: on


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze and excitation, 1x1; added to what came in if shapes
    agree."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        kernel: int,
        expanded: int,
        se: bool,
        act: type,
        stride: int,
        drop: float,
    ) -> None:
        super().__init__()
        layers = [_mobile_conv(n_in, expanded, act=act)] if expanded != n_in else []
        layers.append(_mobile_conv(expanded, expanded, kernel, stride=stride, groups=expanded, act=act))
        if se:
            layers.append(SqueezeExcite(expanded, rounded(expanded // 4), nn.Hardsigmoid))
        layers.append(_mobile_conv(expanded, n_out))
        self.block = nn.Sequential(*layers)
        self.adds = stride == 1 and n_in == n_out
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        return x + self.drop_path(self.block(x)) if self.adds else self.block(x)


_mobile_conv = partial(conv_norm, norm=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))


def mobilenet_v3(
    drop_path: float | None,
    dropout: float | None,
    *,
    rows: tuple = LARGE,
    cuts: Sequence[int] = (3, 5, 8, 14),
    hidden: int = 1280,
    width_mult: float = 1.0,
) -> Backbone:
    """MobileNetV3 with all widths times `width_mult`; published with dropout of 0.2 before its last layer.

    Stage i starts at feature `cuts[i - 1]`, feature 0 being the first convolution: in the two-stream networks
    every stage but the last ends with its block of stride 2.
    """
    scale = [rounded(width_mult * row[2]) for row in rows]
    inputs = [rounded(width_mult * 16), *scale]
    features = [_mobile_conv(3, inputs[0], 3, stride=2, act=HS)]
    rates = rising(drop_path or 0.0, len(rows))
    for n_in, n_out, (kernel, expanded, _, se, act, stride), rate in zip(
        inputs, scale, rows, rates, strict=False
    ):
        wide = rounded(width_mult * expanded)
        features.append(
            InvertedResidual(
                n_in, n_out, kernel=kernel, expanded=wide, se=se, act=act, stride=stride, drop=rate
            )
        )
    last = 6 * inputs[-1]
    features.append(_mobile_conv(inputs[-1], last, act=HS))
    whole = nn.Sequential(*features).apply(init_he_out)
    for module in whole.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    ends = [*cuts, len(features)]
    stem, *stages = [nn.Sequential(*features[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    strides = [2, *(row[-1] for row in rows)]  # of features 0, 1, ...
    return Backbone(
        stem,
        stages,
        (*(inputs[cut - 1] for cut in cuts), last),
        tuple(math.prod(strides[:cut]) for cut in cuts),
        body=[(f"cnn_body_stage{i}", stage) for i, stage in enumerate(stages, 1)],
        stage_path="cnn_body_stage{}",
        plain=[("features", whole)],
        classifier_name="classifier",
        classifier_before="classifier_merge",
        dropout=0.2 if dropout is None else dropout,
        hidden=rounded(width_mult * hidden),
    )


# The networks


RESNET50_WIDTHS = {"": 1.0, "_0375": 0.375, "_050": 0.5, "_0625": 0.625, "_075": 0.75}
MOBILENET_WIDTHS = {"": 1.0, "_0x5": 0.5, "_0x75": 0.75, "_1x25": 1.25, "_1x5": 1.5, "_2x0": 2.0}
CORES: dict[str, Callable[[float | None, float | None], Backbone]] = {
    "regnet_y_400mf": partial(regnet_y, widths=(48, 104, 208, 440), depths=(1, 3, 6, 6), group_width=8),
    "regnet_y_800mf": partial(regnet_y, widths=(64, 144, 320, 784), depths=(1, 3, 8, 2), group_width=16),
    "regnet_y_1_6gf": partial(regnet_y, widths=(48, 120, 336, 888), depths=(2, 6, 17, 2), group_width=24),
    "regnet_y_3_2gf": partial(regnet_y, widths=(72, 216, 576, 1512), depths=(2, 5, 13, 1), group_width=24),
    "resnet18": partial(resnet, depths=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(resnet, depths=(3, 4, 6, 3), bottleneck=False),
    "mobilenet_v3_small": partial(mobilenet_v3, rows=SMALL, cuts=(2, 4, 9, 11), hidden=1024),
}
for _suffix, _width in RESNET50_WIDTHS.items():
    CORES["resnet50" + _suffix] = partial(resnet, depths=(3, 4, 6, 3), bottleneck=True, width_mult=_width)
for _suffix, _width in MOBILENET_WIDTHS.items():
    CORES["mobilenet_v3_large" + _suffix] = partial(mobilenet_v3, width_mult=_width)


def make_backbone(core: str, drop_path: float | None, dropout: float | None) -> Backbone:
    """The named core; rates of None are those it was published with. Raises ValueError for an unknown name or
    rate."""
    if not 0 <= (drop_path or 0.0) < 1:
        raise ValueError(f"drop_path is {drop_path}; accepted: 0 up to, but not, 1")
    if core not in CORES:
        raise ValueError(f"unknown core {core!r}; {nearest(core, CORES)}")
    return CORES[core](drop_path, dropout)
