"""Pooled queues: samples wait before a stage until it has a full micro-batch of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive.policy import Policy
from models import MultiExitModel, State, join, take
from utils import UserError

# From a state to the logits [B, C] of an exit and the next state; the first stage reads images.
Stage = Callable[[State], tuple[Tensor, State]]


class Answers(NamedTuple):
    """Samples that left: their numbers in the order of arrival [M], logits [M, C], exits [M]."""

    ids: Tensor
    logits: Tensor
    exits: Tensor


def stages_of(model: MultiExitModel) -> list[Stage]:
    """The stages of a network as callables, the first of which reads images [B, 3, H, W].

    Raises ValueError for a network in training mode, whose answers depend on the other images of a batch.
    """
    if model.training:
        raise UserError("the network is in training mode; early exit needs evaluation mode: network.eval()")
    later = [partial(model.step, k) for k in range(1, model.num_exits)]
    return [lambda images: model.step(0, model.begin(images)), *later]


class Pipeline:
    """The stages of a network, each with a queue of samples that have not left before it.

    With `micro_batch`, a stage is ready once that many samples wait for it, and runs on at most that many.
    Nearly all calls then have one shape; a new number of samples each time would make CPU libraries prepare
    every convolution anew and leave a GPU half empty. Without it, a stage takes all samples that wait. Raises
    ValueError for a policy with another number of exits, and for micro-batches of less than 1.
    """

    def __init__(self, stages: Sequence[Stage], policy: Policy, micro_batch: int | None = None) -> None:
        if len(policy.thresholds) != len(stages):
            raise UserError(f"{len(policy.thresholds)} thresholds for a network with {len(stages)} exits")
        if micro_batch is not None and micro_batch < 1:
            raise UserError(f"micro_batch is {micro_batch}; accepted: 1 and more, or None")
        self.stages = stages
        self.policy = policy
        self.micro_batch = micro_batch
        self.queues: list[list[tuple[Tensor, State]]] = [[] for _ in stages]
        self.seen = 0

    def put(self, images: Tensor) -> range:
        """Queues images [B, 3, H, W] before the first stage; returns their numbers, counted from 0."""
        numbers = range(self.seen, self.seen + len(images))
        ids = torch.arange(numbers.start, numbers.stop, device=images.device)
        self.queues[0].append((ids, images))
        self.seen = numbers.stop
        return numbers

    def waiting(self, k: int) -> int:
        """How many samples wait for stage k."""
        return sum(len(ids) for ids, _ in self.queues[k])

    def ready(self, k: int) -> bool:
        """Whether a full micro-batch waits for stage k; without micro-batches, whether any sample does."""
        return self.waiting(k) >= (self.micro_batch or 1)

    @torch.inference_mode()
    def run(self, k: int) -> Answers:
        """Runs stage k on a micro-batch of waiting samples, or on all if fewer; returns those that leave."""
        group = join(self.queues[k])
        size = self.micro_batch or len(group[0])
        self.queues[k] = [take(group, slice(size, None))] if len(group[0]) > size else []
        ids, state = take(group, slice(size))
        logits, state = self.stages[k](state)
        leaves = self.policy.leaves(k, logits)
        count = int(leaves.sum())  # the only point where the host waits for the device
        gone, stay = slice(count), slice(count, None)  # all or none leave: slices, so nothing is copied
        if 0 < count < len(ids):
            order = (~leaves).byte().argsort(stable=True)
            gone, stay = order[:count], order[count:]
        if count < len(ids):
            self.queues[k + 1].append(take((ids, state), stay))
        return Answers(ids[gone], logits[gone], torch.full_like(ids[gone], k))
