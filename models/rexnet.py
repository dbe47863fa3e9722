"""ReXNet (https://arxiv.org/abs/2007.00992): each block a little wider than the last; V1, lite, with exits.

Weights have the names and shapes of the published files, which load unchanged into variants without exits.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.backbones import CORES, Backbone
from models.bases import Spans
from models.errors import UserError
from models.layers import check_at_least, rounded
from models.registry import register
from models.rexnet_blocks import (
    BLOCKS,
    HIDDEN,
    LAST,
    STEM,
    WIDTH,
    Block,
    Excite,
    Style,
    V1Plan,
    stack,
    widths,
)

# After the third, fourth and fifth stage; with the network's own exit at strides 8, 16, 16 and 32.
EXITS = (4, 7, 10)
STEM_LAYERS = 3  # convolution, batch norm, activation


class ReXNet(Spans):
    """Blocks in a row with a classifier at the end and, on request, lighter exits after some of them.

    A family sets `features` (three layers of stem, the blocks, three layers before the classifier) and
    `output`, and ends its constructor with `_add_exits`.
    """

    features: nn.Sequential
    output: nn.Sequential

    def _add_exits(
        self, exits: Sequence[int], outs: Sequence[int], head_width: int, num_classes: int, dropout: float
    ) -> None:
        """Light exits after the blocks `exits`, which put out `outs` channels."""
        last = len(outs) - 1
        if list(exits) != sorted({e for e in exits if 0 <= e < last}):
            raise UserError(
                f"exits is {list(exits)}; accepted: rising numbers of blocks from 0 to {last - 1}"
            )
        check_at_least(1, head_width=head_width)
        self.num_exits = len(exits) + 1
        # Of the layers that each exit needs.
        self.ends = [*(exit + STEM_LAYERS + 1 for exit in exits), len(self.features)]
        if exits:
            self.add_exits([outs[exit] for exit in exits], head_width, num_classes, dropout)

    def span(self, k: int, x: Tensor) -> Sequence[Tensor]:
        """The map after exit k's block, read by later blocks too; for the last exit the last map's mean."""
        start = self.ends[k - 1] if k else 0
        for layer in self.features[start : self.ends[k]]:
            x = layer(x)
        return [x, x] if k < self.num_exits - 1 else [x.mean((2, 3), keepdim=True)]

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return super().head(k, features) if k < self.num_exits - 1 else self.output(features).flatten(1)


class ReXNetV1(ReXNet):
    """ReXNetV1: SiLU, squeeze and excitation, ReLU6. Options carry the names of the published constructor.

    Args:
        input_ch, final_ch: width of the first block and what all blocks together add to it, before
            `width_mult`.
        width_mult: of all widths; below 1 the stem and the first block keep theirs.
        depth_mult: blocks per stage, in multiples of 1 2 2 3 3 5, rounded up.
        use_se: squeeze and excitation from the third stage on.
        se_ratio: by how much they squeeze the expanded width.
        dropout_ratio: before every classifier.
        bn_momentum: accepted and without effect, as published.
        exits: numbers, from 0, of the blocks after which a light exit stands; the network's own is always
            the last.
        head_width: channels that such an exit classifies by.
        drop_path: stochastic depth, rising linearly to this rate.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        input_ch: int = WIDTH,
        final_ch: int = 180,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        use_se: bool = True,
        se_ratio: int = 12,
        dropout_ratio: float = 0.2,
        bn_momentum: float = 0.9,
        exits: Sequence[int] = (),
        head_width: int = 512,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check(width_mult=width_mult, depth_mult=depth_mult, input_ch=input_ch, se_ratio=se_ratio)
        plan = V1Plan(width_mult, input_ch, final_ch, depth_mult)
        blocks = plan.blocks(se_ratio if use_se else 0, drop_path)
        self.features = plan.stem_layers().extend(blocks).extend(plan.last_layers())
        self.output = nn.Sequential(nn.Dropout(dropout_ratio), nn.Conv2d(plan.last, num_classes, 1))
        self._add_exits(exits, plan.outs, head_width, num_classes, dropout_ratio)

    def timm_modules(self) -> dict[str, str]:
        """Modules that hold weights to their names in timm's `rexnet_*`."""
        blocks = [layer for layer in self.features if isinstance(layer, Block)]
        count = len(blocks)
        end = len(self.output) - 1
        names = {"features.0": "stem.conv", "features.1": "stem.bn", f"output.{end}": "head.fc"}
        names[f"features.{count + STEM_LAYERS}"] = f"features.{count}.conv"
        names[f"features.{count + STEM_LAYERS + 1}"] = f"features.{count}.bn"
        for number, block in enumerate(blocks):
            here = f"features.{number + STEM_LAYERS}.out"
            for place, name in _timm_names(block, first=number == 0).items():
                names[f"{here}.{place}"] = f"features.{number}.{name}"
        return names


def _timm_names(block: Block, first: bool) -> dict[str, str]:
    """Places in `block.out` of the modules that hold weights, to timm's names inside the block."""
    units = iter(["conv_dw", "conv_pwl"] if first else ["conv_exp", "conv_dw", "conv_pwl"])
    names = {}
    for j, layer in enumerate(block.out):
        if isinstance(layer, nn.Conv2d):
            unit = next(units)
            names[f"{j}"] = f"{unit}.conv"
        elif isinstance(layer, nn.BatchNorm2d):
            names[f"{j}"] = f"{unit}.bn"
        elif isinstance(layer, Excite):
            names |= {f"{j}.fc.0": "se.fc1", f"{j}.fc.1": "se.bn", f"{j}.fc.3": "se.fc2"}
    return names


class ReXNetV1_lite(ReXNet):  # noqa: N801 (the published name)
    """ReXNetV1-lite: ReLU6 alone and rounded widths. Options carry the names of the published constructor.

    Args:
        fix_head_stem: the stem keeps 32 channels and the last convolution 1280, whatever the multiplier.
        divisible_value: every width is rounded to a multiple of it; 0 or none = not rounded.
        input_ch, final_ch: width of the first block and what all blocks together add to it, before
            `multiplier`.
        multiplier: of all widths; below 1 the stem, the first block and the last convolution keep theirs.
        dropout_ratio: before every classifier.
        bn_momentum, bn_eps: of every batch norm.
        kernel_conf: sizes of the depthwise kernels of the six stages, a digit each.
        exits, head_width, drop_path: as in ReXNetV1.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        fix_head_stem: bool = False,
        divisible_value: int | None = 8,
        input_ch: int = WIDTH,
        final_ch: int = 164,
        multiplier: float = 1.0,
        dropout_ratio: float = 0.2,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        kernel_conf: str = "333333",
        exits: Sequence[int] = (),
        head_width: int = 512,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check(multiplier=multiplier, input_ch=input_ch)
        if len(kernel_conf) != len(BLOCKS) or not set(kernel_conf) <= set("13579"):
            raise UserError(f"kernel_conf is {kernel_conf!r}; accepted: six odd digits, one per stage")

        def width_of(width: float) -> int:
            return rounded(round(width), divisible_value) if divisible_value else round(width)

        norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        style = Style(nn.ReLU6, kernels=[int(digit) for digit in kernel_conf], norm=norm)
        count = sum(BLOCKS)
        stem = width_of(STEM if fix_head_stem else STEM / min(multiplier, 1.0) * multiplier)
        outs = [width_of(width) for width in widths(input_ch, final_ch, multiplier, count, count - 1)]
        last = LAST if fix_head_stem else int(LAST * max(multiplier, 1.0))
        blocks = stack(stem, outs, BLOCKS, style, drop_path)
        self.features = style.conv(3, stem, 3, stride=2).extend(blocks).extend(style.conv(outs[-1], last))
        self.output = nn.Sequential(
            *(nn.Conv2d(last, HIDDEN, 1), norm(HIDDEN), nn.ReLU6(inplace=True)),
            *(nn.Dropout(dropout_ratio), nn.Conv2d(HIDDEN, num_classes, 1)),
        )
        self._add_exits(exits, outs, head_width, num_classes, dropout_ratio)


def _check(**options: float) -> None:
    for option, value in options.items():
        if value <= 0:
            raise UserError(f"{option} is {value}; it must be above 0")


def rexnet(drop_path: float | None, dropout: float | None, *, width_mult: float) -> Backbone:
    """ReXNetV1 as the CNN of a two-stream network, cut where the map gets smaller, as RegNet is."""
    plan = V1Plan(width_mult)
    blocks = plan.blocks(se_ratio=12, drop=drop_path or 0.0)
    stem = plan.stem_layers().append(blocks[0])
    stages = [nn.Sequential(*blocks[a:b]) for a, b in ((1, 3), (3, 5), (5, 11), (11, None))]
    stages[-1].extend(plan.last_layers())
    outs = plan.outs
    return Backbone(
        stem,
        stages,
        widths=(outs[0], outs[2], outs[4], outs[10], plan.last),
        strides=(2, 4, 8, 16),
        plain=[("stem", stem), *((f"cnn_body_stage{i}", stage) for i, stage in enumerate(stages, 1))],
        classifier_name="fc",
        classifier_before="classifier_merge",
        dropout=0.2 if dropout is None else dropout,
    )


register(ReXNetV1, "rexnetv1", "ReXNetV1")
register(ReXNetV1_lite, "rexnetv1_lite", "ReXNetV1-lite")
for _width in (90, 100, 130, 150, 200, 220, 300):
    _name = f"{_width:03}"
    _mult = _width / 100
    register(ReXNetV1, f"rexnetv1_{_name}", f"ReXNetV1 {_mult}x", width_mult=_mult)
    _about = f"ReXNetV1 {_mult}x with four exits"
    register(ReXNetV1, f"rexnet_ee_{_name}", _about, width_mult=_mult, exits=EXITS)
    CORES[f"rexnet_{_name}"] = partial(rexnet, width_mult=_mult)
for _width in (100, 130, 150, 200):
    _mult = _width / 100
    register(ReXNetV1_lite, f"rexnetv1_lite_{_width}", f"ReXNetV1-lite {_mult}x", multiplier=_mult)
    _about = f"ReXNetV1-lite {_mult}x with four exits"
    register(ReXNetV1_lite, f"rexnet_ee_lite_{_width}", _about, multiplier=_mult, exits=EXITS)
