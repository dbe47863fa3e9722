"""Pooled queues: samples wait before a stage until it has a full micro-batch of them."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.costs import stages_for
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


def stages_of(model: MultiExitModel, off: Collection[int] = ()) -> list[Stage]:
    """The stages of a network as callables, the first of which reads images [B, 3, H, W].

    There is one for each exit that is not switched `off`; it also runs the stages before, without their
    heads, as far as this exit or a later one needs them. Raises ValueError for a network in training mode,
    whose answers depend on the other images of a batch.
    """
    if model.training:
        raise UserError("the network is in training mode; early exit needs evaluation mode: network.eval()")
    on = [k for k in range(model.num_exits) if k not in off]
    needed = stages_for(model, on)
    firsts = [0, *(k + 1 for k in on)]
    spans = [[j for j in needed if low <= j <= k] for low, k in zip(firsts, on, strict=False)]
    first, *later = (partial(_run_span, model, span) for span in spans)
    return [lambda images: first(model.begin(images)), *later]


def _run_span(model: MultiExitModel, span: list[int], state: State) -> tuple[Tensor, State]:
    """Runs some stages, of which the last one has its exit on; others need heads only if stages read them."""
    *before, last = span
    for j in before:
        state = (model.step if model.reads_logits(j) else model.trunk)(j, state)[1]
    return model.step(last, state)


class Pipeline:
    """The stages of a network, each with a queue of samples that have not left before it.

    `stages` are those of the exits that the policy has not switched off. With `micro_batch`, a stage is ready
    once that many samples wait for it, and runs on at most that many. Nearly all calls then have one shape; a
    new number of samples each time would make CPU libraries prepare every convolution anew and leave a GPU
    half empty. Without it, a stage takes all samples that wait. Raises ValueError for a policy with another
    number of exits, and for micro-batches of less than 1.
    """

    def __init__(self, stages: Sequence[Stage], policy: Policy, micro_batch: int | None = None) -> None:
        self.exits = policy.on
        if len(self.exits) != len(stages):
            raise UserError(f"{len(self.exits)} thresholds for a network with {len(stages)} exits")
        if micro_batch is not None and micro_batch < 1:
            raise UserError(f"micro_batch is {micro_batch}; accepted: 1 and more, or None")
        self.stages = stages
        self.policy = policy
        self.micro_batch = micro_batch
        # What waits: numbers of the samples, what the policy remembers of them, their state.
        self.queues: list[list[tuple[Tensor, Any, State]]] = [[] for _ in stages]
        self.seen = 0

    def put(self, images: Tensor) -> range:
        """Queues images [B, 3, H, W] before the first stage; returns their numbers, counted from 0."""
        numbers = range(self.seen, self.seen + len(images))
        ids = torch.arange(numbers.start, numbers.stop, device=images.device)
        self.queues[0].append((ids, None, images))
        self.seen = numbers.stop
        return numbers

    def waiting(self, k: int) -> int:
        """How many samples wait for stage k."""
        return sum(len(ids) for ids, *_ in self.queues[k])

    def ready(self, k: int) -> bool:
        """Whether a full micro-batch waits for stage k; without micro-batches, whether any sample does."""
        return self.waiting(k) >= (self.micro_batch or 1)

    @torch.inference_mode()
    def run(self, k: int) -> Answers:
        """Runs stage k on a micro-batch of waiting samples, or on all if fewer; returns those that leave."""
        group = join(self.queues[k])
        size = self.micro_batch or len(group[0])
        self.queues[k] = [take(group, slice(size, None))] if len(group[0]) > size else []
        ids, memory, state = take(group, slice(size))
        logits, state = self.stages[k](state)
        answers, leaves, memory = self.policy.decide(self.exits[k], logits, memory)
        count = int(leaves.sum())  # the only point where the host waits for the device
        gone = slice(count)
        stay = slice(count, None)  # all or none leave: slices, so nothing is copied
        if 0 < count < len(ids):
            order = (~leaves).byte().argsort(stable=True)
            gone = order[:count]
            stay = order[count:]
        if count < len(ids):
            self.queues[k + 1].append(take((ids, memory, state), stay))
        return Answers(ids[gone], answers[gone], torch.full_like(ids[gone], self.exits[k]))
