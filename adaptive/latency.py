"""Honest timing: warmed up, synchronised, and interleaved, so that a machine that drifts slows every policy alike."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.confidence import confidence_function
from adaptive.flops import exit_costs, single_costs
from adaptive.inference import run_adaptive, run_single
from adaptive.thresholds import exit_of
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
    device = targets.device
    sizes = {name: micro_batch or _fastest_size(policy, device) for name, policy in policies.items()}
    calls = {name: partial(policy.run, policy.images, sizes[name]) for name, policy in policies.items()}
    times = interleaved(calls, rounds=rounds, device=device)
    rows = []
    for name, policy in policies.items():
        logits, exits = calls[name]()
        macs = policy.macs
        if macs is None:
            macs = torch.tensor(costs, dtype=torch.float64)[exits.cpu()].mean().item()
        p50, p95 = _single_latencies(policy, singles, device) if policy.one_by_one else (None, None)
        row = {"policy": name, "micro_batch": sizes[name], "images_per_s": len(targets) / times[name]}
        row |= {"p50_ms": p50, "p95_ms": p95, "macs": macs}
        row |= {"accuracy": (logits.argmax(1) == targets).double().mean().item(), "exits": exits.cpu()}
        rows.append(row)
    return rows


def compare(
    table: list[dict[str, Any]], model: MultiExitModel, images: Tensor, thresholds: Tensor, confidence: str
) -> dict[str, Any]:
    """Puts the rows of `measure` beside the simulation of `model` on the same images, and early exit beside the rest.

    `mismatches` are samples that left elsewhere than simulated, `speedup` and `macs_ratio` those of throughput order
    over the static network that ends at the last exit, `speedup_over_plain` over all exits of the network as trained.
    """
    with torch.inference_mode():
        logits = torch.cat([torch.stack(model(part)) for part in images.split(64)], dim=1)
    simulated = exit_of(confidence_function(confidence)(logits), thresholds.to(images.device)).cpu()
    rows = [{k: v for k, v in row.items() if k != "exits"} for row in table]
    for row, measured in zip(rows, table, strict=True):
        early = row["policy"].startswith("early")
        row["mismatches"] = int((measured["exits"] != simulated).sum()) if early else None
    by_name = {row["policy"]: row for row in rows}
    pooled, static = by_name["early exit, throughput order"], by_name[f"exit {model.num_exits - 1} alone"]
    plain = by_name["all exits, as trained"]
    shares = torch.bincount(simulated, minlength=model.num_exits).double() / len(images)
    return {
        "order": "throughput",
        "thresholds": thresholds.tolist(),
        "shares": shares.tolist(),
        "num_images": len(images),
        **{name: pooled[name] for name in ("accuracy", "macs", "mismatches")},
        "speedup": pooled["images_per_s"] / static["images_per_s"],
        "macs_ratio": static["macs"] / pooled["macs"],
        "speedup_over_plain": pooled["images_per_s"] / plain["images_per_s"],
        "table": rows,
    }


def _fastest_size(policy: Policy, device: torch.device) -> int:
    part = policy.images[: max(len(policy.images) // 4, 1)]
    times = interleaved({n: partial(policy.run, part, n) for n in MICRO_BATCHES}, rounds=1, device=device)
    return min(times, key=times.get)


def _single_latencies(policy: Policy, singles: int, device: torch.device) -> tuple[float, float]:
    """Median and 95th percentile of batch 1, in milliseconds."""
    images = policy.images[:singles].split(1)
    for image in images[:10]:
        policy.run(image, 1)
    times = [1e3 * _seconds(partial(policy.run, image, 1), device) for image in images]
    return percentile(times, 0.5), percentile(times, 0.95)
