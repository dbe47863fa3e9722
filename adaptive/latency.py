"""Honest timing: warmed up, synchronised, and interleaved, so that a machine that drifts slows every policy
alike."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.confidence import confidence_function
from adaptive.flops import exit_costs, single_costs
from adaptive.inference import ORDERS, run_adaptive, run_single
from adaptive.thresholds import exit_of
from models import MultiExitModel

MICRO_BATCHES = (16, 32, 64, 128, 256)


class Policy(NamedTuple):
    """A way to answer for images: `run(images, size)`, `size` of them per call, gives logits [N, C] and exits
    [N].

    `macs` are its mean multiply-adds per image; None stands for early exit's, which depend on who leaves.
    Policies of one `kind` share a micro-batch.
    """

    kind: str
    run: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    images: Tensor
    macs: float | None = None


def interleaved(
    calls: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds per call, run in turn (A B C A B C ...) for `rounds` rounds; warm up before."""
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


def static_policies(
    plain: MultiExitModel, tuned: MultiExitModel, images: Tensor, tuned_images: Tensor
) -> dict[str, Policy]:
    """What early exit competes with: all exits for everybody, and each exit alone.

    `plain` is the network as trained and `images` [N, 3, H, W] what it reads; `tuned` is the one to deploy
    (folded, channels-last, half precision ...), which all policies but the first use, and `tuned_images` the
    same images for it.
    """
    shape, last = tuple(images.shape[1:]), plain.num_exits - 1

    def static(answer: Callable[[Tensor], Tensor], k: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        def run(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
            logits = torch.cat([answer(part) for part in x.split(size)])
            return logits, torch.full((len(x),), k, device=x.device)

        return run

    whole = exit_costs(plain, shape)[-1]
    policies = {
        "all exits, plain": Policy("plain", static(partial(_last_answer, plain), last), images, whole),
        "all exits": Policy("static", static(partial(_last_answer, tuned), last), tuned_images, whole),
    }
    for k, macs in enumerate(single_costs(plain, shape)):
        run = static(lambda x, k=k: run_single(tuned, x, k), k)
        policies[f"exit {k} alone"] = Policy("static", run, tuned_images, macs)
    return policies


def early_policies(
    tuned: MultiExitModel, tuned_images: Tensor, thresholds: Tensor, confidence: str
) -> dict[str, Policy]:
    """Early exit with `thresholds` [K] in both orders, by the name of the order."""

    def throughput(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return run_adaptive(tuned, x, thresholds, confidence, order="throughput", micro_batch=size)

    def latency(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        parts = [run_adaptive(tuned, part, thresholds, confidence) for part in x.split(size)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return {run.__name__: Policy(run.__name__, run, tuned_images) for run in (throughput, latency)}


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

    Without `micro_batch`, every kind of policy gets the fastest of `MICRO_BATCHES` on a quarter of the
    images. Latencies are those of batch 1 over `singles` images, None in throughput order, where images wait
    for others.
    """
    device, sizes = targets.device, {}
    for policy in policies.values():
        sizes[policy.kind] = micro_batch or sizes.get(policy.kind) or _fastest_size(policy, device)
    calls = {
        name: partial(policy.run, policy.images, sizes[policy.kind]) for name, policy in policies.items()
    }
    answers = {name: call() for name, call in calls.items()}
    times = interleaved(calls, rounds=rounds, device=device)
    rows = []
    for name, policy in policies.items():
        logits, exits = answers[name]
        macs = policy.macs
        if macs is None:
            macs = torch.tensor(costs, dtype=torch.float64)[exits.cpu()].mean().item()
        p50, p95 = (None, None) if policy.kind == "throughput" else _single_latencies(policy, singles, device)
        row = {"policy": name, "micro_batch": sizes[policy.kind], "images_per_s": len(targets) / times[name]}
        row |= {"p50_ms": p50, "p95_ms": p95, "macs": macs}
        row |= {"accuracy": (logits.argmax(1) == targets).double().mean().item(), "exits": exits.cpu()}
        rows.append(row)
    return rows


def compare_orders(
    points: dict[str, Tensor],
    plain: MultiExitModel,
    tuned: MultiExitModel,
    images: Tensor,
    tuned_images: Tensor,
    targets: Tensor,
    confidence: str,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Times early exit at some operating points, `points` (name to thresholds [K]), beside the static
    networks.

    Returns {num_images, table, points}: rows of `measure`, and for every point {point, thresholds, accuracy,
    macs, shares, mismatches (samples per order that left elsewhere than simulated with `plain`), speedup and
    macs_ratio (of throughput order over the network that ends at the last exit), speedup_over_plain (over all
    exits of `plain`)}.
    """
    costs = exit_costs(plain, tuple(images.shape[1:]))
    policies = static_policies(plain, tuned, images, tuned_images)
    for name, thresholds in points.items():
        for order, policy in early_policies(tuned, tuned_images, thresholds, confidence).items():
            policies[f"{name}, {order} order"] = policy
    rows = {row["policy"]: row for row in measure(policies, targets, costs, micro_batch=micro_batch)}
    with torch.inference_mode():
        logits = torch.cat([torch.stack(plain(part)) for part in images.split(64)], dim=1)
    sure = confidence_function(confidence)(logits).cpu()
    static, as_trained, results = rows[f"exit {plain.num_exits - 1} alone"], rows["all exits, plain"], []
    for name, thresholds in points.items():
        pooled = rows[f"{name}, throughput order"]
        simulated = exit_of(sure, thresholds)
        differ = {
            order: int((rows[f"{name}, {order} order"]["exits"] != simulated).sum()) for order in ORDERS
        }
        point = {"point": name, "thresholds": thresholds.tolist(), "mismatches": differ}
        point |= {"accuracy": pooled["accuracy"], "macs": pooled["macs"]}
        point |= {
            "shares": (torch.bincount(simulated, minlength=plain.num_exits).double() / len(images)).tolist()
        }
        point |= {"speedup": pooled["images_per_s"] / static["images_per_s"]}
        point |= {"macs_ratio": static["macs"] / pooled["macs"]}
        point |= {"speedup_over_plain": pooled["images_per_s"] / as_trained["images_per_s"]}
        results.append(point)
    table = [{key: value for key, value in row.items() if key != "exits"} for row in rows.values()]
    return {"num_images": len(images), "table": table, "points": results}


def _fastest_size(policy: Policy, device: torch.device) -> int:
    part = policy.images[: max(len(policy.images) // 4, 1)]
    calls = {size: partial(policy.run, part, size) for size in MICRO_BATCHES}
    for call in calls.values():
        call()
    times = interleaved(calls, rounds=1, device=device)
    return min(times, key=times.get)


def _single_latencies(policy: Policy, singles: int, device: torch.device) -> tuple[float, float]:
    """Median and 95th percentile of batch 1, in milliseconds."""
    images = policy.images[:singles].split(1)
    for image in images[:10]:
        policy.run(image, 1)
    times = [1e3 * _seconds(partial(policy.run, image, 1), device) for image in images]
    return percentile(times, 0.5), percentile(times, 0.95)
