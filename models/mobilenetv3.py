"""MobileNetV3 (https://arxiv.org/abs/1905.02244) in several widths, as a core.

Weights are named as torchvision's; networks of the usual widths give the same answers.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from models.backbones import Backbone, register_core
from models.layers import SqueezeExcite, conv_norm, drop_path, init_he_out, rising, rounded


class Row(NamedTuple):
    """One block."""

    kernel: int
    expanded: int  # channels of the depthwise convolution
    out: int  # channels that leave the block
    se: bool  # with squeeze and excitation
    act: type[nn.Module]
    stride: int


# Tables 1 and 2 of the paper: kernel, expanded and output channels, SE, activation, stride.
LARGE = """
    3  16  16  no  relu  1
    3  64  24  no  relu  2
    3  72  24  no  relu  1
    5  72  40  se  relu  2
    5 120  40  se  relu  1
    5 120  40  se  relu  1
    3 240  80  no  swish 2
    3 200  80  no  swish 1
    3 184  80  no  swish 1
    3 184  80  no  swish 1
    3 480 112  se  swish 1
    3 672 112  se  swish 1
    5 672 160  se  swish 2
    5 960 160  se  swish 1
    5 960 160  se  swish 1
"""
SMALL = """
    3  16  16  se  relu  2
    3  72  24  no  relu  2
    3  88  24  no  relu  1
    5  96  40  se  swish 2
    5 240  40  se  swish 1
    5 240  40  se  swish 1
    5 120  48  se  swish 1
    5 144  48  se  swish 1
    5 288  96  se  swish 2
    5 576  96  se  swish 1
    5 576  96  se  swish 1
"""
ACTIVATIONS = {"relu": nn.ReLU, "swish": nn.Hardswish}


def rows_of(table: str, width_mult: float) -> Iterator[Row]:
    """The rows of a table, their widths multiplied."""
    for line in table.strip().splitlines():
        kernel, expanded, out, se, act, stride = line.split()
        expanded, out = (rounded(width_mult * int(width)) for width in (expanded, out))
        yield Row(int(kernel), expanded, out, se == "se", ACTIVATIONS[act], int(stride))


unit = partial(conv_norm, norm=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze and excitation, 1x1;
    added to the input if shapes agree."""

    def __init__(self, n_in: int, row: Row, drop: float) -> None:
        super().__init__()
        wide = row.expanded
        self.block = nn.Sequential()
        if wide != n_in:
            self.block.append(unit(n_in, wide, act=row.act))
        self.block.append(unit(wide, wide, row.kernel, stride=row.stride, groups=wide, act=row.act))
        if row.se:
            self.block.append(SqueezeExcite(wide, rounded(wide // 4), nn.Hardsigmoid))
        self.block.append(unit(wide, row.out))
        self.adds = row.stride == 1 and n_in == row.out
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, row.out, H / stride, W / stride]."""
        return x + self.drop_path(self.block(x)) if self.adds else self.block(x)


def mobilenet_v3(
    drop_path: float | None,
    dropout: float | None,
    *,
    table: str = LARGE,
    cuts: Sequence[int] = (3, 5, 8, 14),
    hidden: int = 1280,
    width_mult: float = 1.0,
) -> Backbone:
    """MobileNetV3 with all widths times `width_mult`; published with dropout of 0.2 before its last layer.

    Stage i starts at feature `cuts[i - 1]`, feature 0 being the first convolution: in the two-stream networks
    every stage but the last ends with its block of stride 2.
    """

    rows = list(rows_of(table, width_mult))
    widths = [rounded(width_mult * 16), *(row.out for row in rows)]  # that leave features 0, 1, ...
    features = nn.Sequential(unit(3, widths[0], 3, stride=2, act=nn.Hardswish))
    for n_in, row, rate in zip(widths, rows, rising(drop_path or 0.0, len(rows)), strict=False):
        features.append(InvertedResidual(n_in, row, rate))
    last = 6 * widths[-1]
    features.append(unit(widths[-1], last, act=nn.Hardswish))
    init_he_out(features, zero_bias=nn.Conv2d)
    ends = (*cuts, len(features))
    stem, *stages = (nn.Sequential(*features[a:b]) for a, b in zip((0, *cuts), ends, strict=True))
    strides = [2, *(row.stride for row in rows)]
    return Backbone(
        stem,
        stages,
        widths=(*(widths[cut - 1] for cut in cuts), last),
        strides=tuple(math.prod(strides[:cut]) for cut in cuts),
        plain=[("features", features)],
        classifier_name="classifier",
        classifier_before="classifier_merge",
        dropout=0.2 if dropout is None else dropout,
        hidden=rounded(width_mult * hidden),
    )


register_core("mobilenet_v3_small", partial(mobilenet_v3, table=SMALL, cuts=(2, 4, 9, 11), hidden=1024))
WIDTHS = {"": 1.0, "_0x5": 0.5, "_0x75": 0.75, "_1x25": 1.25, "_1x5": 1.5, "_2x0": 2.0}
for _suffix, _width in WIDTHS.items():
    register_core(f"mobilenet_v3_large{_suffix}", partial(mobilenet_v3, width_mult=_width))
