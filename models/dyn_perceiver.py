"""Dynamic Perceiver: a CNN and a latent branch that classifies early (https://arxiv.org/abs/2306.11248).

A learned array of tokens reads the CNN's maps (x2z), thinks (self attention) and writes back to them (z2x),
stage by stage. Exits 0 and 1 read the tokens after latent stages 3 and 4, exit 2 the CNN's last map, exit 3
both.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import CrossAttentionLayer, SelfAttentionLayer
from models.backbones import make_backbone
from models.layers import pooled_residual
from models.multi_exit import MultiExitModel, State
from models.registry import register

EXITS = ("early_classifier3", "classifier_att", "classifier_cnn", "classifier_merge")
LAYERS = (3, 3, 9, 3)  # self-attention layers per latent stage, times depth_factor
POOLED = 7  # side of the map that the tokens read with spatial_reduction


def tokens_of(x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to tokens [B, H * W, C]; no copy if they are channels-last."""
    return x.flatten(2).mT


def map_of(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse: tokens [B, H * W, C] to maps of the height and width of `like`."""
    return tokens.mT.unflatten(2, like.shape[2:])


class DynPerceiver(MultiExitModel):
    """Two-stream network with four exits. Options carry the names of the published commands.

    Args:
        core: the CNN, a name in `models.backbones.CORES`.
        num_latents: tokens of latent stage 1; stage i has `num_latents // 2 ** (i - 1)`.
        input_size: side of the images; matters only without `spatial_reduction`.
        depth_factor: self-attention layers of the four latent stages, in multiples of 3, 3, 9, 3.
        SA_widening_factor: hidden width of their MLPs, in multiples of the tokens' width.
        num_SA_heads: their heads, per stage.
        num_latent_channels: width of the latent array; only None or what the CNN's first stage reads.
        spatial_reduction: tokens read maps pooled to 7 x 7; false = not pooled, for square images of
            `input_size` only.
        with_x2z, with_z2x: tokens read maps before latent stages 2 to 4; maps read tokens before CNN stages 2
            to 4.
        with_dwc: a depthwise convolution before tokens read a map.
        with_last_CA: the last map reads the tokens before exit 3.
        with_isc: exits 1 and 3 read the logits of exits 0 and 1.
        drop_path: stochastic depth in the CNN, rising to this rate; None is the published 0.2 of ResNets,
            else 0.
        dropout: rate of all dropout; None is what was published: 0 in the latent branch, 0.2 before the last
            linear layer of ResNet's exit 2 and of MobileNet's exits 2 and 3.
    """

    num_exits = len(EXITS)
    loss_weights = (0.25, 0.25, 0.25, 0.5)
    embeddings = ("latent", "relative_position_bias")

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        core: str,
        num_latents: int,
        input_size: int = 224,
        depth_factor: Sequence[int] = (1, 1, 1, 1),
        SA_widening_factor: int = 4,
        num_SA_heads: Sequence[int] = (1, 2, 4, 8),
        num_latent_channels: int | None = None,
        spatial_reduction: bool = True,
        with_x2z: bool = True,
        with_z2x: bool = True,
        with_dwc: bool = True,
        with_last_CA: bool = True,
        with_isc: bool = True,
        drop_path: float | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        backbone = make_backbone(core, drop_path, dropout)
        *widths, last = backbone.widths
        tokens = [rounded_up(width) for width in widths]
        _check(tokens, num_latents, depth_factor, SA_widening_factor, num_SA_heads, num_latent_channels)
        self.stage_path, self.input_size = backbone.stage_path, input_size
        self.spatial_reduction, self.with_isc = spatial_reduction, with_isc
        self.latent = nn.Parameter(torch.randn(num_latents, tokens[0]).mul_(0.02).clamp_(-2, 2))
        self.cnn_stem = backbone.stem
        for name, part in backbone.body:
            self.add_module(name, part)

        def classifier_cnn(before: str) -> None:
            if before == backbone.classifier_before:
                self.classifier_cnn = backbone.classifier(num_classes)

        # Modules are made in the order of the published files, which numbers the parameters of their
        # optimizers.
        classifier_cnn("dwc1_x2z")
        latent_rate = dropout or 0.0
        for i, (width, token, stride) in enumerate(zip(widths, tokens, backbone.strides, strict=True), 1):
            reads, writes = i == 1 or with_x2z, i > 1 and with_z2x
            side = POOLED if spatial_reduction else -(-input_size // stride)
            if reads and with_dwc:
                self.add_module(f"dwc{i}_x2z", nn.Conv2d(width, width, 7, padding=3, groups=width))
            if reads:
                layer = CrossAttentionLayer(token, width, token, num_keys=side**2, dropout=latent_rate)
                self.add_module(f"cross_att{i}_x2z", layer)
            if writes:
                layer = CrossAttentionLayer(width, token, token // 8, dropout=latent_rate)
                self.add_module(f"cross_att{i}_z2x", layer)
            heads, depth = num_SA_heads[i - 1], LAYERS[i - 1] * depth_factor[i - 1]
            layers = [
                SelfAttentionLayer(token, heads=heads, factor=SA_widening_factor, dropout=latent_rate)
                for _ in range(depth)
            ]
            self.add_module(f"self_att{i}", nn.Sequential(*layers))
        if with_last_CA:
            self.last_cross_att_z2x = CrossAttentionLayer(last, tokens[3], last // 8, dropout=latent_rate)
        classifier_cnn("early_classifier3")
        connected = tokens[3] if with_isc else 0
        self.early_classifier3 = nn.Linear(tokens[2], num_classes)
        if with_isc:
            self.isc3 = _inter_stage_connection(num_classes, connected)
        self.classifier_att = nn.Linear(tokens[3] + connected, num_classes)
        if with_isc:
            self.isc4 = _inter_stage_connection(num_classes, connected)
        classifier_cnn("classifier_merge")
        merged = last + tokens[3] + connected
        self.classifier_merge = nn.Sequential(
            nn.BatchNorm1d(merged), *backbone.classifier_layers(merged, num_classes)
        )
        self.token_expander = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in zip(tokens, tokens[1:], strict=False)
        )
        counts = [num_latents // 2**i for i in range(4)]
        self.token_mixer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in zip(counts, counts[1:], strict=False)
        )
        # A classifier with a hidden layer holds its own.
        self.cnn_dropout = nn.Dropout(0.0 if backbone.hidden else backbone.dropout)
        self.to(memory_format=torch.channels_last)

    def begin(self, images: Tensor) -> State:
        """The state is the images, later (CNN map, tokens, logits of the latest latent exit or None)."""
        if not self.spatial_reduction and images.shape[2:] != (self.input_size, self.input_size):
            height, width = images.shape[2:]
            side = self.input_size
            raise ValueError(
                f"images of {height} x {width}; without spatial_reduction this network reads {side} x {side}"
            )
        return images.contiguous(memory_format=torch.channels_last)  # in which tokens are a view of a map

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """Exits 0, 1: mean token [B, C] (exit 1 with what exit 0 said); 2: mean of the last map; 3: all of
        these."""
        if k == 0:
            x = self.cnn_stem(state)
            z = self.latent.expand(len(x), -1, -1)
            z = self.self_att1(self._read(1, z, x))
            for i in (2, 3):
                x, z = self._latent_stage(i, x, z)
            return z.mean(1), (x, z, None)
        x, z, logits = state
        if k == 1:
            x, z = self._latent_stage(4, x, z)
            said = [self.isc3(logits)] if self.with_isc else []
            return torch.cat([z.mean(1), *said], 1), (x, z, None)
        if k == 2:
            x = self._stage(4)(x)
            return x.mean((2, 3)), (x, z, logits)
        x = self._write("last_cross_att_z2x", x, z)
        said = [self.isc4(logits)] if self.with_isc else []
        return torch.cat([x.mean((2, 3)), z.mean(1), *said], 1), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return getattr(self, EXITS[k])(
            self.cnn_dropout(features) if EXITS[k] == "classifier_cnn" else features
        )

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """Keeps the logits of exits 0 and 1 for the inter-stage connections that read them."""
        return (*state[:2], logits) if self.with_isc and k < 2 else state

    def _stage(self, i: int) -> nn.Module:
        return self.get_submodule(self.stage_path.format(i))

    def _latent_stage(self, i: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """CNN stage i - 1 and latent stage i, i = 2, 3, 4."""
        x = self._stage(i - 1)(x)
        z = self.token_mixer[i - 2](z.mT).mT  # (B, N / 2, C)
        z = self.token_expander[i - 2](z)
        x = self._write(f"cross_att{i}_z2x", x, z)
        z = self._read(i, z, x)
        return x, getattr(self, f"self_att{i}")(z)

    def _read(self, i: int, z: Tensor, x: Tensor) -> Tensor:
        """Tokens after reading the map (x2z), as they are if this stage does not read."""
        name = f"cross_att{i}_x2z"
        if not hasattr(self, name):
            return z
        dwc = getattr(self, f"dwc{i}_x2z", None)
        even = x.shape[2] % POOLED == 0 and x.shape[3] % POOLED == 0
        if dwc is not None and self.spatial_reduction and even and self.training and x.device.type == "cpu":
            # Measured on CPUs only. In evaluation as published, whose multiply-adds are reported.
            x = pooled_residual(x, dwc, POOLED)
        else:
            x = x if dwc is None else x + dwc(x)
            x = F.adaptive_avg_pool2d(x, POOLED) if self.spatial_reduction else x
        return getattr(self, name)(z, tokens_of(x))

    def _write(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        """The map after reading the tokens (z2x), as it is if this stage does not."""
        return map_of(getattr(self, name)(tokens_of(x), z), like=x) if hasattr(self, name) else x


def rounded_up(width: int) -> int:
    """The tokens' width beside a map of `width` channels: the next multiple of 8, which all numbers of heads
    divide."""
    return -(-width // 8) * 8


def _inter_stage_connection(num_classes: int, width: int) -> nn.Sequential:
    """Logits [B, num_classes] to a feature [B, width] for a later exit."""
    return nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))


def _check(
    widths: Sequence[int],
    num_latents: int,
    depth_factor: Sequence[int],
    widening: int,
    heads: Sequence[int],
    num_latent_channels: int | None,
) -> None:
    for option, values in (("depth_factor", depth_factor), ("num_SA_heads", heads)):
        values = list(values) if isinstance(values, Sequence) else values
        if not isinstance(values, list) or len(values) != 4 or min(values) < 1:
            raise ValueError(
                f"{option} is {values}; it takes four numbers of at least 1, one per latent stage"
            )
    if any(width % h for width, h in zip(widths, heads, strict=True)):
        raise ValueError(
            f"num_SA_heads is {list(heads)}; the tokens' widths {list(widths)} must be multiples of it"
        )
    if num_latents < 8:
        raise ValueError(f"num_latents is {num_latents}; it must be at least 8, since three stages halve it")
    if widening < 1:
        raise ValueError(f"SA_widening_factor is {widening}; it must be at least 1")
    if num_latent_channels not in (None, widths[0]):
        raise ValueError(f"num_latent_channels is {num_latent_channels}; this CNN accepts {widths[0]} only")


# Published name, core, and the numbers of tokens it is published with.
_VARIANTS = (
    ("reg400m", "regnet_y_400mf", (32, 64, 128, 256, 512)),
    ("reg800m", "regnet_y_800mf", (32, 64, 128, 256, 512)),
    ("reg1x6g", "regnet_y_1_6gf", (128, 256, 512)),
    ("reg3x2g", "regnet_y_3_2gf", (128, 256, 512)),
    ("resnet18", "resnet18", (128, 256, 512)),
    ("resnet34", "resnet34", (128, 256, 512)),
    ("resnet50", "resnet50", (64, 128, 256, 512)),
    ("resnet50_0375", "resnet50_0375", (64, 128, 256)),
    ("resnet50_050", "resnet50_050", (64, 128, 256)),
    ("resnet50_0625", "resnet50_0625", (128, 160, 192, 256)),
    ("resnet50_075", "resnet50_075", (128, 256)),
    ("mobilenetV3", "mobilenet_v3_large", (128, 256, 512)),
    *((f"rexnet{w}", f"rexnet_{w}", (128,)) for w in (100, 130, 150, 200)),
    *(
        (f"mobilenetV3_{w}", f"mobilenet_v3_large_{w}", (128, 256, 512))
        for w in ("0x5", "0x75", "1x25", "1x5", "2x0")
    ),
)
for _name, _core, _counts in _VARIANTS:
    for _count in _counts:
        _about = f"Dynamic Perceiver on {_core} with {_count} latent tokens"
        register(DynPerceiver, f"{_name}_perceiver_t{_count}", _about, core=_core, num_latents=_count)
