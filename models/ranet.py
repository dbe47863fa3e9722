"""RANet: Resolution Adaptive Networks for Efficient Inference (https://arxiv.org/abs/2003.07326).

Sub-networks ("flows") read the image at rising resolution. Each flow first goes through fusion blocks, which
take in what the same block of the flow before it made of the image, then through plain blocks, which each
have an exit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.layers import (
    ConvUnit,
    ImageNetStem,
    MapChain,
    MapClassifier,
    check_at_least,
    check_dense_options,
    init_he_out,
)
from models.multi_exit import MultiExitModel, State
from models.registry import register


class Stem(MapChain):
    """Images to the map that each flow starts from; `layers` run fine to coarse, the last flow's first."""

    def __init__(self, stem: str, widths: list[int], levels: Sequence[int]) -> None:
        """`widths`, `levels`: channels and resolution level per flow, low resolution first."""
        layers = [ConvUnit(3, widths[-1]) if stem == "cifar" else ImageNetStem(widths[-1])]
        for f in reversed(range(len(widths) - 1)):
            stride = 1 if levels[f] == levels[f + 1] else 2
            layers.append(ConvUnit(widths[f + 1], widths[f], stride=stride))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to one map per flow, low resolution first."""
        return super().forward(x)[::-1]


class DenseLayer(nn.Module):
    """Appends `n_new` channels: [B, C, H, W] to [B, C + n_new, H, W]."""

    def __init__(self, n_in: int, n_new: int, bottleneck: int) -> None:
        super().__init__()
        self.conv_normal = ConvUnit(n_in, n_new, bottleneck=bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv_normal(x)], 1)


def transition(n_in: int, reduction: float) -> nn.Module:
    """A 1x1 unit that keeps `reduction` of the channels; nothing where that is 0."""
    return ConvUnit(n_in, math.floor(reduction * n_in), kernel=1) if reduction else nn.Identity()


class PlainBlock(nn.Module):
    """Dense layers and, where `reduction` is not 0, a transition."""

    def __init__(self, n_in: int, count: int, growth: int, bottleneck: int, reduction: float) -> None:
        super().__init__()
        self.widths = [n_in + i * growth for i in range(count + 1)]  # of the trace
        self.layers = nn.ModuleList(DenseLayer(width, growth, bottleneck) for width in self.widths[:-1])
        whole = self.widths[-1]
        self.trans = transition(whole, reduction)
        self.n_out = math.floor(reduction * whole) if reduction else whole

    def forward(self, x: Tensor, _: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] to the block's map and its trace: the map before the first layer and after each."""
        trace = [x]
        for layer in self.layers:
            trace.append(layer(trace[-1]))
        return self.trans(trace[-1]), trace


class FusionLayer(nn.Module):
    """Appends channels made from the lower flow's map and this flow's; `stride` 2 halves the side."""

    def __init__(
        self, n_in: int, n_low: int, n_new: int, n_up: int, bottlenecks: tuple[int, int], stride: int
    ) -> None:
        """`n_up` of the `n_new` channels come from the lower flow's `n_low`; `bottlenecks` of both flows."""
        super().__init__()
        self.conv_up = ConvUnit(n_low, n_up, bottleneck=bottlenecks[0])
        self.conv_normal = ConvUnit(n_in, n_new - n_up, stride=stride, bottleneck=bottlenecks[1])

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """[B, C, H, W] and [B, C', h, w] to [B, C + new, H / stride, W / stride]."""
        y = self.conv_normal(x)
        return torch.cat([resized(x, y), resized(self.conv_up(low), y), y], 1)


class FusionBlock(nn.Module):
    """Fusion layers, then a 1x1 view of the end of the lower flow's trace, and a transition."""

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
        n_up = math.floor(compress * growth)
        count = len(low) - 1
        self.widths = [n_in + i * growth for i in range(count + 1)]
        self.layers = nn.ModuleList()
        for i in range(count):
            stride = 2 if down and i == count - 1 else 1
            self.layers.append(FusionLayer(self.widths[i], low[i], growth, n_up, bottlenecks, stride))
        from_low = math.floor(compress * self.widths[-1])
        self.conv_last = ConvUnit(low[-1], from_low, kernel=1)
        whole = self.widths[-1] + from_low
        self.trans = transition(whole, reduction)
        self.n_out = math.floor(reduction * whole) if reduction else whole

    def forward(self, x: Tensor, low: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] and the lower flow's trace to the block's map and its own trace."""
        trace = [x]
        for layer, low_map in zip(self.layers, low, strict=False):
            trace.append(layer(trace[-1], low_map))
        last = resized(self.conv_last(low[-1]), like=trace[-1])
        return self.trans(torch.cat([trace[-1], last], 1)), trace


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


class Plan(NamedTuple):
    """How the blocks are built; see the options of `RANet`."""

    counts: list[int]  # blocks of each flow
    growths: list[int]  # channels added per layer of each flow
    bottlenecks: Sequence[int]
    levels: Sequence[int]
    step: int
    stepmode: str
    compress: float
    reduction: float

    def check(self, gr: Sequence[int]) -> None:
        """Raises ValueError for options that cannot be built; `gr` is grFactor."""
        levels, gr, bn = list(self.levels), list(gr), list(self.bottlenecks)
        if not len(gr) == len(bn) == len(levels) or not levels:
            raise UserError(f"scale_list {levels}, grFactor {gr} and bnFactor {bn}: one number per flow")
        if levels[0] < 1 or levels != sorted(levels):
            raise UserError(f"scale_list is {levels}; levels are at least 1 and never fall")
        if min(*gr, *bn, 1) < 1:
            raise UserError(f"grFactor {gr} and bnFactor {bn}: numbers of at least 1")
        new = self.growths[1:]
        if any(not 0 < math.floor(self.compress * growth) < growth for growth in new):
            wanted = f"of {new} new channels it must leave some for either side"
            raise UserError(f"compress_factor is {self.compress}; {wanted}")
        if not 0 < self.reduction < 1:
            raise UserError(f"reduction is {self.reduction}; it must be above 0 and below 1")

    def block(self, f: int, j: int, n_in: int, lower: Sequence[nn.Module]) -> PlainBlock | FusionBlock:
        """Block j (from 1) of flow f, entered with `n_in` channels; `lower` are the blocks of flow f - 1."""
        level = self.levels[f]
        kept = self.reduction if j in transitions(self.counts[f], level) else 0.0
        if j > len(lower):
            count = self.step * j if self.stepmode == "lg" else self.step
            return PlainBlock(n_in, count, self.growths[f], self.bottlenecks[f], kept)
        return FusionBlock(
            n_in,
            lower[j - 1].widths,
            self.growths[f],
            bottlenecks=(self.bottlenecks[f - 1], self.bottlenecks[f]),
            compress=self.compress,
            reduction=kept,
            down=j in downs(self.counts[:f], level),
        )


class RANet(MultiExitModel):
    """Options carry the names of the published commands; lists are low resolution first.

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
        reduction: share of the channels that a transition keeps.
        bnAfter: only true: batch norm follows its convolution, as in all published networks.
    """

    interpolation = "bilinear"

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
        check_dense_options(stem, stepmode, ("even", "lg"), bnAfter)
        counts = {"nBlocks": nBlocks, "block_step": block_step, "step": step}
        check_at_least(1, **counts, nChannels=nChannels, growthRate=growthRate)
        growths = [growthRate * g for g in grFactor]
        widths = [nChannels * g for g in grFactor]
        blocks_of = [nBlocks + f * block_step for f in range(len(widths))]
        plan = Plan(blocks_of, growths, bnFactor, scale_list, step, stepmode, compress_factor, reduction)
        plan.check(grFactor)
        self.scale_flows = nn.ModuleList()
        self.classifier = nn.ModuleList()
        self.stages = []  # (flow, first block, last block + 1) of each exit
        for f, width in enumerate(widths):
            self._add_flow(f, plan, width, num_classes, wide=stem == "imagenet")
        self.num_exits = len(self.stages)
        self.FirstLayer = Stem(stem, widths, scale_list)
        init_he_out(self.scale_flows, zero_bias=nn.Linear)
        init_he_out(self.classifier, zero_bias=nn.Linear)

    def _add_flow(self, f: int, plan: Plan, width: int, num_classes: int, *, wide: bool) -> None:
        """Flow f, from a map of `width` channels, and its exits; `wide` classifiers keep the width."""
        lower = self.scale_flows[f - 1] if f else []
        flow = nn.ModuleList()
        first = 0
        for j in range(1, plan.counts[f] + 1):
            block = plan.block(f, j, width, lower)
            flow.append(block)
            width = block.n_out
            if isinstance(block, PlainBlock):
                self.stages.append((f, first, j))
                first = j
                self.classifier.append(MapClassifier(width, width if wide else 128, num_classes))
        self.scale_flows.append(flow)

    def begin(self, images: Tensor) -> State:
        """The state: maps that later flows start from, this flow's map, traces it reads, traces it made."""
        maps = self.FirstLayer(images)
        return maps[1:], maps[0], [], []

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The blocks of exit k's flow up to the exit; its features are the last one's map."""
        maps, x, read, made = state
        f, first, last = self.stages[k]
        for j in range(first, last):
            x, trace = self.scale_flows[f][j](x, read[j] if j < len(read) else [])
            made = [*made, trace] if maps else []  # nothing reads the last flow's traces
        if last < len(self.scale_flows[f]):
            return x, (maps, x, [], made)  # all fusion blocks come before the flow's first exit
        return x, (maps[1:], maps[0], made, []) if maps else None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C] from the map."""
        return self.classifier[k](features)


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
