"""The blocks of ReXNet (https://arxiv.org/abs/2007.00992) and how their widths grow."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers import conv_norm, drop_path, rising

BLOCKS = (1, 2, 2, 3, 3, 5)  # of the six stages
STRIDES = (1, 2, 2, 2, 1, 2)  # of their first blocks
STEM, WIDTH, LAST, HIDDEN = 32, 16, 1280, 1024


def widths(input_ch: float, final_ch: float, multiplier: float, count: int, parts: int) -> Iterator[float]:
    """Output widths of `count` blocks, unrounded: each `final_ch / parts` wider, times `multiplier`.

    The sum is formed one addition at a time, as published, since rounding is sensitive to the last bit.
    """
    width = input_ch / min(multiplier, 1.0)
    for _ in range(count):
        yield width * multiplier
        width += final_ch / parts


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
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


@dataclass(frozen=True)
class Style:
    """What the blocks of a variant have in common.

    Attributes:
        act: after a block's expansion, the stem and the last convolution.
        se_ratio: by how much squeeze and excitation, from the third stage on, squeezes; 0 = there is none.
        kernels: sizes of the depthwise kernels of the six stages.
        norm: batch norm for a number of channels.
    """

    act: type[nn.Module]
    se_ratio: int = 0
    kernels: Sequence[int] = (3, 3, 3, 3, 3, 3)
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d

    def conv(self, n_in: int, n_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
        """Convolution, batch norm and the activation."""
        return conv_norm(n_in, n_out, kernel, stride=stride, act=self.act, norm=self.norm)


class Block(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; the input is added to the first `n_in` channels.

    Nothing is added where the map or its channels shrink. Maps [B, n_in, H, W] to
    [B, n_out, H / stride, W / stride]. The first stage does not expand. `drop` is the rate of stochastic
    depth, of blocks with a shortcut.
    """

    def __init__(self, n_in: int, n_out: int, style: Style, stage: int, *, stride: int, drop: float) -> None:
        super().__init__()
        hidden = 6 * n_in if stage else n_in
        kernel = style.kernels[stage]
        self.out = nn.Sequential()
        if stage:
            self.out.extend(style.conv(n_in, hidden))
        self.out.extend(conv_norm(hidden, hidden, kernel, stride=stride, groups=hidden, norm=style.norm))
        if style.se_ratio and stage >= 2:
            self.out.append(Excite(hidden, style.se_ratio))
        self.out.append(nn.ReLU6(inplace=True))
        self.out.extend(conv_norm(hidden, n_out, norm=style.norm))
        self.shared = n_in if stride == 1 and n_in <= n_out else 0
        self.drop_path = drop_path(drop if self.shared else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.out(x))
        if not self.shared:
            return y
        if torch.is_grad_enabled() or torch.compiler.is_exporting():  # exported, the other way scatters
            return torch.cat([y[:, : self.shared] + x, y[:, self.shared :]], 1)
        y[:, : self.shared] += x  # the same numbers without a copy of the map
        return y


def stack(n_in: int, outs: Sequence[int], depths: Sequence[int], style: Style, drop: float) -> list[Block]:
    """The blocks of six stages of `depths` blocks, which put out `outs` channels."""
    places = [(stage, j) for stage, depth in enumerate(depths) for j in range(depth)]
    blocks = []
    for n_out, (stage, j), rate in zip(outs, places, rising(drop, len(places)), strict=True):
        stride = 1 if j else STRIDES[stage]
        blocks.append(Block(n_in, n_out, style, stage, stride=stride, drop=rate))
        n_in = n_out
    return blocks


@dataclass(frozen=True)
class V1Plan:
    """The widths and depths of a ReXNetV1; see the options of `models.rexnet.ReXNetV1`."""

    width_mult: float
    input_ch: int = WIDTH
    final_ch: int = 180
    depth_mult: float = 1.0

    @property
    def stem(self) -> int:
        """Channels of the map that the first block reads."""
        return round(STEM / min(self.width_mult, 1.0) * self.width_mult)

    @property
    def last(self) -> int:
        """Channels of the last convolution."""
        return int(LAST * self.width_mult)

    @property
    def depths(self) -> list[int]:
        """Blocks per stage."""
        return [math.ceil(n * self.depth_mult) for n in BLOCKS]

    @property
    def outs(self) -> list[int]:
        """Channels that each block puts out."""
        count = sum(self.depths)
        return [round(w) for w in widths(self.input_ch, self.final_ch, self.width_mult, count, count)]

    def stem_layers(self) -> nn.Sequential:
        """Images to the map that the first block reads."""
        return conv_norm(3, self.stem, 3, stride=2, act=nn.SiLU)

    def last_layers(self) -> nn.Sequential:
        """The last block's map to the one that is pooled."""
        return conv_norm(self.outs[-1], self.last, act=nn.SiLU)

    def blocks(self, se_ratio: int, drop: float) -> list[Block]:
        """The blocks, without squeeze and excitation where `se_ratio` is 0."""
        return stack(self.stem, self.outs, self.depths, Style(nn.SiLU, se_ratio), drop)
