"""Learning to weight samples for early-exit networks (L2W-DEN, https://arxiv.org/abs/2209.08310).

A small network reads how every exit does on a sample and weighs that sample's losses. It learns from a
look-ahead: the classifier takes a step under the proposed weights, and is then judged as it will be used,
every exit on the samples that leave there. The parts are pure functions in `training.weight_net`.

This judgement, the meta loss, depends on a weight through the classifier's gradient alone, and linearly. So
its derivative is a directional derivative of the losses: one forward-mode product, no second-order graph.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from adaptive.confidence import max_prob
from training.directional import Recording, buffers_of, tangent_of
from training.losses import Losses
from training.optim import Update
from training.restore import load_optimizer
from training.schedules import cosine
from training.weight_net import (
    WeightNet,
    assign_exits,
    judgement,
    look_ahead,
    loss_table,
    sample_weights,
    weight_inputs,
)
from utils import Compute, Meters, UserError, option


def confidence_table(exits: list[Tensor]) -> Tensor:
    """Largest softmax probability [B, K] of every sample at every exit, without gradient."""
    return torch.stack([max_prob(y.detach()) for y in exits], 1)


def full_precision_in(device: torch.device) -> torch.autocast:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class Weighting:
    """Sample weighting (L2W); names are those of L2W's trainers, defaults its settings for CIFAR."""

    l2w: bool = option(False, "learn to weight samples")
    target_p_index: int = option(
        15, "p: exit k is judged by a share of the samples that goes with (p / 20)^k", low=1, high=39
    )
    epsilon: float = option(0.8, "how far weights may be from 1; above 0.5 they can be negative", low=0)
    constraint_dimension: Literal["mat", "row", "col"] = option("col", "totals kept: all, exits', samples'")
    meta_net_input_type: Literal["loss", "conf", "both"] = option("loss", "what the weight net reads")
    meta_net_hidden_size: int = option(500, "units of its hidden layers", low=1)
    meta_net_num_layers: int = option(1, "hidden layers", low=1)
    meta_interval: int = option(1, "batches between two steps of the weight net", low=1)
    meta_lr: float = option(1e-4, "its peak learning rate; falls to 0 as half a cosine", low=0)
    meta_weight_decay: float = option(1e-4, low=0)
    l2w_tables: int = option(0, "epochs between files of every sample's weights and losses; 0 = none", low=0)


class SampleWeighting:
    """The objective: a loss for each half of a batch, under weights that can be learned from the other half.

    `update` is the classifier's; the look-ahead reads its learning rates, momentum and loss scale.
    `proportions` [K] are the shares of the samples by which exits are judged; a run has `epochs` of
    `batches`. `losses` apply to what trains, not to what the weight net reads nor to the judgement. Where an
    operator has no forward-mode derivative, or if `forward_mode` is False, the weights' gradient comes from a
    second-order graph instead.
    """

    def __init__(
        self,
        options: Weighting,
        update: Update,
        losses: Losses,
        *,
        proportions: Tensor,
        batches: int,
        epochs: int,
        forward_mode: bool | None = None,
    ) -> None:
        device, num_exits = next(update.bare_model.parameters()).device, len(losses.exit_weights)
        self.options, self.update = options, update
        self.smoothing, self.distil = losses.smoothing, losses.distil
        self.exit_weights = torch.tensor(losses.exit_weights, device=device)
        self.proportions, self.batches, self.epochs = proportions, batches, epochs
        self.weight_net = WeightNet(
            (2 if options.meta_net_input_type == "both" else 1) * num_exits,
            num_exits,
            hidden=options.meta_net_hidden_size,
            layers=options.meta_net_num_layers,
        ).to(device)
        self.optimizer = torch.optim.Adam(
            self.weight_net.parameters(), options.meta_lr, weight_decay=options.meta_weight_decay
        )
        self.forward_mode = forward_mode  # None: not known yet
        self.batch = 0
        self.meters = Meters()
        self.tables: dict[str, list[Tensor]] = {}

    def start(self, epoch: int, batch: int = 0) -> None:
        """Continues at a batch of an epoch, both counted from 0."""
        self.batch = epoch * self.batches + batch

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yields (loss, logits) of the first half and, after the classifier's step, of the second half."""
        n = len(images)
        if n < 4:
            raise UserError(
                f"a batch of {n} cannot be cut into two halves to learn weights from; 4 or more can"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        learns = self.batch % self.batches % self.options.meta_interval == 0
        first, second = slice(0, (n + 1) // 2), slice((n + 1) // 2, n)
        for train, judge in ((first, second), (second, first)):
            halves = (images[train], targets[train]), (images[judge], targets[judge])
            # Compiled code frees what backward reads, which learning reads twice, and takes no dual numbers.
            with torch.compiler.set_stance("force_eager" if learns else "default"):
                half = self._half(model, *halves, learns)
            yield half
        self.batch += 1

    def _half(
        self, model: nn.Module, train: tuple, judge: tuple, learns: bool
    ) -> tuple[Tensor, list[Tensor]]:
        images, targets = train
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        if learns and self.forward_mode is None:
            self._choose_mode(bare, images[:2], targets[:2])
        recording = Recording(images.device)
        if learns and self.forward_mode:
            way = recording.first()
        else:
            # The other attention kernels have no second derivative.
            way = sdpa_kernel(SDPBackend.MATH) if learns else nullcontext()
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
        """The weight net's learning rate at this batch."""
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
        """Derivative [B, K] of the judgement with respect to the weights under which `losses` would train."""
        network = self.update.bare_model  # without gradient equilibrium around it, which is for training
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
        # A float16 loss scale that is still too large overflows; the classifier's step is then skipped too.
        if not self.update.scaler.is_enabled() or all(
            p.grad.isfinite().all() for p in self.weight_net.parameters()
        ):
            self.optimizer.step()

    def _choose_mode(self, bare: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Chooses forward mode if every operator of the network has a derivative of that kind."""
        still = {name: torch.zeros_like(p) for name, p in bare.named_parameters() if p.requires_grad}
        try:
            with Recording(images.device).again(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own, about a part that it deprecated
                tangent_of(partial(loss_table, targets=targets), bare, still, images)
            self.forward_mode = True
        except (NotImplementedError, RuntimeError) as error:
            self.forward_mode = False
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(
                    "weights are learned from a second-order graph, which is slower: "
                    f"{str(error).splitlines()[0]}"
                )

    def take_tables(self) -> dict[str, Tensor]:
        """Weights, plain losses and confidences since the last call, [N, K] each, in order of arrival."""
        tables, self.tables = {name: torch.cat(parts).cpu() for name, parts in self.tables.items()}, {}
        return tables

    def figures(self, compute: Compute | None = None) -> dict[str, float]:
        """Means in this epoch: share of negative weights, meta loss; and the current learning rate.

        The means are over all processes if `compute` is given.
        """
        return {**self.meters.means(compute), "meta_lr": self._lr()}

    def take_figures(self, compute: Compute) -> dict[str, float]:
        """The `figures` over all processes; the next epoch's means start anew."""
        figures, self.meters = self.figures(compute), Meters()
        return figures

    def epoch_state(self) -> dict[str, Any]:
        """What this process has gathered in this epoch, on the CPU."""
        tables = {name: torch.cat(parts).cpu() for name, parts in self.tables.items()}
        return {"meters": self.meters.state_dict(), "tables": tables}

    def load_epoch_state(self, states: Sequence[dict[str, Any]], *, tables: bool) -> None:
        """Continues from what these processes had gathered; with their `tables` if that was one."""
        device = self.exit_weights.device
        self.meters, self.tables = Meters.of([state["meters"] for state in states], device), {}
        for state in states if tables else ():
            self.tables = {name: [table.to(device)] for name, table in state["tables"].items()}

    def state_dict(self) -> dict[str, Any]:
        """What exact resumption between two batches needs, besides `epoch_state`."""
        weights, optimizer = self.weight_net.state_dict(), self.optimizer.state_dict()
        return {"weight_net": weights, "optimizer": optimizer, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from where `state` was taken; L2W's own files hold no `batch`."""
        self.weight_net.load_state_dict(state["weight_net"])
        load_optimizer(self.optimizer, state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.options.meta_weight_decay  # this run's, like the learning rate
        self.batch = state.get("batch", 0)


def _gradients(loss: Tensor, named: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    """Gradients of those of the named tensors that `loss` depends on."""
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, **options)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}
