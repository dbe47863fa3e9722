"""ReXNet (https://arxiv.org/abs/2007.00992): every block a little wider than the one before; V1, lite, and
with exits.

Weights have the names and shapes of the published files, which load as they are into every variant without
exits.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.backbones import CORES, Backbone
from models.layers import MapHead, conv_norm, rounded
from models.multi_exit import MultiExitModel, State
from models.registry import register
from models.rexnet_blocks import BLOCKS, HIDDEN, LAST, STEM, WIDTH, Block, Excite, stack, v1_blocks, widths

# Behind the third, fourth and fifth stage; with the network's own exit at strides 8, 16, 16 and 32.
EXITS = (4, 7, 10)


class ReXNet(MultiExitModel):
    """A sequence of blocks with a classifier at its end and, on request, lighter ones behind some of the
    blocks.

    A family sets `features` (three layers of stem, the blocks, three layers before the classifier) and
    `output`.
    """

    features: nn.Sequential
    output: nn.Sequential

    def _add_exits(
        self, exits: Sequence[int], outs: Sequence[int], head_width: int, num_classes: int, dropout: float
    ) -> None:
        """Light heads behind the blocks `exits`, which put out `outs` channels."""
        last = len(outs) - 1
        if list(exits) != sorted({e for e in exits if 0 <= e < last}):
            raise ValueError(
                f"exits is {list(exits)}; accepted: rising numbers of blocks from 0 to {last - 1}"
            )
        if head_width < 1:
            raise ValueError(f"head_width is {head_width}; it must be at least 1")
        self.num_exits = len(exits) + 1
        self.ends = [*(exit + 4 for exit in exits), len(outs) + 6]  # of the features that each exit needs
        if exits:
            heads = (MapHead(outs[e], head_width, num_classes, act=nn.SiLU, dropout=dropout) for e in exits)
            self.exits = nn.ModuleList(heads)

    def begin(self, images: Tensor) -> State:
        """The state is a map, at first the images [B, 3, H, W]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The map behind the exit's block, which later blocks read too; for the last exit the mean of the
        last map."""
        start = self.ends[k - 1] if k else 0
        for layer in self.features[start : self.ends[k]]:
            state = layer(state)
        return (state, state) if k < self.num_exits - 1 else (state.mean((2, 3), keepdim=True), None)

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.exits[k](features) if k < self.num_exits - 1 else self.output(features).flatten(1)

    def extract_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the last map before pooling [B, C, H / 32, W / 32]."""
        for layer in self.features:
            images = layer(images)
        return images

    def timm_modules(self) -> dict[str, str]:
        """Modules that hold weights to their names in timm's `rexnet_*`; none for a network that timm does
        not have."""
        blocks = {i: layer for i, layer in enumerate(self.features) if isinstance(layer, Block)}
        count, end = len(blocks), len(self.output) - 1
        names = {"features.0": "stem.conv", "features.1": "stem.bn", f"output.{end}": "head.fc"}
        names |= {
            f"features.{count + 3}": f"features.{count}.conv",
            f"features.{count + 4}": f"features.{count}.bn",
        }
        for number, (i, block) in enumerate(blocks.items()):
            units = iter(["conv_exp", "conv_dw", "conv_pwl"] if number else ["conv_dw", "conv_pwl"])
            for j, layer in enumerate(block.out):
                at, there = f"features.{i}.out.{j}", f"features.{number}"
                if isinstance(layer, nn.Conv2d):
                    unit = next(units)
                    names[at] = f"{there}.{unit}.conv"
                elif isinstance(layer, nn.BatchNorm2d):
                    names[at] = f"{there}.{unit}.bn"
                elif isinstance(layer, Excite):
                    names |= {
                        f"{at}.fc.{n}": f"{there}.se.{name}"
                        for n, name in ((0, "fc1"), (1, "bn"), (3, "fc2"))
                    }
        return names


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
        exits: numbers, from 0, of the blocks behind which a light exit stands; the network's own is always
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
        options = (input_ch, final_ch, depth_mult, use_se, se_ratio)
        stem, outs, blocks = v1_blocks(width_mult, drop_path, *options)
        last = int(LAST * width_mult)
        self.features = nn.Sequential(
            *conv_norm(3, stem, 3, stride=2, act=nn.SiLU), *blocks, *conv_norm(outs[-1], last, act=nn.SiLU)
        )
        self.output = nn.Sequential(nn.Dropout(dropout_ratio), nn.Conv2d(last, num_classes, 1))
        self._add_exits(exits, outs, head_width, num_classes, dropout_ratio)


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
            raise ValueError(f"kernel_conf is {kernel_conf!r}; accepted: six odd digits, one per stage")
        norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        conv = partial(conv_norm, norm=norm)
        small, count = min(multiplier, 1.0), sum(BLOCKS)

        def width_of(width: float) -> int:
            return rounded(round(width), divisible_value) if divisible_value else round(width)

        stem = width_of(STEM if fix_head_stem else STEM / small * multiplier)
        outs = [width_of(width) for width in widths(input_ch, final_ch, multiplier, count, count - 1)]
        last = LAST if fix_head_stem else int(LAST * max(multiplier, 1.0))
        plan = {
            "kernels": kernel_conf,
            "act": nn.ReLU6,
            "middle": lambda *_: [nn.ReLU6(inplace=True)],
            "conv": conv,
        }
        blocks = stack(stem, outs, BLOCKS, drop_path, **plan)
        self.features = nn.Sequential(
            *conv(3, stem, 3, stride=2, act=nn.ReLU6), *blocks, *conv(outs[-1], last, act=nn.ReLU6)
        )
        hidden = [nn.Conv2d(last, HIDDEN, 1), norm(HIDDEN), nn.ReLU6(inplace=True), nn.Dropout(dropout_ratio)]
        self.output = nn.Sequential(*hidden, nn.Conv2d(HIDDEN, num_classes, 1))
        self._add_exits(exits, outs, head_width, num_classes, dropout_ratio)

    def timm_modules(self) -> dict[str, str]:
        """None: timm has no lite ReXNets."""
        return {}


def _check(**options: float) -> None:
    for option, value in options.items():
        if value <= 0:
            raise ValueError(f"{option} is {value}; it must be above 0")


def rexnet(drop_path: float | None, dropout: float | None, *, width_mult: float) -> Backbone:
    """ReXNetV1 as the CNN of a two-stream network, cut where the map gets smaller, as RegNet is."""
    width, outs, blocks = v1_blocks(width_mult, drop_path or 0.0)
    stem = nn.Sequential(*conv_norm(3, width, 3, stride=2, act=nn.SiLU), blocks[0])
    last = int(LAST * width_mult)
    tail = conv_norm(outs[-1], last, act=nn.SiLU)
    stages = [nn.Sequential(*blocks[1:3]), nn.Sequential(*blocks[3:5]), nn.Sequential(*blocks[5:11])]
    stages.append(nn.Sequential(*blocks[11:], *tail))
    parts = [(f"cnn_body_stage{i}", stage) for i, stage in enumerate(stages, 1)]
    return Backbone(
        stem,
        stages,
        (outs[0], outs[2], outs[4], outs[10], last),
        (2, 4, 8, 16),
        body=parts,
        stage_path="cnn_body_stage{}",
        plain=[("stem", stem), *parts],
        classifier_name="fc",
        classifier_before="classifier_merge",
        dropout=0.2 if dropout is None else dropout,
    )


register(ReXNetV1, "rexnetv1", "ReXNetV1")
register(ReXNetV1_lite, "rexnetv1_lite", "ReXNetV1-lite")
for _width in (90, 100, 130, 150, 200, 220, 300):
    _name, _mult = f"{_width:03}", _width / 100
    register(ReXNetV1, f"rexnetv1_{_name}", f"ReXNetV1 {_mult}x", width_mult=_mult)
    register(
        ReXNetV1, f"rexnet_ee_{_name}", f"ReXNetV1 {_mult}x with four exits", width_mult=_mult, exits=EXITS
    )
    CORES[f"rexnet_{_name}"] = partial(rexnet, width_mult=_mult)
for _width in (100, 130, 150, 200):
    _mult = _width / 100
    register(ReXNetV1_lite, f"rexnetv1_lite_{_width}", f"ReXNetV1-lite {_mult}x", multiplier=_mult)
    _about = f"ReXNetV1-lite {_mult}x with four exits"
    register(ReXNetV1_lite, f"rexnet_ee_lite_{_width}", _about, multiplier=_mult, exits=EXITS)
