"""Using the exits: the tables that simulation reads, and real early exit, for latency or for throughput."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from adaptive.confidence import CONFIDENCES, confidence_function
from models import MultiExitModel, State, join, take

ORDERS = ("latency", "throughput")


@dataclass(frozen=True)
class ExitTables:
    """What every exit says about every sample.

    [K, N] each: the confidence asked for, top-1 and top-5 hits (bool), cross-entropy; besides `scores` [S, K,
    N], every kind of confidence in the order of `CONFIDENCES`, and `targets` [N].
    """

    confidence: Tensor
    correct: Tensor
    correct5: Tensor
    loss: Tensor
    scores: Tensor
    targets: Tensor

    @classmethod
    def of(cls, exits: list[Tensor], targets: Tensor, confidence: str = "max_prob") -> "ExitTables":
        """Tables of one batch from its logits, K x [B, C], and targets, int64 [B]."""
        logits = torch.stack(exits)
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = best == targets[None, :, None]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.repeat(len(exits)), reduction="none")
        scores = torch.stack([score(logits).double() for score in CONFIDENCES.values()])
        sure = confidence_function(confidence)(logits)
        return cls(sure, hits[..., 0], hits.any(-1), loss.view(len(exits), -1), scores, targets)

    @classmethod
    def cat(cls, tables: list["ExitTables"]) -> "ExitTables":
        """One table of several, in order of samples."""
        return cls(
            *(torch.cat(columns, dim=-1) for columns in zip(*(t._columns() for t in tables), strict=True))
        )

    @classmethod
    def interleave(cls, tables: list["ExitTables"]) -> "ExitTables":
        """One table of the shards of a data set: sample i of shard r of n is sample r + i * n."""
        whole = cls.cat(tables)
        place = torch.cat([torch.arange(r, len(whole), len(tables)) for r in range(len(tables))])
        return whole.part(place.argsort())

    def __len__(self) -> int:
        return self.loss.shape[1]

    def part(self, samples: Tensor) -> "ExitTables":
        """The table of some samples (int64 indices)."""
        return ExitTables(*(column[..., samples] for column in self._columns()))

    def cpu(self) -> "ExitTables":
        """The table in main memory."""
        return ExitTables(*(column.cpu() for column in self._columns()))

    def _columns(self) -> tuple[Tensor, ...]:
        return self.confidence, self.correct, self.correct5, self.loss, self.scores, self.targets


@torch.inference_mode()
def run_adaptive(
    model: MultiExitModel,
    images: Tensor,
    thresholds: Tensor,
    confidence: str = "max_prob",
    *,
    order: str = "latency",
    micro_batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """Really exits early: images [N, 3, H, W] and thresholds [K] to logits [N, C] and the exit [N] each
    sample left at.

    A sample leaves at the first exit whose confidence is at least its threshold and costs nothing from there
    on; the last exit takes the rest. Order "latency" takes the images as one batch and compacts it after
    every exit. Order "throughput" gives every stage full micro-batches of `micro_batch` images, pooling the
    survivors of several.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; accepted: {', '.join(ORDERS)}")
    if len(images) == 0:
        raise ValueError("no images to run")
    pooled = order == "throughput"
    batches = images.split(micro_batch) if pooled else [images]
    answers = stream_adaptive(
        model, batches, thresholds, confidence, micro_batch=micro_batch if pooled else None
    )
    ids, logits, exits = (torch.cat(parts) for parts in zip(*answers, strict=True))
    back = ids.argsort()
    return logits[back], exits[back]


@torch.inference_mode()
def stream_adaptive(
    model: MultiExitModel,
    batches: Iterable[Tensor],
    thresholds: Tensor,
    confidence: str = "max_prob",
    *,
    micro_batch: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Streams batches of images [B, 3, H, W] through the stages and yields samples in the order in which they
    leave.

    Yields (position in the stream [M], logits [M, C], exit [M]) for a few samples at a time. With
    `micro_batch`, a
    stage runs only once that many samples wait for it, and on exactly that many: nearly all calls then have
    one shape, where every new number of survivors would make CPU libraries prepare each convolution anew and
    leave a GPU half empty. At most K * 2 * micro_batch samples wait if batches are no larger. Without it,
    every batch goes on at once.
    """
    if len(thresholds) != model.num_exits:
        raise ValueError(f"{len(thresholds)} thresholds for a network with {model.num_exits} exits")
    surety, limits, last = confidence_function(confidence), thresholds.tolist(), model.num_exits - 1
    waiting: list[list[State]] = [[] for _ in range(model.num_exits)]
    seen = 0

    def advance(k: int, at_least: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while waiting[k] and (here := sum(len(ids) for ids, _ in waiting[k])) >= at_least:
            group, size = join(waiting[k]), micro_batch or here
            waiting[k] = [take(group, slice(size, None))] if here > size else []
            ids, state = take(group, slice(size))
            logits, state = model.step(k, state)
            leaves = surety(logits) >= limits[k] if k < last else torch.ones_like(ids, dtype=torch.bool)
            if leaves.any():
                yield ids[leaves], logits[leaves], torch.full_like(ids[leaves], k)
                state, ids = take((state, ids), ~leaves) if not leaves.all() else (None, ids[:0])
            if len(ids):
                waiting[k + 1].append((ids, state))

    for images in batches:
        ids = torch.arange(seen, seen + len(images), device=images.device)
        seen += len(images)
        waiting[0].append((ids, model.begin(images)))
        for k in range(model.num_exits):
            yield from advance(k, micro_batch or 1)
    for k in range(model.num_exits):
        yield from advance(k, 1)


@torch.inference_mode()
def run_single(model: MultiExitModel, images: Tensor, k: int) -> Tensor:
    """Logits [N, C] of exit k alone, the static network that ends there: earlier heads run only if stages
    read them."""
    state = model.begin(images)
    for j in model.stages_before(k):
        state = (model.step if model.reads_logits(j) else model.trunk)(j, state)[1]
    return model.step(k, state)[0]


def fold_batch_norm(model: MultiExitModel) -> MultiExitModel:
    """A copy in eval mode in which every batch norm that directly follows a convolution is part of it.

    They are found in sequences, and in modules that name the pairs of their parts in `folds`.
    """
    folded = copy.deepcopy(model).eval()
    for module in list(folded.modules()):
        names = list(module._modules) if isinstance(module, nn.Sequential) else []
        for first, second in [*pairwise(names), *getattr(module, "folds", ())]:
            conv, norm = module._modules[first], module._modules[second]
            # Not their subclasses, which may do more: timm's batch norm with an activation, standardised
            # weights.
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
    return folded
