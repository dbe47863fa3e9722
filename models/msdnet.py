"""MSDNet: Multi-Scale Dense Networks for Resource Efficient Image Classification.

https://arxiv.org/abs/1703.09844

Feature maps of several scales advance together through dense layers; every exit reads the coarsest one. The
last layers before an exit therefore make fine maps that this exit never reads. A stage here computes only
what its exit reads; what it left out is computed by the first later stage that reads it, for the samples that
have not left.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.layers import (
    ConvUnit,
    ImageNetStem,
    MapChain,
    MapClassifier,
    check_at_least,
    check_choice,
    check_dense_options,
    init_he_out,
)
from models.multi_exit import MultiExitModel, State
from models.registry import register


class Stem(MapChain):
    """Images to one map per scale; scale s has `widths[s]` channels and half the side of scale s - 1."""

    def __init__(self, stem: str, widths: list[int]) -> None:
        finest = ConvUnit(3, widths[0]) if stem == "cifar" else ImageNetStem(widths[0])
        super().__init__(finest, *(ConvUnit(a, b, stride=2) for a, b in pairwise(widths)))


class DenseUnit(nn.Module):
    """One scale of one layer: appends channels made from this scale and, if fused, the finer one too."""

    def __init__(
        self, n_in: int, n_new: int, bottleneck: int, *, finer: tuple[int, int] | None = None
    ) -> None:
        """`finer`: channels and bottleneck factor of the finer scale for a fused unit."""
        super().__init__()
        if finer:
            n_new = n_new // 2
            self.conv_down = ConvUnit(finer[0], n_new, stride=2, bottleneck=finer[1])
        self.conv_normal = ConvUnit(n_in, n_new, bottleneck=bottleneck)

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        """[B, C, H, W], and [B, C', 2H, 2W] for a fused unit, to [B, C + new, H, W]."""
        fused = [] if finer is None else [self.conv_down(finer)]
        return torch.cat([x, *fused, self.conv_normal(x)], dim=1)


class Layer(nn.Module):
    """One dense layer; `layers[i]` is the unit of scale `first + i`."""

    def __init__(self, units: list[DenseUnit], first: int, arriving: int) -> None:
        """`first` and `arriving`: finest scale that leaves and that arrives."""
        super().__init__()
        self.layers = nn.ModuleList(units)
        self.first = first
        self.arriving = arriving

    def finest_read(self, scale: int) -> int:
        """The finest scale that this layer's map of `scale` is made from."""
        return max(scale - 1, self.arriving)

    def forward(self, scale: int, maps: list[Tensor]) -> Tensor:
        """The new map of `scale` from the maps of the layer before, of which the last is the coarsest."""
        at = scale - self.first - len(self.layers)
        finer = maps[at - 1] if self.finest_read(scale) < scale else None
        return self.layers[at](maps[at], finer)


class Transition(nn.Module):
    """A 1x1 unit per surviving scale that compresses the channels; `m[i]` is that of scale `first + i`."""

    def __init__(self, widths_in: list[int], widths_out: list[int], first: int) -> None:
        super().__init__()
        self.m = nn.ModuleList(ConvUnit(a, b, kernel=1) for a, b in zip(widths_in, widths_out, strict=True))
        self.first = first

    def finest_read(self, scale: int) -> int:
        """The finest scale that this transition's map of `scale` is made from: itself."""
        return scale

    def forward(self, scale: int, maps: list[Tensor]) -> Tensor:
        """The compressed map of `scale`; the last entry of `maps` is the coarsest scale."""
        at = scale - self.first - len(self.m)
        return self.m[at](maps[at])


class Plan(NamedTuple):
    """How a network is built; the names are options of `MSDNet`."""

    stem: str
    layers: list[int]  # dense layers of each block
    nChannels: int
    growthRate: int
    grFactor: Sequence[int]
    bnFactor: Sequence[int]  # zeros without bottleneck
    prune: str
    reduction: float

    def finest_scales(self, depth: int) -> tuple[int, int]:
        """The finest scale that arrives at layer `depth` (numbered from 1) and the finest that leaves it."""
        total = sum(self.layers)
        scales = len(self.grFactor)
        if self.prune == "min":
            leaving = scales - total + depth - 1
            return max(0, leaving - 1), max(0, leaving)
        interval = math.ceil(total / scales)
        return max(0, depth - 2) // interval, (depth - 1) // interval

    def compresses(self, depth: int) -> bool:
        """Whether a transition follows layer `depth`."""
        if self.reduction == 0:
            return False
        if self.prune == "min":
            return depth in (sum(self.layers) // 3, 2 * sum(self.layers) // 3)
        arriving, leaving = self.finest_scales(depth)
        return leaving > arriving

    def layer(self, depth: int, channels: int) -> Layer:
        """Layer `depth`, entered with `channels` channels per unit of grFactor."""
        gr, bn = self.grFactor, self.bnFactor
        arriving, first = self.finest_scales(depth)
        units = []
        for s in range(first, len(gr)):
            finer = (channels * gr[s - 1], bn[s - 1]) if s > arriving else None
            units.append(DenseUnit(channels * gr[s], self.growthRate * gr[s], bn[s], finer=finer))
        return Layer(units, first, arriving)

    def blocks(self) -> Iterator[tuple[nn.ModuleList, int]]:
        """Makes the blocks one by one, the first with the stem; yields also their coarsest maps' channels."""
        block = nn.ModuleList([Stem(self.stem, [self.nChannels * g for g in self.grFactor])])
        channels = self.nChannels
        depth = 0
        for count in self.layers:
            for _ in range(count):
                depth += 1
                layer = self.layer(depth, channels)
                block.append(layer)
                channels += self.growthRate
                if self.compresses(depth):
                    reduced = math.floor(self.reduction * channels)
                    widths = [[c * g for g in self.grFactor[layer.first :]] for c in (channels, reduced)]
                    block.append(Transition(*widths, layer.first))
                    channels = reduced
            yield block, channels * self.grFactor[-1]
            block = nn.ModuleList()


class MSDNet(MultiExitModel):
    """Multi-scale dense network with one exit per block. Options carry the names of the published commands.

    Args:
        stem: "cifar" (full resolution) or "imagenet" (7x7 convolution and pooling; wider classifiers).
        nBlocks, base, step, stepmode: the first block has `base` layers, block i then `step` ("even") or
            `step * i + 1` ("lin_grow").
        nChannels, growthRate: channels of the finest scale at the input of layer 1, and added per layer.
        grFactor, bnFactor: per scale, fine to coarse: multiples of the channels; bottleneck width in
            multiples of the channels added. Their length is the number of scales.
        bottleneck: put a 1x1 reduction before every 3x3 convolution.
        prune: "max" or "min", how fine scales are dropped with depth.
        reduction: share of the channels that a transition keeps; 0 = no transitions, 1 = they keep the width.
        init: "default" (PyTorch's, which all published MSDNets were trained from) or "he" (what their code
            declares).
        lazy: compute only what an exit reads; false runs whole blocks, the published order of execution.
        bnAfter: only true: batch norm follows its convolution, as in all published networks.
    """

    interpolation = "bilinear"

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        stem: str = "cifar",
        nBlocks: int = 5,
        base: int = 1,
        step: int = 1,
        stepmode: str = "lin_grow",
        nChannels: int = 16,
        growthRate: int = 6,
        grFactor: Sequence[int] = (1, 2, 4),
        bnFactor: Sequence[int] = (1, 2, 4),
        bottleneck: bool = True,
        prune: str = "max",
        reduction: float = 0.5,
        init: str = "default",
        lazy: bool = True,
        bnAfter: bool = True,
    ) -> None:
        super().__init__()
        check_dense_options(stem, stepmode, ("even", "lin_grow"), bnAfter)
        check_choice("prune", prune, ("max", "min"))
        check_choice("init", init, ("default", "he"))
        counts = {"nBlocks": nBlocks, "base": base, "step": step}
        check_at_least(1, **counts, nChannels=nChannels, growthRate=growthRate)
        _check(grFactor, bnFactor, growthRate, reduction)
        self.num_exits = nBlocks
        self.num_scales = len(grFactor)
        layers = [base, *(step if stepmode == "even" else step * i + 1 for i in range(1, nBlocks))]
        bn = bnFactor if bottleneck else [0] * self.num_scales
        plan = Plan(stem, layers, nChannels, growthRate, grFactor, bn, prune, reduction)
        self.blocks = nn.ModuleList()
        self.classifier = nn.ModuleList()
        for block, n_in in plan.blocks():
            self.blocks.append(block)
            self.classifier.append(MapClassifier(n_in, 128 if stem == "cifar" else n_in, num_classes))
        self.plan, self.kept = self._plan(lazy)
        self._freeze_unread()
        if init == "he":
            init_he_out(self, zero_bias=nn.Linear)

    def _elements(self, exits: int) -> list[tuple[int, int]]:
        """(block, index) of all layers and transitions up to an exit, in order."""
        return [(b, j) for b in range(exits) for j in range(b == 0, len(self.blocks[b]))]

    def _finest_needed(self, exits: int) -> dict[tuple[int, int], int]:
        """Per element, the finest scale of its output that the last of `exits` exits depends on."""
        needed = {}
        scale = self.num_scales - 1
        for b, j in reversed(self._elements(exits)):
            needed[b, j] = scale
            scale = self.blocks[b][j].finest_read(scale)  # walks back from the coarsest map
        return dict(reversed(needed.items()))

    def _plan(self, lazy: bool) -> tuple[list[list[tuple[int, int, int]]], list[int]]:
        """Per exit, the (block, index, scale) to run in order; and how many maps later exits read."""
        done = dict.fromkeys(self._elements(self.num_exits), self.num_scales)
        plan = []
        finest_reads = []
        for exits in range(1, self.num_exits + 1):
            needed = self._finest_needed(exits)
            if not lazy:
                needed = {(b, j): self.blocks[b][j].first for b, j in needed}
            # Coarse scales first: a fused unit reads the finer map as it was before this layer.
            runs = [(b, j, s) for b, j in needed for s in reversed(range(needed[b, j], done[b, j]))]
            plan.append(runs)
            finest_reads.append(min(self.blocks[b][j].finest_read(s) for b, j, s in runs))
            done |= needed
        finest_reads.append(self.num_scales)
        kept = [self.num_scales - min(finest_reads[k + 1 :]) for k in range(self.num_exits)]
        return plan, kept

    def _freeze_unread(self) -> None:
        """Freezes units whose output no exit reads, where more than one scale leaves; their keys stay."""
        for (b, j), finest in self._finest_needed(self.num_exits).items():
            element = self.blocks[b][j]
            (units,) = element.children()  # one per scale that leaves, finest first
            units[: finest - element.first].requires_grad_(False)

    def begin(self, images: Tensor) -> State:
        """The state is one map per scale, fine to coarse, each as far as the exits so far needed it."""
        return self.blocks[0][0](images)

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """Runs what exit k reads and no earlier exit ran; its features are the coarsest map."""
        maps = list(state)
        for b, j, scale in self.plan[k]:
            maps[scale - self.num_scales] = self.blocks[b][j](scale, maps)
        return maps[-1], maps[len(maps) - self.kept[k] :]

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C] from the coarsest map."""
        return self.classifier[k](features)


def _check(gr: Sequence[int], bn: Sequence[int], growth: int, reduction: float) -> None:
    if len(gr) == 0 or len(bn) != len(gr):
        raise UserError(f"bnFactor {list(bn)} and grFactor {list(gr)} need one number per scale each")
    if any(growth * g % 2 for g in gr[1:]):
        raise UserError(f"growthRate {growth} times grFactor {list(gr)} must be even beyond the first scale")
    if not 0 <= reduction <= 1:
        raise UserError(f"reduction is {reduction}; it must be at least 0 and at most 1")


register(MSDNet, "msdnet", "MSDNet; the options default to the CIFAR budgeted configuration")
register(MSDNet, "msdnet_cifar_lin5", "CIFAR, 5 exits, budgeted batch (also L2W's)")
register(MSDNet, "msdnet_cifar_even7", "CIFAR, 7 exits, anytime", nBlocks=7, stepmode="even", step=2, base=4)
for _step, _base, _name, _about in (
    (4, 4, "step4", "ImageNet, 5 exits, step 4"),
    (6, 4, "step6", "ImageNet, 5 exits, step 6, as L2W"),
    (7, 4, "step7", "ImageNet, 5 exits, step 7, as L2W"),
    (7, 7, "step7_base7", "ImageNet, 5 exits, step 7, as MSDNet's authors"),
):
    register(
        MSDNet,
        f"msdnet_imagenet_{_name}",
        _about,
        stem="imagenet",
        stepmode="even",
        step=_step,
        base=_base,
        nChannels=32,
        growthRate=16,
        grFactor=(1, 2, 4, 4),
        bnFactor=(1, 2, 4, 4),
    )
