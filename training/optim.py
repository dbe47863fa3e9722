"""Parameter groups, optimizers, and the update that applies them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, list_optimizers, muon
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import nearest
from training.parallel import has_bf16
from training.schedules import lr_at, measured_at, micro_batches_at, weight_decay_at
from utils import UserError, option

NEWTON_SCHULZ = muon.zeropower_via_newtonschulz


@dataclass(frozen=True)
class Optimization:
    """How weights move; names and defaults are those of Dyn-Perceiver's script."""

    epochs: int = option(300, low=1)
    update_freq: int = option(
        1,
        "micro-batches per optimizer step, all of one weight; the last step of an epoch may have fewer",
        low=1,
    )
    global_batch: int | None = option(
        None, "images per optimizer step of all processes; --update_freq follows from it", low=2
    )
    opt: str = option("adamw", "any optimizer of timm; sgd is plain SGD with momentum")
    opt_eps: float | None = option(1e-8, low=0)
    opt_betas: tuple[float, ...] | None = option(None)
    momentum: float = option(0.9, low=0, high=0.9999)
    weight_decay: float = option(0.05, low=0)
    weight_decay_end: float | None = option(None, "final weight decay of a cosine; default: constant", low=0)
    filter_bias_and_bn: bool = option(True, "no weight decay for biases and other 1-D parameters")
    decay_embeddings: bool = option(
        False, "weight decay for Dyn-Perceiver's latents and positions too, as published"
    )
    clip_grad: float | None = option(None, "largest gradient norm", low=0)
    lr: float = option(4e-3, "peak learning rate, not scaled by the batch", low=0)
    scale_lr: bool = option(
        False, "resumed with other images per step: rates times their number over that at the run's start"
    )
    lr_scales: tuple[str, ...] = option((), "rates of parts, in multiples of --lr: features.=0.1 ...")
    min_lr: float = option(1e-6, "final learning rate of cosine and linear", low=0)
    schedule: Literal["cosine", "multistep", "linear", "constant"] = option("cosine")
    decay_epochs: tuple[int, ...] = option((), "epochs at which multistep decays", low=0)
    decay_rate: float = option(0.1, "what multistep multiplies by", low=0)
    warmup_epochs: float = option(20, "may be a fraction, as 2.3", low=0)
    warmup_steps: int = option(-1, "optimizer steps of warm-up, instead of epochs where above 0")
    model_ema: bool = option(False, "keep a moving average of the weights")
    model_ema_decay: float = option(0.9999, low=0, high=1)
    model_ema_warmup: bool = option(
        False, "forget the first steps sooner, as timm does: for runs of few steps"
    )
    model_ema_force_cpu: bool = option(False, "keep the average in main memory")
    model_ema_eval: bool = option(False, "evaluate the average too, and choose the best checkpoint by it")


def param_groups(
    model: nn.Module,
    weight_decay: float,
    filter_bias_and_bn: bool,
    decay_embeddings: bool = False,
    lr_scales: Sequence[str] = (),
) -> list[dict]:
    """Trainable parameters as optimizer groups, in the order in which the groups first occur.

    With `filter_bias_and_bn`, parameters of one dimension, named `*.bias` or, unless `decay_embeddings`,
    among the model's `embeddings` form a group without weight decay; without it (MSDNet, RANet) one group
    decays everything. `lr_scale` and `wd_scale` multiply the schedules' values. `lr_scales` are texts such as
    "features.=0.1"; a parameter gets the factor of the first text whose left side starts its name. Raises
    ValueError for other texts, and for one that starts no name.
    """
    scales = [_scale_of(text, [name for name, _ in model.named_parameters()]) for text in lr_scales]
    groups: dict[tuple[bool, float], dict] = {}
    spared = () if decay_embeddings else getattr(model, "embeddings", ())
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        plain = param.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in spared
        decays = not (filter_bias_and_bn and plain)
        scale, rate = float(decays), next((rate for start, rate in scales if name.startswith(start)), 1.0)
        empty = {"params": [], "weight_decay": weight_decay * scale, "lr_scale": rate, "wd_scale": scale}
        groups.setdefault((decays, rate), empty)["params"].append(param)
    return list(groups.values())


def _scale_of(text: str, names: list[str]) -> tuple[str, float]:
    """The start of some of these names, and a factor."""
    start, _, factor = text.rpartition("=")
    if not start or not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", factor):
        raise UserError(f"learning rate scale {text!r}: give START=FACTOR, as in features.=0.1")
    if not any(name.startswith(start) for name in names):
        parts = dict.fromkeys(name.partition(".")[0] for name in names)
        raise UserError(f"no parameter's name starts with {start!r}; they start with {', '.join(parts)}")
    return start, float(factor)


def with_fallback(groups: list[dict], model: nn.Module) -> list[dict]:
    """The groups for Muon, which leaves those with `use_fallback` to AdamW: the layers that give logits.

    These are the linear layers with as many outputs as the last one. What is no matrix timm leaves to AdamW.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    logits = {layer.weight for layer in layers if layer.out_features == layers[-1].out_features}
    parts = []
    for group in groups:
        for fallback in (False, True):
            params = [p for p in group["params"] if (p in logits) == fallback]
            if params:
                parts.append(group | {"params": params, "use_fallback": fallback})
    return parts


def make_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.Optimizer:
    """A timm optimizer over `param_groups(model)`; the prefix "lookahead_" wraps any of them.

    "sgd" is plain SGD with momentum, "nesterov" its Nesterov form. Where `opt_eps` or `opt_betas` is None,
    the optimizer's own default holds. Raises ValueError for a name timm does not know, or an optimizer that
    cannot run on this machine.
    """
    o = optimization
    name = o.opt.lower().removeprefix("lookahead_")
    prefix = o.opt.lower().removesuffix(name)
    if name not in ("nvnovograd", *list_optimizers()):
        raise UserError(f"unknown optimizer {o.opt!r}; {nearest(name, list_optimizers())}")
    # timm's names for them; its "sgd" is Nesterov's.
    name = {"sgd": "momentum", "nvnovograd": "novograd"}.get(name, name)
    given: dict[str, Any] = {}
    if o.opt_eps is not None:
        given["eps"] = o.opt_eps
    if o.opt_betas is not None:
        given["betas"] = o.opt_betas
    if name in ("adam", "adamw"):
        given["fused"] = True  # one pass over the weights, not a dozen; on a CPU a quarter of the time
    groups = param_groups(model, o.weight_decay, o.filter_bias_and_bn, o.decay_embeddings, o.lr_scales)
    if "muon" in name:
        groups = with_fallback(groups, model)
        # timm orthogonalizes in bf16 and has no option; on a CPU without bf16, fp32 takes a 13th of the time.
        dtype = torch.bfloat16 if has_bf16(next(model.parameters()).device.type) else torch.float32
        muon.zeropower_via_newtonschulz = partial(NEWTON_SCHULZ, dtype=dtype)
    try:
        return create_optimizer_v2(groups, prefix + name, o.lr, o.weight_decay, o.momentum, **given)
    except (AssertionError, TypeError, ValueError) as error:  # a fused one needs CUDA; numbers out of range
        raise UserError(f"optimizer {o.opt!r} cannot be used here: {error}") from error


def make_update(
    model: nn.Module,
    optimization: Optimization,
    *,
    steps: int,
    rest: int = 0,
    losses_per_batch: int = 1,
    fp16: bool = False,
    measure_every: int = 0,
) -> "Update":
    """Optimizer, schedules and moving average for a run of `steps` optimizer steps an epoch.

    The last of them has only `rest` micro-batches, unless that is 0. An objective that yields
    `losses_per_batch` losses takes as many steps on one batch, all at one rate. The gradient's norm is
    measured every `measure_every` steps (0: never) and when an epoch ends.
    """
    o = optimization
    micro_batches = partial(micro_batches_at, o.update_freq, steps, rest)
    measured = partial(measured_at, every=measure_every, steps=steps)
    together = losses_per_batch if o.update_freq == 1 else 1
    steps //= together
    lr = partial(
        lr_at,
        schedule=o.schedule,
        base=o.lr,
        minimum=o.min_lr,
        warmup_steps=o.warmup_steps // together if o.warmup_steps > 0 else round(o.warmup_epochs * steps),
        total_steps=o.epochs * steps,
        milestones=sorted(epoch * steps for epoch in o.decay_epochs),
        decay_rate=o.decay_rate,
    )
    decay = partial(
        weight_decay_at, base=o.weight_decay, end=o.weight_decay_end, total_steps=o.epochs * steps
    )
    average = None
    if o.model_ema:
        device = torch.device("cpu") if o.model_ema_force_cpu else None
        average = ModelEmaV3(model, decay=o.model_ema_decay, use_warmup=o.model_ema_warmup, device=device)
    update = Update(
        model,
        make_optimizer(model, o),
        lr=lambda step: lr(step // together),
        weight_decay=lambda step: decay(step // together),
        clip_grad=o.clip_grad or None,
        micro_batches=micro_batches,
        fp16=fp16,
        ema=average,
    )
    update.measured = measured
    return update


class Update:
    """Turns losses into optimizer steps: `update(loss)` per micro-batch, and a step for every few of them.

    `lr`, `weight_decay` and `micro_batches` map an optimizer step to that step's value; its gradient is the
    mean over its micro-batches. `clip_grad` is the largest global gradient norm, or None. `grad_norm` is the
    norm before clipping (a 0-d tensor) at the last step that was clipped or for which `measured` is true.
    `fp16` scales the loss; `ema`, made from the bare model, is updated after every step. `model` may be
    wrapped in DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Callable[[int], float],
        weight_decay: Callable[[int], float],
        clip_grad: float | None = None,
        micro_batches: Callable[[int], int] = lambda step: 1,
        fp16: bool = False,
        ema: ModelEmaV3 | None = None,
    ):
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.lr, self.weight_decay = lr, weight_decay
        self.measured: Callable[[int], bool] = lambda step: False
        self.clip_grad, self.micro_batches = clip_grad, micro_batches
        self.distributed = isinstance(model, DistributedDataParallel)
        self.bare_model = model.module if self.distributed else model
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=fp16)
        # Read once: loading an optimizer's state replaces its groups, and published states have no wd_scale.
        self.scales = [
            (group.get("lr_scale", 1.0), group.get("wd_scale", 1.0)) for group in optimizer.param_groups
        ]
        self.grad_norm: Tensor | None = None
        # AdaHessian differentiates the gradients.
        self.second_order = getattr(optimizer, "is_second_order", False)
        if self.second_order:  # of the attention kernels, only MATH has second derivatives
            torch.backends.cuda.enable_flash_sdp(False)  # the CPU's, too
            torch.backends.cuda.enable_mem_efficient_sdp(False)
        self.start(0)

    def attach(self, model: nn.Module) -> None:
        """From now on trains the network through `model`: the network itself or a wrapper of it."""
        self.model, self.distributed = model, isinstance(model, DistributedDataParallel)
        self._await_micro_batch(self.micro_batch)

    def start(self, step: int) -> None:
        """Prepares for optimizer step `step`: sets its rates and drops gradients of an unfinished step."""
        self.step = step
        self.group = self.micro_batches(step)
        self.optimizer.zero_grad()
        lr, weight_decay = self.lr(step), self.weight_decay(step)
        for group, (lr_scale, wd_scale) in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"], group["weight_decay"] = lr * lr_scale, weight_decay * wd_scale
        self._await_micro_batch(0)

    def _await_micro_batch(self, index: int) -> None:
        """Prepares for micro-batch `index` of this step."""
        self.micro_batch = index
        if self.distributed:
            # Read by the wrapper's forward: only the last micro-batch averages over processes.
            self.model.require_backward_grad_sync = index == self.group - 1

    def __call__(self, loss: Tensor) -> None:
        """Backward of one micro-batch's `loss` (a scalar), and the optimizer step if it completes one."""
        # The caller may be under autocast, which is for the forward pass; backward reuses its types.
        with torch.autocast(loss.device.type, enabled=False):
            self.scaler.scale(loss / self.group).backward(create_graph=self.second_order)
        if self.micro_batch < self.group - 1:
            self._await_micro_batch(self.micro_batch + 1)
            return
        if self.clip_grad is not None or self.measured(self.step):
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.grad_norm = nn.utils.get_total_norm(gradients)
            if self.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_grad, self.grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch.clear_autocast_cache()  # an objective may continue under the same autocast, with new weights
        if self.ema is not None:
            self.ema.update(self.bare_model, self.step + 1 if self.ema.use_warmup else None)
        self.start(self.step + 1)

    def figures(self) -> dict[str, float]:
        """`opt/lr`, `opt/weight_decay` of the next step, and `opt/grad_norm` of the last one measured."""
        groups = self.optimizer.param_groups
        norm = {} if self.grad_norm is None else {"opt/grad_norm": self.grad_norm.item()}
        # The largest: biases and embeddings may be in groups without weight decay.
        return {f"opt/{name}": max(group[name] for group in groups) for name in ("lr", "weight_decay")} | norm

    @property
    def parts(self) -> dict[str, Any]:
        """What exact resumption between two optimizer steps needs, by its name in a checkpoint."""
        average = {"model_ema": self.ema.module} if self.ema is not None else {}
        return {"optimizer": self.optimizer, "scaler": self.scaler, **average}
