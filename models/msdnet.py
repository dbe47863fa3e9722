"""MSDNet: Multi-Scale Dense Networks for Resource Efficient Image Classification
(https://arxiv.org/abs/1703.09844).

Feature maps of several scales advance together through dense layers; every exit reads the coarsest one. The
last layers before an exit therefore make fine maps that this exit never reads. A stage here computes what its
exit reads and nothing more; what it left out is made by the first later stage that reads it, for the samples
that are still there.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers import ConvUnit, ImageNetStem, MapClassifier, init_he_out
from models.multi_exit import MultiExitModel, State
from models.registry import register


class Stem(nn.Module):
    """Images to one map per scale; scale s has `widths[s]` channels and half the side of scale s - 1."""

    def __init__(self, stem: str, widths: list[int]) -> None:
        super().__init__()
        finest = ConvUnit(3, widths[0]) if stem == "cifar" else ImageNetStem(widths[0])
        coarser = [ConvUnit(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = nn.ModuleList([finest, *coarser])

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to maps, fine to coarse."""
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class DenseUnit(nn.Module):
    """One scale of one layer: appends new channels, made from this scale and, if fused, from the finer one
    too."""

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
        parts = [x, self.conv_normal(x)] if finer is None else [x, self.conv_down(finer), self.conv_normal(x)]
        return torch.cat(parts, dim=1)


class Layer(nn.Module):
    """One dense layer; `layers[i]` is the unit of scale `first + i`."""

    def __init__(self, units: list[DenseUnit], first: int, arriving: int) -> None:
        """`first` and `arriving`: finest scale that leaves and that arrives."""
        super().__init__()
        self.layers = nn.ModuleList(units)
        self.first, self.arriving = first, arriving

    @property
    def units(self) -> nn.ModuleList:
        """One unit per scale that leaves, finest first."""
        return self.layers

    def finest_read(self, scale: int) -> int:
        """The finest scale that this layer's map of `scale` is made from."""
        return max(scale - 1, self.arriving)

    def forward(self, scale: int, maps: list[Tensor]) -> Tensor:
        """The new map of `scale` from the maps of the layer before; the last entry of `maps` is the coarsest
        scale."""
        at = scale - self.first - len(self.layers)
        return self.layers[at](maps[at], maps[at - 1] if self.finest_read(scale) < scale else None)


class Transition(nn.Module):
    """A 1x1 unit per surviving scale that compresses the channels; `m[i]` is that of scale `first + i`."""

    def __init__(self, widths_in: list[int], widths_out: list[int], first: int) -> None:
        super().__init__()
        self.m = nn.ModuleList(ConvUnit(a, b, kernel=1) for a, b in zip(widths_in, widths_out, strict=True))
        self.first = first

    @property
    def units(self) -> nn.ModuleList:
        """One unit per scale that leaves, finest first."""
        return self.m

    def finest_read(self, scale: int) -> int:
        """The finest scale that this transition's map of `scale` is made from: itself."""
        return scale

    def forward(self, scale: int, maps: list[Tensor]) -> Tensor:
        """The compressed map of `scale`; the last entry of `maps` is the coarsest scale."""
        at = scale - self.first - len(self.m)
        return self.m[at](maps[at])


def _finest_scales(layer: int, num_layers: int, num_scales: int, prune: str) -> tuple[int, int]:
    """The finest scale that arrives at a layer (numbered from 1) and the finest that leaves it."""
    if prune == "min":
        return max(0, num_scales - num_layers + layer - 2), max(0, num_scales - num_layers + layer - 1)
    interval = math.ceil(num_layers / num_scales)
    return max(0, layer - 2) // interval, (layer - 1) // interval


def _dense_units(
    channels: int, growth: int, gr: Sequence[int], bn: Sequence[int], arriving: int, first: int
) -> list:
    """The units of one layer that is entered with `channels` channels per unit of `gr`; see `MSDNet` for the
    others."""
    return [
        DenseUnit(
            channels * gr[s],
            growth * gr[s],
            bn[s],
            finer=(channels * gr[s - 1], bn[s - 1]) if s > arriving else None,
        )
        for s in range(first, len(gr))
    ]


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} is {value!r}; accepted: {', '.join(choices)}")


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
        reduction: channels kept by a transition; 0 = no transitions.
        init: "default" (PyTorch's, which all published MSDNets were trained from) or "he" (what their code
            declares).
        lazy: compute only what an exit reads; false runs whole blocks, the published order of execution.
        bnAfter: only true: batch norm follows its convolution, as in all published networks.
    """

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
        _check_choice("stem", stem, ("cifar", "imagenet"))
        _check_choice("stepmode", stepmode, ("even", "lin_grow"))
        _check_choice("prune", prune, ("max", "min"))
        _check_choice("init", init, ("default", "he"))
        counts = {
            "nBlocks": nBlocks,
            "base": base,
            "step": step,
            "nChannels": nChannels,
            "growthRate": growthRate,
        }
        for option, value in counts.items():
            if value < 1:
                raise ValueError(f"{option} is {value}; it must be at least 1")
        if not bnAfter:
            raise ValueError("bnAfter is False; batch norm always follows its convolution")
        if len(grFactor) == 0 or len(bnFactor) != len(grFactor):
            raise ValueError(
                f"bnFactor {list(bnFactor)} and grFactor {list(grFactor)} need one number per scale each"
            )
        if any(growthRate * g % 2 for g in grFactor[1:]):
            raise ValueError(
                f"growthRate {growthRate} times grFactor {list(grFactor)} must be even beyond the first scale"
            )
        if not 0 <= reduction < 1:
            raise ValueError(f"reduction is {reduction}; it must be at least 0 and below 1")
        self.num_exits, self.num_scales = nBlocks, len(grFactor)

        bn = bnFactor if bottleneck else [0] * self.num_scales
        blocks = [[Stem(stem, [nChannels * g for g in grFactor])]] + [[] for _ in range(nBlocks - 1)]
        heads, channels, done = [], nChannels, 0
        layers_per_block = [base] + [step if stepmode == "even" else step * i + 1 for i in range(1, nBlocks)]
        total = sum(layers_per_block)
        for block, count in zip(blocks, layers_per_block, strict=True):
            for depth in range(done + 1, done + count + 1):
                arriving, first = _finest_scales(depth, total, self.num_scales, prune)
                units = _dense_units(channels, growthRate, grFactor, bn, arriving, first)
                block.append(Layer(units, first, arriving))
                channels += growthRate
                at_transition = first > arriving if prune == "max" else depth in (total // 3, 2 * total // 3)
                if at_transition and reduction > 0:
                    reduced = math.floor(reduction * channels)
                    widths = [[c * g for g in grFactor[first:]] for c in (channels, reduced)]
                    block.append(Transition(*widths, first))
                    channels = reduced
            done += count
            n_in = channels * grFactor[-1]
            heads.append(MapClassifier(n_in, 128 if stem == "cifar" else n_in, num_classes))
        self.blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.classifier = nn.ModuleList(heads)
        self.plan, self.kept = self._plan(lazy)
        self._freeze_unread()
        if init == "he":
            self.apply(init_he_out)

    def _elements(self, exits: int) -> list[tuple[int, int]]:
        """(block, index) of all layers and transitions up to an exit, in order."""
        return [(b, j) for b in range(exits) for j in range(b == 0, len(self.blocks[b]))]

    def _finest_needed(self, exits: int) -> dict[tuple[int, int], int]:
        """Per element, the finest scale of its output that the last of `exits` exits depends on."""
        needed, scale = {}, self.num_scales - 1
        for b, j in reversed(self._elements(exits)):
            needed[b, j] = scale
            scale = self.blocks[b][j].finest_read(scale)  # walks back from the coarsest map
        return dict(reversed(needed.items()))

    def _plan(self, lazy: bool) -> tuple[list[list[tuple[int, int, int]]], list[int]]:
        """Per exit, the (block, index, scale) to run in order, and the number of maps that later exits still
        read."""
        done = dict.fromkeys(self._elements(self.num_exits), self.num_scales)
        plan, finest_reads = [], []
        for exits in range(1, self.num_exits + 1):
            needed = self._finest_needed(exits)
            if not lazy:
                needed = {(b, j): self.blocks[b][j].first for b, j in needed}
            # Coarse scales first: a fused unit reads the finer map as it was before this layer.
            plan.append([(*at, s) for at in needed for s in reversed(range(needed[at], done[at]))])
            finest_reads.append(min(self.blocks[b][j].finest_read(s) for b, j, s in plan[-1]))
            done |= needed
        return plan, [
            self.num_scales - min(finest_reads[k:], default=self.num_scales) for k in range(1, len(plan) + 1)
        ]

    def _freeze_unread(self) -> None:
        """Units whose output no exit reads keep their keys, but get no gradient (where more than one scale
        leaves)."""
        for (b, j), finest in self._finest_needed(self.num_exits).items():
            element = self.blocks[b][j]
            element.units[: finest - element.first].requires_grad_(False)

    def begin(self, images: Tensor) -> State:
        """The state is one map per scale, fine to coarse, each advanced just as far as an exit so far could
        see."""
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
