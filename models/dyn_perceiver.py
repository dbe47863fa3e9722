"""Dynamic Perceiver: a CNN and a latent branch that classifies early (https://arxiv.org/abs/2306.11248).

A learned array of tokens reads the CNN's maps (x2z), thinks (self attention) and writes back to them (z2x),
stage by stage. Exits 0 and 1 read the tokens after latent stages 3 and 4, exit 2 the CNN's last map, exit 3
both.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import CrossAttentionLayer, SelfAttentionLayer
from models.backbones import Backbone, make_backbone
from models.errors import UserError
from models.layers import check_at_least, pooled_residual
from models.multi_exit import MultiExitModel, State
from models.registry import register
from models.tuning import Tunable

EXITS = ("early_classifier3", "classifier_att", "classifier_cnn", "classifier_merge")
LAYERS = (3, 3, 9, 3)  # self-attention layers per latent stage, times depth_factor
POOLED = 7  # side of the map that the tokens read with spatial_reduction


def tokens_of(x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to tokens [B, H * W, C]; no copy if they are channels-last."""
    return x.flatten(2).mT


def map_of(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse: tokens [B, H * W, C] to maps of the height and width of `like`."""
    return tokens.mT.unflatten(2, like.shape[2:])


class DynPerceiver(MultiExitModel, Tunable):
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
        drop_path: stochastic depth of the CNN, rising to this rate; None as published: ResNets 0.2, else 0.
        dropout: of the latent branch: attention, and what its layers add. The CNN's, of 0.2 before the last
            linear layer of ResNet's exit 2 and of MobileNet's exits 2 and 3, is fixed, as published.
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        backbone = make_backbone(core, drop_path)
        tokens = [rounded_up(width) for width in backbone.widths[:4]]
        _check(tokens, num_latents, depth_factor, num_SA_heads, num_latent_channels)
        check_at_least(1, SA_widening_factor=SA_widening_factor)
        self.stage_path = backbone.stage_path
        self.input_size = input_size
        self.spatial_reduction = spatial_reduction
        self.reading_stages = (1, 2, 3, 4) if with_x2z else (1,)
        self.writing_stages = (2, 3, 4) if with_z2x else ()
        self.with_dwc = with_dwc
        self.with_last_CA = with_last_CA
        self.with_isc = with_isc
        self.pools_at_once = False
        self.latent = nn.Parameter(torch.randn(num_latents, tokens[0]).mul_(0.02).clamp_(-2, 2))
        self.cnn_stem = backbone.stem
        for name, part in backbone.body:
            self.add_module(name, part)
        # Order of the published files, which number their optimizers' parameters by it.
        self._add_cnn_classifier(backbone, num_classes, before="dwc1_x2z")
        depths = [layers * factor for layers, factor in zip(LAYERS, depth_factor, strict=True)]
        self._add_latent_stages(backbone, tokens, depths, num_SA_heads, SA_widening_factor, dropout)
        self._add_exits(backbone, tokens, num_classes)
        self.token_expander = _linears(tokens)
        self.token_mixer = _linears([num_latents // 2**i for i in range(4)])
        self.cnn_dropout = nn.Dropout(backbone.last_dropout)
        self.to(memory_format=torch.channels_last)

    def _add_latent_stages(
        self,
        backbone: Backbone,
        tokens: list[int],
        depths: Sequence[int],
        heads: Sequence[int],
        factor: int,
        dropout: float,
    ) -> None:
        """Each stage's cross attention (tokens, map) and self attention; last, the map's once more."""
        *widths, last = backbone.widths
        for i, (width, token, stride) in enumerate(zip(widths, tokens, backbone.strides, strict=True), 1):
            if i in self.reading_stages:
                if self.with_dwc:
                    self.add_module(f"dwc{i}_x2z", nn.Conv2d(width, width, 7, padding=3, groups=width))
                side = POOLED if self.spatial_reduction else -(-self.input_size // stride)
                reader = CrossAttentionLayer(token, width, token, num_keys=side**2, dropout=dropout)
                self.add_module(f"cross_att{i}_x2z", reader)
            if i in self.writing_stages:
                writer = CrossAttentionLayer(width, token, token // 8, dropout=dropout)
                self.add_module(f"cross_att{i}_z2x", writer)
            layers = nn.Sequential()
            for _ in range(depths[i - 1]):
                layers.append(SelfAttentionLayer(token, heads=heads[i - 1], factor=factor, dropout=dropout))
            self.add_module(f"self_att{i}", layers)
        if self.with_last_CA:
            self.last_cross_att_z2x = CrossAttentionLayer(last, tokens[3], last // 8, dropout=dropout)

    def _add_cnn_classifier(self, backbone: Backbone, num_classes: int, before: str) -> None:
        """Exit 2, which each core has at a different place in its released files."""
        if before == backbone.classifier_before:
            self.classifier_cnn = backbone.classifier(num_classes)

    def _add_exits(self, backbone: Backbone, tokens: list[int], num_classes: int) -> None:
        """Exits 0, 1 and 3 and what they read of earlier exits' logits."""
        connected = tokens[3] if self.with_isc else 0
        self._add_cnn_classifier(backbone, num_classes, before="early_classifier3")
        self.early_classifier3 = nn.Linear(tokens[2], num_classes)
        if self.with_isc:
            self.isc3 = _inter_stage_connection(num_classes, connected)
        self.classifier_att = nn.Linear(tokens[3] + connected, num_classes)
        if self.with_isc:
            self.isc4 = _inter_stage_connection(num_classes, connected)
        self._add_cnn_classifier(backbone, num_classes, before="classifier_merge")
        merged = backbone.widths[-1] + tokens[3] + connected
        layers = backbone.classifier_layers(merged, num_classes)
        self.classifier_merge = nn.Sequential(nn.BatchNorm1d(merged), *layers)

    def choose_kernels(self, *, on_cpu: bool, training: bool) -> None:
        """For training on a CPU, the only place where it was measured, fuses convolution and pooling of maps.

        Evaluation stays as published, since its multiply-adds are reported.
        """
        self.pools_at_once = on_cpu and training

    def begin(self, images: Tensor) -> State:
        """The state is the images, later (CNN map, tokens, logits of the latest latent exit or None)."""
        side = self.input_size
        if not self.spatial_reduction and images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            raise UserError(
                f"images of {height} x {width}; without spatial_reduction this network reads {side} x {side}"
            )
        return images.contiguous(memory_format=torch.channels_last)  # tokens are then a view of a map

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """What exit k reads: the mean token [B, C] (exits 0, 1), the mean of the last map (2), both (3)."""
        if k == 0:
            x = self.cnn_stem(state)
            z = self.latent.expand(x.shape[0], -1, -1)  # (B, N, C)
            z = self.self_att1(self._read(1, z, x))
            for i in (2, 3):
                x, z = self._latent_stage(i, x, z)
            return z.mean(1), (x, z, None)
        x, z, logits = state
        if k == 1:
            x, z = self._latent_stage(4, x, z)
            connected = [self.isc3(logits)] if self.with_isc else []
            return torch.cat([z.mean(1), *connected], 1), (x, z, None)
        if k == 2:
            x = self._cnn_stage(4)(x)
            return x.mean((2, 3)), (x, z, logits)
        if self.with_last_CA:
            x = self._write(self.last_cross_att_z2x, x, z)
        connected = [self.isc4(logits)] if self.with_isc else []
        return torch.cat([x.mean((2, 3)), z.mean(1), *connected], 1), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        if EXITS[k] == "classifier_cnn":
            features = self.cnn_dropout(features)
        return self.get_submodule(EXITS[k])(features)

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """Keeps the logits of exits 0 and 1 for the inter-stage connections that read them."""
        return (*state[:2], logits) if self.with_isc and k < 2 else state

    def _cnn_stage(self, i: int) -> nn.Module:
        return self.get_submodule(self.stage_path.format(i))

    def _latent_stage(self, i: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """CNN stage i - 1 and latent stage i, i = 2, 3, 4."""
        x = self._cnn_stage(i - 1)(x)
        z = self.token_mixer[i - 2](z.mT).mT  # (B, N / 2, C)
        z = self.token_expander[i - 2](z)
        if i in self.writing_stages:
            x = self._write(self.get_submodule(f"cross_att{i}_z2x"), x, z)
        z = self._read(i, z, x)
        return x, self.get_submodule(f"self_att{i}")(z)

    def _read(self, i: int, z: Tensor, x: Tensor) -> Tensor:
        """Tokens after reading the map (x2z), or unchanged if this stage does not read."""
        if i not in self.reading_stages:
            return z
        fits = x.shape[2] % POOLED == 0 and x.shape[3] % POOLED == 0
        if self.pools_at_once and self.with_dwc and self.spatial_reduction and fits:
            x = pooled_residual(x, self.get_submodule(f"dwc{i}_x2z"), POOLED)
        else:
            if self.with_dwc:
                x = x + self.get_submodule(f"dwc{i}_x2z")(x)
            if self.spatial_reduction:
                x = F.adaptive_avg_pool2d(x, POOLED)
        return self.get_submodule(f"cross_att{i}_x2z")(z, tokens_of(x))

    def _write(self, reader: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        """The map after it has read the tokens (z2x)."""
        return map_of(reader(tokens_of(x), z), like=x)


def rounded_up(width: int) -> int:
    """Width of the tokens beside a map: the next multiple of 8, which all numbers of heads divide."""
    return -(-width // 8) * 8


def _linears(widths: Sequence[int]) -> nn.ModuleList:
    """From each width to the next one, a layer norm and a linear layer."""
    return nn.ModuleList(nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in pairwise(widths))


def _inter_stage_connection(num_classes: int, width: int) -> nn.Sequential:
    """Logits [B, num_classes] to a feature [B, width] for a later exit."""
    return nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))


def _check(
    widths: Sequence[int],
    num_latents: int,
    depth_factor: Sequence[int],
    heads: Sequence[int],
    num_latent_channels: int | None,
) -> None:
    for option, values in (("depth_factor", depth_factor), ("num_SA_heads", heads)):
        given = list(values) if isinstance(values, Sequence) else values
        if not isinstance(given, list) or len(given) != 4 or min(given) < 1:
            raise UserError(f"{option} is {given}; it takes four numbers of at least 1, one per latent stage")
    if any(width % h for width, h in zip(widths, heads, strict=True)):
        raise UserError(
            f"num_SA_heads is {list(heads)}; the tokens' widths {list(widths)} must be multiples of it"
        )
    if num_latents < 8:
        raise UserError(f"num_latents is {num_latents}; it must be at least 8, since three stages halve it")
    if num_latent_channels not in (None, widths[0]):
        raise UserError(f"num_latent_channels is {num_latent_channels}; this CNN accepts {widths[0]} only")


# Name, core, and the numbers of tokens that it is registered with; all but rexnet's are published.
VARIANTS = """
    reg400m           regnet_y_400mf             32 64 128 256 512
    reg800m           regnet_y_800mf             32 64 128 256 512
    reg1x6g           regnet_y_1_6gf             128 256 512
    reg3x2g           regnet_y_3_2gf             128 256 512
    resnet18          resnet18                   128 256 512
    resnet34          resnet34                   128 256 512
    resnet50          resnet50                   64 128 256 512
    resnet50_0375     resnet50_0375              64 128 256
    resnet50_050      resnet50_050               64 128 256
    resnet50_0625     resnet50_0625              128 160 192 256
    resnet50_075      resnet50_075               128 256
    mobilenetV3       mobilenet_v3_large         128 256 512
    mobilenetV3_0x5   mobilenet_v3_large_0x5     128 256 512
    mobilenetV3_0x75  mobilenet_v3_large_0x75    128 256 512
    mobilenetV3_1x25  mobilenet_v3_large_1x25    128 256 512
    mobilenetV3_1x5   mobilenet_v3_large_1x5     128 256 512
    mobilenetV3_2x0   mobilenet_v3_large_2x0     128 256 512
    rexnet100         rexnet_100                 128
    rexnet130         rexnet_130                 128
    rexnet150         rexnet_150                 128
    rexnet200         rexnet_200                 128
"""
for _line in VARIANTS.strip().splitlines():
    _name, _core, *_counts = _line.split()
    for _count in map(int, _counts):
        _about = f"Dynamic Perceiver on {_core} with {_count} latent tokens"
        register(DynPerceiver, f"{_name}_perceiver_t{_count}", _about, core=_core, num_latents=_count)
