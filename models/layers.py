"""Blocks that two families or more are made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError


def conv(
    n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size of the map, stride aside."""
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=bias)


def conv_norm(
    n_in: int,
    n_out: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    act: Callable[..., nn.Module] | None = None,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution without bias, batch norm and, if given, an activation (in place); keys `0` and `1`."""
    layers = nn.Sequential(conv(n_in, n_out, kernel, stride, groups), norm(n_out))
    return layers.append(act(inplace=True)) if act else layers


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU; after a 1x1 unit of its own if `bottleneck` is given.

    The 1x1 unit reduces to min(n_in, bottleneck * n_out) channels. Maps [B, n_in, H, W] to
    [B, n_out, ceil(H / stride), ceil(W / stride)]. Keys are `net.{0,1}` alone and `net.{0,1,3,4}` with the
    bottleneck.
    """

    def __init__(
        self, n_in: int, n_out: int, *, kernel: int = 3, stride: int = 1, bottleneck: int = 0
    ) -> None:
        super().__init__()
        self.net = nn.Sequential()
        if bottleneck:
            reduced = min(n_in, bottleneck * n_out)
            self.net.extend(conv_norm(n_in, reduced, act=nn.ReLU))
            n_in = reduced
        self.net.extend(conv_norm(n_in, n_out, kernel, stride=stride, act=nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ImageNetStem(nn.Sequential):
    """7x7 convolution with bias, batch norm, ReLU, max pooling: [B, 3, H, W] to [B, n_out, H / 4, W / 4]."""

    def __init__(self, n_out: int) -> None:
        super().__init__(
            conv(3, n_out, 7, stride=2, bias=True),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )


class MapChain(nn.Module):
    """A chain of layers, the first of which reads images [B, 3, H, W]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to the map after every layer."""
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class MapClassifier(nn.Module):
    """The exit of MSDNet and RANet: two strided units to `width` channels, average pooling, a linear layer.

    Maps [B, n_in, H, W] to logits [B, num_classes]. The papers pool 2x2, which at their image sizes leaves
    1x1; pooling whatever is left gives the same there and accepts every other size.
    """

    def __init__(self, n_in: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.m = nn.Sequential(
            ConvUnit(n_in, width, stride=2), ConvUnit(width, width, stride=2), nn.AdaptiveAvgPool2d(1)
        )
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.m(features).flatten(1))


class MapHead(nn.Sequential):
    """A light exit for a map anywhere in a network: [B, n_in, H, W] to logits [B, num_classes].

    A quarter of the positions (2x2 means), a 1x1 convolution to `width` channels, batch norm, SiLU, the mean
    over positions, dropout and a linear layer.
    """

    def __init__(self, n_in: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            nn.AvgPool2d(2, ceil_mode=True),
            *conv_norm(n_in, width, act=nn.SiLU),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(width, num_classes),
        )


class VectorHead(nn.Sequential):
    """A light exit for pooled features: [B, n_in] to logits [B, num_classes].

    Batch norm, a linear layer to `width` channels, SiLU, dropout and a linear layer.
    """

    def __init__(self, n_in: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            nn.BatchNorm1d(n_in),
            nn.Linear(n_in, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(width, num_classes),
        )


class SqueezeExcite(nn.Module):
    """Scales the channels by a gate that reads their means (arXiv 1709.01507): [B, C, H, W] to the same."""

    def __init__(self, width: int, squeezed: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.gate(self.fc2(F.relu(self.fc1(means))))


def rounded(value: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is at most a tenth smaller."""
    near = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * value else near


def rising(rate: float, count: int) -> list[float]:
    """Stochastic depth of `count` blocks: linear from 0 to `rate`."""
    return [rate * i / max(count - 1, 1) for i in range(count)]


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth: leaves a sample's branch out in training with this probability (arXiv 1603.09382)."""
    if not rate:
        return nn.Identity()
    from timm.layers import DropPath

    return DropPath(rate)


def pooled_residual(x: Tensor, conv: nn.Conv2d, side: int) -> Tensor:
    """`adaptive_avg_pool2d(x + conv(x), side)` in one convolution: [B, C, H, W] to [B, C, side, side].

    For a depthwise `conv` that keeps the size of the map, and H and W that are multiples of `side`. Adding,
    convolving and pooling are linear, so one strided kernel does them all. Computed in the type of the
    weights, also under autocast: there is little to multiply, and a CPU's kernels for wide depthwise windows
    are slower in half precision.
    """
    weight = conv.weight
    stride = (x.shape[2] // side, x.shape[3] // side)
    with torch.autocast(x.device.type, enabled=False):
        one = weight.new_ones(1, 1, 1, 1)
        identity = F.pad(one, [n for p in reversed(conv.padding) for n in (p, p)])
        mean = weight.new_full((1, 1, *stride), 1 / (stride[0] * stride[1]))  # its own mirror image
        kernel = F.conv2d(identity + weight, mean, padding=(stride[0] - 1, stride[1] - 1))
        x = x.to(weight.dtype)
        return F.conv2d(x, kernel, conv.bias, stride, conv.padding, groups=conv.groups)


def init_he_out(network: nn.Module, zero_bias: type | tuple[type, ...] = ()) -> None:
    """Draws convolutions from N(0, sqrt(2 / (k * k * out))); zeroes biases of layers of type `zero_bias`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, zero_bias) and module.bias is not None:
            nn.init.zeros_(module.bias)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless an option's value is among the choices."""
    if value not in choices:
        raise UserError(f"{option} is {value!r}; accepted: {', '.join(choices)}")


def check_at_least(least: int, **options: float) -> None:
    """Raises ValueError where an option is below `least`."""
    for option, value in options.items():
        if value < least:
            raise UserError(f"{option} is {value}; it must be at least {least}")


def check_dense_options(stem: str, stepmode: str, stepmodes: tuple[str, ...], norm_last: bool) -> None:
    """Raises ValueError for values that the common options of MSDNet and RANet do not have."""
    check_choice("stem", stem, ("cifar", "imagenet"))
    check_choice("stepmode", stepmode, stepmodes)
    if not norm_last:
        raise UserError("bnAfter is False; batch norm always follows its convolution")
