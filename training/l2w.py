"""Learning to weight samples for early-exit networks (L2W-DEN, https://arxiv.org/abs/2209.08310).

A small network sees how every exit does on a sample and weighs that sample's losses. It learns from a
look-ahead: the classifier takes a step under the weights proposed, and is then judged as it will be used,
every exit on the samples that leave there. The parts are pure functions in `training.weights`.

The judgement depends on a weight through the classifier's gradient alone, and linearly, so its derivative is
a
directional derivative of the losses: one forward-mode product instead of a graph of second order.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from adaptive.confidence import max_prob
from training.directional import Recording, buffers_of, tangent_of
from training.losses import Distillation
from training.optim import Update, cosine
from training.weights import (
    WeightNet,
    assign_exits,
    judgement,
    look_ahead,
    loss_table,
    sample_weights,
    weight_inputs,
)
from utils import Compute, Meters


def confidence_table(exits: list[Tensor]) -> Tensor:
    """Largest softmax probability [B, K] of every sample at every exit, without gradient."""
    return torch.stack([max_prob(y.detach()) for y in exits], 1)


def full_precision_in(device: torch.device) -> torch.autocast:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How samples are weighted and the weight net is trained, under the names of L2W's flags.

    Attributes:
        meta_net_input_type, constraint_dimension: see `weight_inputs` and `sample_weights`.
        epsilon: scales the centred raw weights.
        meta_net_hidden_size, meta_net_num_layers: of the weight net.
        meta_interval: it learns on every so many batches of an epoch.
        meta_lr, meta_weight_decay: of its Adam; the rate falls to 0 as half a cosine.
    """

    meta_net_input_type: str = "loss"
    constraint_dimension: str = "col"
    epsilon: float = 0.8
    meta_net_hidden_size: int = 500
    meta_net_num_layers: int = 1
    meta_interval: int = 1
    meta_lr: float = 1e-4
    meta_weight_decay: float = 1e-4


class SampleWeighting:
    """The objective: two losses per batch, each of one half under weights that may have learned from the
    other half.

    `update` is the classifier's, whose rates, momentum and loss scale the look-ahead reads; `proportions` [K]
    are the shares of the samples by which exits are judged; a run has `epochs` of `batches`. `exit_weights`
    and `smoothing` act on the losses that train, not on what the weight net reads nor on the judgement; what
    `distil` makes is added. Where an operator has no forward-mode derivative, or if `forward_mode` is False,
    the weights' gradient comes from a graph of second order instead.
    """

    def __init__(
        self,
        options: Weighting,
        update: Update,
        *,
        proportions: Tensor,
        batches: int,
        epochs: int,
        exit_weights: Sequence[float],
        smoothing: float = 0.0,
        distil: Distillation | None = None,
        forward_mode: bool | None = None,
    ) -> None:
        device, num_exits = next(update.bare_model.parameters()).device, len(exit_weights)
        self.options, self.update, self.smoothing, self.distil = options, update, smoothing, distil
        self.proportions, self.batches, self.epochs = proportions, batches, epochs
        self.exit_weights = torch.tensor(exit_weights, device=device)
        n_in = (2 if options.meta_net_input_type == "both" else 1) * num_exits
        shape = {"hidden": options.meta_net_hidden_size, "layers": options.meta_net_num_layers}
        self.weight_net = WeightNet(n_in, num_exits, **shape).to(device)
        decay = options.meta_weight_decay
        self.optimizer = torch.optim.Adam(self.weight_net.parameters(), options.meta_lr, weight_decay=decay)
        self.forward_mode = forward_mode  # None: not known yet
        self.batch = 0
        self.meters, self.tables = Meters(), {}

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yields (loss, logits) of the first half, and once the classifier has taken its step, of the
        second."""
        n = len(images)
        if n < 4:
            raise ValueError(
                f"a batch of {n} cannot be cut into two halves to learn weights from; 4 or more can"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        first, second = slice(0, (n + 1) // 2), slice((n + 1) // 2, n)
        for train, judge in ((first, second), (second, first)):
            yield self._half(model, (images[train], targets[train]), (images[judge], targets[judge]))
        self.batch += 1

    def _half(self, model: nn.Module, train: tuple, judge: tuple) -> tuple[Tensor, list[Tensor]]:
        images, targets = train
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        learns = self.batch % self.batches % self.options.meta_interval == 0
        if learns and self.forward_mode is None:
            self._choose_mode(bare, images[:2], targets[:2])
        recording = Recording(images.device)
        if learns and self.forward_mode:
            way = recording.first()
        else:
            way = (
                sdpa_kernel(SDPBackend.MATH) if learns else nullcontext()
            )  # other kernels have no second derivative
        with way:
            exits = model(images)
        with full_precision_in(images.device):
            losses = loss_table(exits, targets, self.smoothing)
            plain = loss_table([y.detach() for y in exits], targets) if self.smoothing else losses.detach()
            confidence = confidence_table(exits)
            inputs = weight_inputs(self.options.meta_net_input_type, plain, confidence)
        shared = self.distil(images, exits) if self.distil else 0.0
        if learns:
            weights = self._weigh(inputs)
            by_weights = self._slopes(bare, losses, shared, weights.detach(), train, judge, recording)
            with full_precision_in(images.device):
                self._step(torch.autograd.grad(weights, list(self.weight_net.parameters()), by_weights))
        with torch.no_grad():
            weights = self._weigh(inputs)
        self.meters.add("negative_weights", (weights < 0).sum(), weights.numel())
        for name, table in (("weights", weights), ("losses", plain), ("confidence", confidence)):
            self.tables.setdefault(name, []).append(table.float())
        return self._total(losses, weights) + shared, exits

    def _lr(self) -> float:
        """The weight net's rate at this batch."""
        return cosine(self.options.meta_lr, 0.0, self.batch, self.batches * self.epochs)

    def _weigh(self, inputs: Tensor) -> Tensor:
        """Weights [B, K] from what the weight net reads."""
        with full_precision_in(inputs.device):
            return sample_weights(
                self.weight_net(inputs), self.options.epsilon, self.options.constraint_dimension
            )

    def _total(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The training loss of a half, a scalar, from its loss table and weights [B, K]."""
        return ((weights * losses).mean(0) * self.exit_weights).sum()

    def _slopes(
        self,
        bare: nn.Module,
        losses: Tensor,
        shared: Tensor | float,
        weights: Tensor,
        train: tuple,
        judge: tuple,
        recording: Recording,
    ) -> Tensor:
        """Derivative [B, K] of the judgement by the weights under which `losses` would train."""
        network = self.update.bare_model  # judged by itself: gradient equilibrium around it is for training
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        scale = self.update.scaler.get_scale()  # 1 unless in float16, whose small gradients would vanish
        with full_precision_in(losses.device):
            weights.requires_grad_(not self.forward_mode)
            loss = scale * (self._total(losses, weights) + shared)
            gradients = _gradients(loss, named, retain_graph=True, create_graph=not self.forward_mode)
            steps = {named[name]: g.detach() / scale for name, g in gradients.items()}
            moved, rates = look_ahead(self.update.optimizer, steps)
        moved = {name: moved[named[name]].requires_grad_() for name in gradients}
        exits = functional_call(network, moved | buffers_of(network), judge[0])
        with full_precision_in(losses.device):
            meta_loss = judgement(exits, judge[1], assign_exits(confidence_table(exits), self.proportions))
            self.meters.add("meta_loss", meta_loss.detach(), 1)
            towards = {
                name: rates[named[name]] * g for name, g in _gradients(scale * meta_loss, moved).items()
            }
            if not self.forward_mode:
                outputs = [gradients[name] / scale for name in towards]
                return torch.autograd.grad(outputs, weights, list(towards.values()))[0] / scale
        images, targets = train
        towards = {named[name]: direction for name, direction in towards.items()}
        directions = {name: towards[p] for name, p in bare.named_parameters() if p in towards}
        table = partial(loss_table, targets=targets, smoothing=self.smoothing)
        with recording.again():
            slopes = tangent_of(table, bare, directions, images)
        return slopes * self.exit_weights / (scale * len(slopes))

    def _step(self, gradients: tuple[Tensor, ...]) -> None:
        """Adam's step on the weight net, with the mean gradient of all processes."""
        for p, gradient in zip(self.weight_net.parameters(), gradients, strict=True):
            if dist.is_initialized():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            p.grad = gradient
        # In float16 a scale that is still too large overflows; the classifier's own step is then left out as
        # well.
        if not self.update.scaler.is_enabled() or all(
            p.grad.isfinite().all() for p in self.weight_net.parameters()
        ):
            self.optimizer.step()

    def _choose_mode(self, bare: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Forward mode if every operator of the network has a derivative of that kind."""
        still = {name: torch.zeros_like(p) for name, p in bare.named_parameters() if p.requires_grad}
        try:
            with Recording(images.device).again(), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # torch's own, of a part of it that it deprecated
                tangent_of(partial(loss_table, targets=targets), bare, still, images)
            self.forward_mode = True
        except (NotImplementedError, RuntimeError) as error:
            self.forward_mode = False
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(
                    f"weights are learned from a second-order graph, which is slower: {str(error).splitlines()[0]}"
                )

    def take_tables(self) -> dict[str, Tensor]:
        """Weights, plain losses and confidences since the last call, [N, K] each, samples in the order they
        came."""
        tables, self.tables = {name: torch.cat(parts).cpu() for name, parts in self.tables.items()}, {}
        return tables

    def take_figures(self, compute: Compute) -> dict[str, float]:
        """Means since the last call over all processes: share of negative weights, meta loss, and the rate
        now."""
        meters, self.meters = self.meters, Meters()
        return {**meters.means(compute), "meta_lr": self._lr()}

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption needs between two batches."""
        nets = {"weight_net": self.weight_net.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**nets, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.weight_net.load_state_dict(state["weight_net"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.options.meta_weight_decay  # of this run, as the rate is
        self.batch = state["batch"]


def _gradients(loss: Tensor, named: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    """Gradients of those of the named tensors that `loss` depends on."""
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, **options)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}
