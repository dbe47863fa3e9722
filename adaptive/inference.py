"""Using the exits of a network: real early exit, for latency or for throughput, and one exit alone."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from adaptive.pipeline import Answers, Pipeline, Stage, stages_of
from adaptive.policy import Policy
from models import MultiExitModel
from utils import UserError

ORDERS = ("latency", "throughput")


@torch.inference_mode()
def run_adaptive(
    model: MultiExitModel,
    images: Tensor,
    thresholds: Policy | Tensor | Sequence[float],
    confidence: str = "max_prob",
    *,
    order: str = "latency",
    micro_batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """Real early exit: images [N, 3, H, W] to logits [N, C] and the exit [N] at which each sample left.

    `thresholds` is a policy, or thresholds [K] of this confidence. A sample leaves at the first exit whose
    confidence is at least its threshold and costs nothing from there on; the last exit takes the rest. Order
    "latency" takes the images as one batch and compacts it after every exit. Order "throughput" gives every
    stage full micro-batches of `micro_batch` images, pooling the remaining samples of several batches.
    """
    if order not in ORDERS:
        raise UserError(f"unknown order {order!r}; accepted: {', '.join(ORDERS)}")
    if len(images) == 0:
        raise UserError("no images to run")
    if micro_batch < 1:  # in either order: a slip is a slip
        raise UserError(f"micro_batch is {micro_batch}; accepted: 1 and more")
    policy = Policy.of(thresholds, confidence)
    size = micro_batch if order == "throughput" else None
    return run_stages(stages_of(model, policy.off), policy, images, size)


@torch.inference_mode()
def all_logits(model: MultiExitModel, images: Tensor, size: int = 64) -> Tensor:
    """Logits [K, N, C] of all exits for images [N, 3, H, W], `size` of them at a time."""
    parts = [torch.stack(model(part)) for part in images.split(size)]
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def run_stages(
    stages: Sequence[Stage], policy: Policy, images: Tensor, micro_batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `run_adaptive`, for the stages of the exits that are on, however they run.

    Without `micro_batch`, the images are one batch.
    """
    batches = images.split(micro_batch or len(images))
    answers = _stream(Pipeline(stages, policy, micro_batch), batches)
    ids, logits, exits = (torch.cat(parts) for parts in zip(*answers, strict=True))
    back = ids.argsort()
    return logits[back], exits[back]


def stream_adaptive(
    model: MultiExitModel,
    batches: Iterable[Tensor],
    thresholds: Policy | Tensor | Sequence[float],
    confidence: str = "max_prob",
    *,
    micro_batch: int | None = None,
) -> Iterator[Answers]:
    """Streams batches of images [B, 3, H, W] through the stages; yields samples in the order they leave.

    A few samples are yielded at a time. With `micro_batch`, stages run on full micro-batches (`Pipeline`); at
    most K * 2 * micro_batch samples wait if batches are no larger than that. Without it, every batch moves on
    at once. Raises ValueError at once for a network in training mode, `micro_batch` below 1, and thresholds
    that do not fit.
    """
    policy = Policy.of(thresholds, confidence)
    return _stream(Pipeline(stages_of(model, policy.off), policy, micro_batch), batches)


def _stream(pipeline: Pipeline, batches: Iterable[Tensor]) -> Iterator[Answers]:
    for images in batches:
        pipeline.put(images)
        yield from _advance(pipeline, pipeline.ready)
    yield from _advance(pipeline, pipeline.waiting)


def _advance(pipeline: Pipeline, may_run: Callable[[int], int]) -> Iterator[Answers]:
    for k in range(len(pipeline.stages)):
        while may_run(k):
            answers = pipeline.run(k)
            if len(answers.ids):
                yield answers


@torch.inference_mode()
def run_single(model: MultiExitModel, images: Tensor, k: int) -> Tensor:
    """Logits [N, C] of exit k alone, as a static network; earlier heads run only if stages read them."""
    return stages_of(model, set(range(model.num_exits)) - {k})[0](images)[0]


def fold_batch_norm(model: MultiExitModel) -> MultiExitModel:
    """A copy in eval mode in which every batch norm that directly follows a convolution is part of it.

    Such pairs are found in sequences, and in modules that name the pairs of their parts in `folds`.
    """
    folded = copy.deepcopy(model).eval()
    for module in list(folded.modules()):
        names = list(module._modules) if isinstance(module, nn.Sequential) else []
        for first, second in [*pairwise(names), *getattr(module, "folds", ())]:
            conv = module._modules[first]
            norm = module._modules[second]
            # Exact types: subclasses may do more (batch norm with activation, standardised weights).
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
    return folded
