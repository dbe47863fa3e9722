"""RANet: Resolution Adaptive Networks for Efficient Inference (https://arxiv.org/abs/2003.07326).

Sub-networks ("flows") read the image at rising resolution. Each flow first goes through fusion blocks, which
take in what the same block of the flow before it made of the image, then through plain blocks, which each
have an exit.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ConvUnit, ImageNetStem, MapClassifier, init_he_out
from models.multi_exit import MultiExitModel, State
from models.registry import register


class Stem(nn.Module):
    """Images to the map that each flow starts from; `layers` run from fine to coarse, the last flow's map
    first."""

    def __init__(self, stem: str, widths: list[int], levels: Sequence[int]) -> None:
        """`widths`, `levels`: channels and resolution level per flow, low resolution first."""
        super().__init__()
        layers = [ConvUnit(3, widths[-1]) if stem == "cifar" else ImageNetStem(widths[-1])]
        for f in range(len(widths) - 2, -1, -1):
            layers.append(ConvUnit(widths[f + 1], widths[f], stride=1 if levels[f] == levels[f + 1] else 2))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to one map per flow, low resolution first."""
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps[::-1]


class DenseLayer(nn.Module):
    """Appends `n_new` channels: [B, C, H, W] to [B, C + n_new, H, W]."""

    def __init__(self, n_in: int, n_new: int, bottleneck: int) -> None:
        super().__init__()
        self.conv_normal = ConvUnit(n_in, n_new, bottleneck=bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.cat([x, self.conv_normal(x)], 1)


class PlainBlock(nn.Module):
    """Dense layers and, if the block has a transition, a 1x1 unit that keeps `reduction` of the channels."""

    def __init__(self, n_in: int, count: int, growth: int, bottleneck: int, reduction: float) -> None:
        """`reduction` of 0 is no transition."""
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(n_in + i * growth, growth, bottleneck) for i in range(count))
        self.widths = [n_in + i * growth for i in range(count + 1)]  # of the trace
        self.n_out = math.floor(reduction * self.widths[-1]) if reduction else self.widths[-1]
        self.trans = ConvUnit(self.widths[-1], self.n_out, kernel=1) if reduction else nn.Identity()

    def forward(self, x: Tensor, _: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] to the block's map and its trace: the map before the first layer and after each."""
        trace = [x]
        for layer in self.layers:
            trace.append(layer(trace[-1]))
        return self.trans(trace[-1]), trace


class FusionLayer(nn.Module):
    """Appends channels made of the lower-resolution flow's map, and of this flow's; `stride` 2 halves the
    side."""

    def __init__(
        self, n_in: int, n_low: int, n_new: int, n_up: int, bottlenecks: tuple[int, int], stride: int
    ) -> None:
        """`n_up` of the `n_new` channels come from the lower flow's `n_low`; `bottlenecks` of that flow and
        this."""
        super().__init__()
        self.conv_up = ConvUnit(n_low, n_up, bottleneck=bottlenecks[0])
        self.conv_normal = ConvUnit(n_in, n_new - n_up, stride=stride, bottleneck=bottlenecks[1])

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """[B, C, H, W] and [B, C', h, w] to [B, C + new, H / stride, W / stride]."""
        y = self.conv_normal(x)
        return torch.cat([resized(x, y), resized(self.conv_up(low), y), y], 1)


class FusionBlock(nn.Module):
    """Fusion layers, then a 1x1 view of the end of the lower flow's trace, and a transition as in
    `PlainBlock`."""

    def __init__(
        self,
        n_in: int,
        low: list[int],
        growth: int,
        bottlenecks: tuple[int, int],
        compress: float,
        reduction: float,
        *,
        down: bool,
    ) -> None:
        """`low`: widths of the lower flow's trace; `compress`: share of new channels that come from there."""
        super().__init__()
        count, n_up = len(low) - 1, math.floor(compress * growth)
        self.layers = nn.ModuleList(
            FusionLayer(
                n_in + i * growth,
                low[i],
                growth,
                n_up,
                bottlenecks,
                stride=2 if down and i == count - 1 else 1,
            )
            for i in range(count)
        )
        self.widths = [n_in + i * growth for i in range(count + 1)]
        seen = math.floor(compress * self.widths[-1])
        self.conv_last = ConvUnit(low[-1], seen, kernel=1)
        whole = self.widths[-1] + seen
        self.n_out = math.floor(reduction * whole) if reduction else whole
        self.trans = ConvUnit(whole, self.n_out, kernel=1) if reduction else nn.Identity()

    def forward(self, x: Tensor, low: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] and the lower flow's trace to the block's map and its own trace."""
        trace = [x]
        for layer, seen in zip(self.layers, low, strict=False):
            trace.append(layer(trace[-1], seen))
        x = torch.cat([trace[-1], resized(self.conv_last(low[-1]), trace[-1])], 1)
        return self.trans(x), trace


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Maps [B, C, h, w] interpolated to the height and width of `like`."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


def transitions(num_blocks: int, level: int) -> set[int]:
    """Blocks, numbered from 1, that end with a transition."""
    return {i * num_blocks // level for i in range(1, level)}


def downs(blocks_before: Sequence[int], level: int) -> set[int]:
    """Fusion blocks, numbered from 1, that halve the side, from the numbers of blocks of the flows before."""
    # A slice of the last 0 entries, as in the published code, would be all of them.
    return set([0, *blocks_before][-(level - 1) :]) if level > 1 else set()


class RANet(MultiExitModel):
    """Resolution adaptive network. Options carry the names of the published commands; lists are low
    resolution first.

    Args:
        stem: "cifar" (full resolution) or "imagenet" (7x7 convolution and pooling; wider classifiers).
        nBlocks, block_step: blocks of the first flow, and how many more each further flow has. A flow has an
            exit at each of the blocks that it has more than the flow before.
        nChannels, growthRate: base width, and channels added per layer, before `grFactor`.
        grFactor, bnFactor: per flow: multiples of these; bottleneck width in multiples of the channels added.
        scale_list: per flow its level, never falling: a flow starts from half the side of the next where that
            is on a higher level, and has level - 1 transitions and, among its fusion blocks, steps down.
        step, stepmode: layers per block: `step` ("even"), or `step * j` in a flow's block j, from 1 ("lg").
        compress_factor: share of a fusion layer's new channels that come from the flow of lower resolution.
        reduction: channels kept by a transition.
        bnAfter: only true: batch norm follows its convolution, as in all published networks.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        stem: str = "cifar",
        nBlocks: int = 2,
        block_step: int = 2,
        nChannels: int = 16,
        growthRate: int = 6,
        grFactor: Sequence[int] = (4, 2, 1, 1),
        bnFactor: Sequence[int] = (4, 2, 1, 1),
        scale_list: Sequence[int] = (1, 2, 3, 3),
        step: int = 4,
        stepmode: str = "even",
        compress_factor: float = 0.25,
        reduction: float = 0.5,
        bnAfter: bool = True,
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("stem", stem, ("cifar", "imagenet")),
            ("stepmode", stepmode, ("even", "lg")),
        ):
            if value not in choices:
                raise ValueError(f"{option} is {value!r}; accepted: {', '.join(choices)}")
        counts = {
            "nBlocks": nBlocks,
            "block_step": block_step,
            "nChannels": nChannels,
            "growthRate": growthRate,
        }
        for option, value in (counts | {"step": step}).items():
            if value < 1:
                raise ValueError(f"{option} is {value}; it must be at least 1")
        if not bnAfter:
            raise ValueError("bnAfter is False; batch norm always follows its convolution")
        growths = [growthRate * g for g in grFactor]
        _check(grFactor, bnFactor, scale_list, growths, compress_factor, reduction)

        widths = [nChannels * g for g in grFactor]
        blocks_of = [nBlocks + f * block_step for f in range(len(widths))]
        flows, heads, self.stages, low = [], [], [], []
        for f, (n, level) in enumerate(zip(widths, scale_list, strict=True)):
            blocks, first = [], 0
            cuts, halved = transitions(blocks_of[f], level), downs(blocks_of[:f], level)
            for j in range(1, blocks_of[f] + 1):
                kept = reduction if j in cuts else 0.0
                if j <= len(low):
                    factors = (bnFactor[f - 1], bnFactor[f])
                    block = FusionBlock(
                        n, low[j - 1].widths, growths[f], factors, compress_factor, kept, down=j in halved
                    )
                else:
                    count = step * j if stepmode == "lg" else step
                    block = PlainBlock(n, count, growths[f], bnFactor[f], kept)
                    self.stages.append((f, first, j))
                    first = j
                    heads.append(
                        MapClassifier(block.n_out, 128 if stem == "cifar" else block.n_out, num_classes)
                    )
                blocks.append(block)
                n = block.n_out
            low = blocks
            flows.append(nn.ModuleList(blocks))
        self.num_exits = len(heads)
        self.scale_flows = nn.ModuleList(flows)
        self.classifier = nn.ModuleList(heads)
        self.FirstLayer = Stem(stem, widths, scale_list)
        for part in (self.scale_flows, self.classifier):
            part.apply(init_he_out)

    def begin(self, images: Tensor) -> State:
        """The state is the maps that later flows start from, this flow's map, the traces it reads and those
        it made."""
        maps = self.FirstLayer(images)
        return maps[1:], maps[0], [], []

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The blocks of exit k's flow up to the exit; its features are the last one's map."""
        maps, x, read, made = state
        f, first, last = self.stages[k]
        for j in range(first, last):
            x, trace = self.scale_flows[f][j](x, read[j] if j < len(read) else [])
            made = [*made, trace] if maps else []  # the last flow's are read by nobody
        if last < len(self.scale_flows[f]):
            return x, (maps, x, [], made)  # all fusion blocks come before the flow's first exit
        return x, (maps[1:], maps[0], made, []) if maps else None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C] from the map."""
        return self.classifier[k](features)


def _check(
    gr: Sequence[int],
    bn: Sequence[int],
    levels: Sequence[int],
    growths: list[int],
    compress: float,
    reduction: float,
) -> None:
    if not len(gr) == len(bn) == len(levels) or not levels:
        raise ValueError(
            f"scale_list {list(levels)}, grFactor {list(gr)} and bnFactor {list(bn)}: one number per flow"
        )
    if levels[0] < 1 or list(levels) != sorted(levels):
        raise ValueError(f"scale_list is {list(levels)}; levels are at least 1 and never fall")
    if min(*gr, *bn, 1) < 1:
        raise ValueError(f"grFactor {list(gr)} and bnFactor {list(bn)}: numbers of at least 1")
    if any(not 0 < math.floor(compress * growth) < growth for growth in growths[1:]):
        raise ValueError(
            f"compress_factor is {compress}; of {growths[1:]} new channels it must leave some for either side"
        )
    if not 0 < reduction < 1:
        raise ValueError(f"reduction is {reduction}; it must be above 0 and below 1")


register(RANet, "ranet", "RANet; the options default to the CIFAR training script's")
register(RANet, "ranet_cifar", "CIFAR, 8 exits, the training script's (the paper's anytime curve)")
register(
    RANet,
    "ranet_cifar_lg",
    "CIFAR, 6 exits, the README's",
    step=2,
    stepmode="lg",
    scale_list=(1, 2, 3),
    grFactor=(4, 2, 1),
    bnFactor=(4, 2, 1),
)
for _name, _about, _channels, _factors in (
    ("ranet_imagenet", "ImageNet, 8 exits, the paper's anytime curve", 64, (4, 2, 2, 1)),
    ("ranet_imagenet_script", "ImageNet, 8 exits, the training script's", 16, (4, 2, 1, 1)),
    ("ranet_imagenet_readme", "ImageNet, 8 exits, the README's", 32, (4, 2, 2, 1)),
):
    register(
        RANet,
        _name,
        _about,
        stem="imagenet",
        step=8,
        nChannels=_channels,
        growthRate=16,
        grFactor=_factors,
        bnFactor=_factors,
        scale_list=(1, 2, 3, 4),
    )
