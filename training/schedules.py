"""What changes from optimizer step to optimizer step, as pure functions of the step."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from utils import UserError


def cosine(start: float, end: float, step: int, length: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `length`, and `end` from there on."""
    progress = min(step / max(length, 1), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(start: float, end: float, step: int, length: int) -> float:
    """A line from `start` at step 0 to `end` at step `length`, and `end` from there on."""
    progress = min(step / max(length, 1), 1.0)
    return end + (start - end) * (1 - progress)


def lr_at(
    step: int,
    *,
    schedule: str,
    base: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    milestones: Sequence[int] = (),
    decay_rate: float = 0.1,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Every schedule starts with `warmup_steps` steps (at most `total_steps`) that rise linearly from 0 to
    `base`, both included. Then "cosine" falls to `minimum` (the Dynamic Perceiver recipe), "multistep" is
    multiplied by `decay_rate` at every milestone (in steps, ascending; MSDNet, RANet), "linear" has `minimum`
    at the last step (a triangle with the warm-up; airbench), and "constant" stays.
    Raises ValueError for other names.
    """
    warmup_steps = min(warmup_steps, total_steps)
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    if schedule == "cosine":
        return cosine(base, minimum, step - warmup_steps, total_steps - warmup_steps)
    if schedule == "multistep":
        return base * decay_rate ** bisect_right(milestones, step)
    if schedule == "linear":
        return linear(base, minimum, step - warmup_steps, total_steps - warmup_steps - 1)
    if schedule == "constant":
        return base
    raise UserError(f"unknown schedule {schedule!r}; choose from cosine, multistep, linear, constant")


def weight_decay_at(step: int, *, base: float, end: float | None, total_steps: int) -> float:
    """Weight decay of optimizer step `step`: a cosine from `base` to `end`; always `base` if that is None."""
    return base if end is None else cosine(base, end, step, total_steps)


def micro_batches_at(update_freq: int, steps: int, rest: int, step: int) -> int:
    """Micro-batches of optimizer step `step`; the last of an epoch's `steps` has `rest`, unless that is 0."""
    return rest if rest and (step + 1) % steps == 0 else update_freq


def measured_at(step: int, *, every: int, steps: int) -> bool:
    """Whether step `step` ends an epoch of `steps`, or `every` (0: never) more of its steps."""
    done = step % max(steps, 1) + 1
    return every > 0 and (done == steps or done % every == 0)
