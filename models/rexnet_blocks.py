"""The blocks of ReXNet (https://arxiv.org/abs/2007.00992) and how their widths grow."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.layers import conv_norm, drop_path, rising

BLOCKS = (1, 2, 2, 3, 3, 5)  # of the six stages
STRIDES = (1, 2, 2, 2, 1, 2)  # of their first blocks
STEM, WIDTH, LAST, HIDDEN = 32, 16, 1280, 1024


def widths(input_ch: float, final_ch: float, multiplier: float, count: int, parts: int) -> list[float]:
    """Widths of the outputs of `count` blocks before rounding: each `final_ch / parts` wider, times
    `multiplier`.

    The sum is formed one addition at a time, as published, since rounding is sensitive to the last bit.
    """
    width, found = input_ch / min(multiplier, 1.0), []
    for _ in range(count):
        found.append(width * multiplier)
        width += final_ch / parts
    return found


class Excite(nn.Module):
    """Squeeze and excitation with batch norm between its layers: [B, width, H, W] to the same."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        squeezed = width // ratio
        self.fc = nn.Sequential(
            nn.Conv2d(width, squeezed, 1),
            nn.BatchNorm2d(squeezed),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Block(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; the input is added to the first `n_in` channels.

    Nothing is added where the map or its channels shrink. Maps [B, n_in, H, W] to [B, n_out, H / stride, W /
    stride].

    Args:
        expansion: width between, in multiples of `n_in`; 1 leaves the expansion out.
        act: behind the expansion.
        middle: what stands between the depthwise convolution and the projection, made for a width.
        conv: `conv_norm` with this family's batch norm.
        drop: rate of stochastic depth, of blocks with a shortcut.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        expansion: int,
        stride: int,
        kernel: int = 3,
        act: type[nn.Module],
        middle: Callable[[int], list[nn.Module]],
        conv: Callable[..., nn.Sequential] = conv_norm,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = n_in * expansion
        self.out = nn.Sequential(
            *(conv(n_in, hidden, act=act) if expansion != 1 else ()),
            *conv(hidden, hidden, kernel, stride=stride, groups=hidden),
            *middle(hidden),
            *conv(hidden, n_out),
        )
        self.shared = n_in if stride == 1 and n_in <= n_out else 0
        self.drop_path = drop_path(drop if self.shared else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.drop_path(self.out(x))
        if not self.shared:
            return y
        if torch.is_grad_enabled():
            return torch.cat([y[:, : self.shared] + x, y[:, self.shared :]], 1)
        y[:, : self.shared] += x  # the same numbers without a copy of the map
        return y


def stack(
    n_in: int,
    outs: Sequence[int],
    depths: Sequence[int],
    drop: float,
    *,
    act: type[nn.Module],
    middle: Callable[[int, int], list[nn.Module]],
    kernels: str = "333333",
    conv: Callable[..., nn.Sequential] = conv_norm,
) -> list[Block]:
    """The blocks of six stages of `depths` blocks that put out `outs` channels; `middle` gets the stage,
    too."""
    places = [(stage, j) for stage, depth in enumerate(depths) for j in range(depth)]
    return [
        Block(
            a,
            b,
            expansion=6 if stage else 1,
            stride=1 if j else STRIDES[stage],
            kernel=int(kernels[stage]),
            act=act,
            middle=partial(middle, stage),
            conv=conv,
            drop=rate,
        )
        for a, b, (stage, j), rate in zip(
            [n_in, *outs], outs, places, rising(drop, len(places)), strict=False
        )
    ]


def v1_blocks(
    width_mult: float, drop: float, input_ch=WIDTH, final_ch=180, depth_mult=1.0, use_se=True, se_ratio=12
) -> tuple[int, list[int], list[Block]]:
    """ReXNetV1's blocks, the width of the map that they read, and the width that each puts out."""
    depths = [math.ceil(n * depth_mult) for n in BLOCKS]
    stem = round(STEM / min(width_mult, 1.0) * width_mult)
    outs = [round(width) for width in widths(input_ch, final_ch, width_mult, sum(depths), sum(depths))]

    def middle(stage: int, width: int) -> list[nn.Module]:
        return [*([Excite(width, se_ratio)] if use_se and stage >= 2 else []), nn.ReLU6(inplace=True)]

    return stem, outs, stack(stem, outs, depths, drop, act=nn.SiLU, middle=middle)
