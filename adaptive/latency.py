"""Honest timing: warmed up, synchronised, and interleaved, so that a machine that drifts slows every policy alike."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.flops import exit_costs, single_costs
from adaptive.inference import run_adaptive, run_single
from models import MultiExitModel

MICRO_BATCHES = (16, 32, 64, 128, 256)


class Policy(NamedTuple):
    """A way to answer for images: `run(images, size)`, `size` of them per call, gives logits [N, C] and exits [N].

    `macs` are its mean multiply-adds per image; `None` stands for early exit's, which depend on who leaves.
    """

    run: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    images: Tensor
    macs: float | None
    one_by_one: bool = True


def interleaved(calls: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds per call, run in turn (A B C A B C ...) for `rounds` rounds after one uncounted call of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call, device))
    return {name: percentile(values, 0.5) for name, values in times.items()}


def percentile(times: list[float], share: float) -> float:
    """The value below which `share` (0..1) of the times lie, interpolated."""
    return torch.tensor(times, dtype=torch.float64).quantile(share).item()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def policies_of(
    plain: MultiExitModel,
    tuned: MultiExitModel,
    images: Tensor,
    tuned_images: Tensor,
    thresholds: Tensor,
    confidence: str,
) -> dict[str, Policy]:
    """Early exit in both orders and the static networks it competes with.

    `plain` is the network as trained and `images` [N, 3, H, W] what it reads; `tuned` is the one to deploy (folded,
    channels-last, half precision ...), which all other policies use, and `tuned_images` the same images for it.
    """
    shape, last = tuple(images.shape[1:]), plain.num_exits - 1
    alone, whole = single_costs(plain, shape), exit_costs(plain, shape)[-1]

    def static(answer: Callable[[Tensor], Tensor], k: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        def run(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
            logits = torch.cat([answer(part) for part in x.split(size)])
            return logits, torch.full((len(x),), k, device=x.device)

        return run

    def pooled(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return run_adaptive(tuned, x, thresholds, confidence, order="throughput", micro_batch=size)

    def compacted(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        parts = [run_adaptive(tuned, part, thresholds, confidence) for part in x.split(size)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    policies = {
        "all exits, as trained": Policy(static(lambda x: _last_answer(plain, x), last), images, whole),
        "all exits": Policy(static(lambda x: _last_answer(tuned, x), last), tuned_images, whole),
    }
    for k, macs in enumerate(alone):
        policies[f"exit {k} alone"] = Policy(static(lambda x, k=k: run_single(tuned, x, k), k), tuned_images, macs)
    policies["early exit, throughput order"] = Policy(pooled, tuned_images, None, one_by_one=False)
    policies["early exit, latency order"] = Policy(compacted, tuned_images, None)
    return policies


@torch.inference_mode()
def _last_answer(model: MultiExitModel, images: Tensor) -> Tensor:
    return model(images)[-1]


def measure(
    policies: dict[str, Policy],
    targets: Tensor,
    costs: list[int],
    *,
    micro_batch: int | None = None,
    rounds: int = 3,
    singles: int = 200,
) -> list[dict[str, Any]]:
    """One row per policy: {policy, micro_batch, images_per_s, p50_ms, p95_ms, macs, accuracy, exits [N]}.

    Without `micro_batch`, every policy gets the fastest of `MICRO_BATCHES` on a quarter of the images. Latencies are
    those of batch 1 over `singles` images, None where waiting for a full micro-batch makes them meaningless.
    """
    device, sizes = targets.device, {}
    for name, (run, images, *_) in policies.items():
        part = images[: max(len(images) // 4, 1)]
        candidates = {size: lambda size=size, run=run, part=part: run(part, size) for size in MICRO_BATCHES}
        times = {} if micro_batch else interleaved(candidates, rounds=1, device=device)
        sizes[name] = micro_batch or min(times, key=times.get)
    calls = {name: lambda p=p, size=sizes[name]: p.run(p.images, size) for name, p in policies.items()}
    times = interleaved(calls, rounds=rounds, device=device)
    rows = []
    for name, (run, images, macs, one_by_one) in policies.items():
        logits, exits = run(images, sizes[name])
        waits = []
        if one_by_one:
            ones = images[:singles].split(1)
            for one in ones[:10]:
                run(one, 1)
            waits = [_seconds(lambda one=one, run=run: run(one, 1), device) * 1e3 for one in ones]
        mean_macs = torch.tensor(costs, dtype=torch.float64)[exits.cpu()].mean().item() if macs is None else macs
        row = {"policy": name, "micro_batch": sizes[name], "images_per_s": len(images) / times[name]}
        row |= {
            "p50_ms": percentile(waits, 0.5) if waits else None,
            "p95_ms": percentile(waits, 0.95) if waits else None,
        }
        row |= {
            "macs": mean_macs,
            "accuracy": (logits.argmax(1) == targets).double().mean().item(),
            "exits": exits.cpu(),
        }
        rows.append(row)
    return rows
