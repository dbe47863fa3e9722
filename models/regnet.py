"""RegNetY (https://arxiv.org/abs/2003.13678) as a core; weights' names and answers are torchvision's."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone, register_core
from models.layers import SqueezeExcite, conv_norm, drop_path, init_he_out, rising

STEM = 32  # channels


class RegNetBlock(nn.Module):
    """1x1, grouped 3x3, squeeze and excitation, 1x1, all `n_out` wide, added to the shortcut.

    Maps [B, n_in, H, W] to [B, n_out, H / stride, W / stride].
    """

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
    """RegNetY of these widths, blocks per stage and channels per group; published without any dropout."""
    stem = conv_norm(3, STEM, 3, stride=2, act=nn.ReLU)
    body = nn.Sequential()
    rates = iter(rising(drop_path or 0.0, sum(depths)))
    n_in = STEM
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        stage = nn.Sequential()
        for j in range(depth):
            stride = 1 if j else 2
            block = RegNetBlock(n_in, width, stride=stride, group_width=group_width, drop=next(rates))
            stage.add_module(f"block{i}-{j}", block)
            n_in = width
        body.add_module(f"block{i}", stage)
    init_he_out(stem)
    init_he_out(body)
    return Backbone(
        stem,
        stages=list(body),
        widths=(STEM, *widths),
        strides=(2, 4, 8, 16),
        plain=[("stem", stem), ("trunk_output", body)],
        classifier_name="fc",
        classifier_before="early_classifier3",
        dropout=dropout or 0.0,
        classifier_std=0.01,
        joined=body,
    )


for _name, _widths, _depths, _group in (
    ("regnet_y_400mf", (48, 104, 208, 440), (1, 3, 6, 6), 8),
    ("regnet_y_800mf", (64, 144, 320, 784), (1, 3, 8, 2), 16),
    ("regnet_y_1_6gf", (48, 120, 336, 888), (2, 6, 17, 2), 24),
    ("regnet_y_3_2gf", (72, 216, 576, 1512), (2, 5, 13, 1), 24),
):
    register_core(_name, partial(regnet_y, widths=_widths, depths=_depths, group_width=_group))
