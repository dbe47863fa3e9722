"""Networks for 32 x 32 images with one exit, as EBJR's model zoo has them (https://arxiv.org/abs/2110.10343).

DenseNet-BC (https://arxiv.org/abs/1608.06993), ResNet (1512.03385), PreResNet (1603.05027), Wide ResNet
(1605.07146), ResNeXt (1611.05431), VGG (1409.1556) and AlexNet. Weights have the names and shapes of the
released files.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.multi_exit import MultiExitModel, State
from models.registry import register


def conv(
    n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size of the map, stride aside."""
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=bias)


def init_he_out(module: nn.Module) -> None:
    """Convolutions from N(0, sqrt(2 / (k * k * out))), for `Module.apply`; linear layers stay as they are."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def blocks_of(depth: int, first: int, step: int, what: str) -> int:
    """n of depth = step * n + first. Raises ValueError where there is none."""
    if depth < step + first or (depth - first) % step:
        near = max(1, round((depth - first) / step))
        accepted = ", ".join(str(step * n + first) for n in sorted({max(1, near - 1), near, near + 1}))
        raise ValueError(f"depth is {depth}; {what} accepts {step}n + {first}, as in {accepted}")
    return (depth - first) // step


class CifarNet(MultiExitModel):
    """One exit; a family writes `features`, images to the last map, and names its linear layer."""

    num_exits = 1
    normalisation = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    classifier_name = "fc"

    def features_of(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the last map [B, C, h, w]."""
        raise NotImplementedError

    def begin(self, images: Tensor) -> State:
        """The state is the images [B, 3, H, W]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The last map's mean [B, C]; 8 x 8 positions for images of 32 pixels."""
        return self.pool(self.features_of(state)).flatten(1), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.get_submodule(self.classifier_name)(features)


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 convolution to 4 `growth` channels, the same with 3x3 to `growth`, joined to the
    input."""

    folds = (("conv1", "bn2"),)

    def __init__(self, n_in: int, growth: int, drop: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), conv(n_in, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)
        self.relu, self.drop = nn.ReLU(inplace=True), drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_in + growth, H, W], new channels last."""
        new = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return torch.cat([x, F.dropout(new, self.drop, self.training)], 1)


class Transition(nn.Module):
    """Batch norm, ReLU, 1x1 convolution and 2x2 mean: [B, n_in, H, W] to [B, n_out, H / 2, W / 2]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.bn1, self.conv1, self.relu = nn.BatchNorm2d(n_in), conv(n_in, n_out, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """See the class. The published counter does not see a functional mean, so it must stay one."""
        return F.avg_pool2d(self.conv1(self.relu(self.bn1(x))), 2)


class CifarDenseNet(CifarNet):
    """DenseNet-BC: three dense blocks of (depth - 4) / 6 layers.

    Args:
        depth: 6n + 4.
        growthRate: channels that each layer adds.
        compressionRate: by how much a transition divides the channels.
        dropRate: dropout behind each layer.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        depth: int = 22,
        growthRate: int = 12,
        compressionRate: int = 2,
        dropRate: float = 0.0,
    ) -> None:
        super().__init__()
        count = blocks_of(depth, 4, 6, "DenseNet-BC")
        width = 2 * growthRate
        self.conv1 = conv(3, width)
        for i in (1, 2, 3):
            layers = [DenseLayer(width + j * growthRate, growthRate, dropRate) for j in range(count)]
            self.add_module(f"dense{i}", nn.Sequential(*layers))
            width += count * growthRate
            if i < 3:
                self.add_module(f"trans{i}", Transition(width, width // compressionRate))
                width //= compressionRate
        self.bn, self.relu, self.pool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        self.apply(init_he_out)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = self.trans1(self.dense1(self.conv1(images)))
        return self.relu(self.bn(self.dense3(self.trans2(self.dense2(x)))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 to four times the width, added to the shortcut.

    Batch norm and ReLU come before each convolution if `before`, else behind; a shortcut of another shape is
    a 1x1 convolution, with batch norm where that comes behind, of the block's raw input.
    """

    def __init__(self, n_in: int, planes: int, stride: int, *, bottleneck: bool, before: bool) -> None:
        super().__init__()
        convs = [(1, planes, 1), (3, planes, stride), (1, 4 * planes, 1)]
        convs = convs if bottleneck else [(3, planes, stride), (3, planes, 1)]
        self.before, self.count, width = before, len(convs), n_in
        pairs = [(f"conv{i}", f"bn{i + 1 if before else i}") for i in range(1, len(convs) + 1)]
        self.folds = pairs[:-1] if before else pairs
        for i, (kernel, n_out, step) in enumerate(convs, 1):
            parts = {
                f"conv{i}": conv(width, n_out, kernel, step),
                f"bn{i}": nn.BatchNorm2d(width if before else n_out),
            }
            for name in sorted(parts, reverse=not before):  # in the order of execution
                self.add_module(name, parts[name])
            width = n_out
        self.relu, self.downsample = nn.ReLU(inplace=not before), None
        if stride > 1 or width != n_in:
            norm = [] if before else [nn.BatchNorm2d(width)]
            self.downsample = nn.Sequential(conv(n_in, width, 1, stride), *norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        y = x
        for i in range(1, self.count + 1):
            layer, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            if self.before:
                y = layer(self.relu(norm(y)))
            else:
                y = norm(layer(y)) if i == self.count else self.relu(norm(layer(y)))
        y = y + (x if self.downsample is None else self.downsample(x))
        return y if self.before else self.relu(y)


class CifarResNet(CifarNet):
    """ResNet of three stages.

    Args:
        depth: 6n + 2 of "BasicBlock", 9n + 2 of "Bottleneck".
        block_name: which.
    """

    before = False

    def __init__(self, *, num_classes: int = 10, depth: int = 20, block_name: str = "BasicBlock") -> None:
        super().__init__()
        if block_name not in ("BasicBlock", "Bottleneck"):
            raise ValueError(f"block_name is {block_name!r}; accepted: BasicBlock, Bottleneck")
        bottleneck = block_name == "Bottleneck"
        count = blocks_of(depth, 2, 9 if bottleneck else 6, block_name)
        self.conv1, width = conv(3, 16), 16
        if not self.before:
            self.bn1 = nn.BatchNorm2d(16)
        for i, planes in enumerate((16, 32, 64), 1):
            blocks = []
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(ResidualBlock(width, planes, stride, bottleneck=bottleneck, before=self.before))
                width = planes * (4 if bottleneck else 1)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        if self.before:
            self.bn = nn.BatchNorm2d(width)
        self.relu, self.pool, self.fc = (
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(width, num_classes),
        )
        self.apply(init_he_out)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = self.conv1(images)
        x = x if self.before else self.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.relu(self.bn(x)) if self.before else x


class CifarPreResNet(CifarResNet):
    """ResNet with batch norm and ReLU before every convolution; options as in CifarResNet."""

    before = True


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions; a shortcut of another width reads the activated input."""

    folds = (("conv1", "bn2"),)

    def __init__(self, n_in: int, n_out: int, stride: int, drop: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), conv(n_in, n_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), conv(n_out, n_out)
        self.relu, self.drop = nn.ReLU(), drop
        self.convShortcut = None if n_in == n_out else conv(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        active = self.relu(self.bn1(x))
        y = F.dropout(self.relu(self.bn2(self.conv1(active))), self.drop, self.training)
        return self.conv2(y) + (x if self.convShortcut is None else self.convShortcut(active))


class CifarWRN(CifarNet):
    """Wide ResNet: ResNet's widths times `widen_factor`; depth 6n + 4, dropout of `dropRate` in every
    block."""

    def __init__(
        self, *, num_classes: int = 10, depth: int = 28, widen_factor: int = 1, dropRate: float = 0.0
    ) -> None:
        super().__init__()
        count = blocks_of(depth, 4, 6, "WRN")
        self.conv1, width = conv(3, 16), 16
        for i, planes in enumerate((16, 32, 64), 1):
            n_out, blocks = planes * widen_factor, []
            for j in range(count):
                blocks.append(WideBlock(width, n_out, 2 if i > 1 and j == 0 else 1, dropRate))
                width = n_out
            self.add_module(f"block{i}", nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
        self.bn1, self.relu, self.pool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        self.apply(init_he_out)
        nn.init.zeros_(self.fc.bias)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(images))))))


register(CifarDenseNet, "cifar_densenet", "DenseNet-BC for 32 x 32 images")
for _depth, _growth in ((52, 6), (64, 12), (58, 6), (88, 8)):
    _about = f"DenseNet-BC of {_depth} layers and growth {_growth}, of EBJR's pairs"
    register(CifarDenseNet, f"cifar_densenet_{_depth}_{_growth}", _about, depth=_depth, growthRate=_growth)
register(CifarResNet, "cifar_resnet", "ResNet for 32 x 32 images")
register(CifarPreResNet, "cifar_preresnet", "pre-activation ResNet for 32 x 32 images")
register(CifarWRN, "cifar_wrn", "Wide ResNet for 32 x 32 images")
