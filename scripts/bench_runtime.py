"""Images per second of real early exit against running all exits, over batch sizes; or its latency at batch
1.

    python scripts/bench_runtime.py [--checkpoint FILE] [--model msdnet_cifar_lin5] [--shares 50 20 15 10 5]
    python scripts/bench_runtime.py --latency [--model reg800m_perceiver_t128] [--baselines
    torchvision/resnet50 ...]

With a checkpoint: its weights, its test images, and the thresholds of the cheapest setting that is as
accurate as the last exit on calib. Without: random weights and images, and thresholds by which the given
shares (percent) of the images leave at each exit. Floor: the ideal ratio is that of the multiply-adds. Every
line is measured in the same run; policies take turns, and the median of the rounds is shown.

With --latency: milliseconds for one image to leave at each exit, all earlier exits tried and found unsure,
beside one-exit networks (registered, or torchvision's own as torchvision/NAME), as built and tuned alike.
Random weights.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.confidence import max_prob
from adaptive.flops import exit_costs
from adaptive.inference import fold_batch_norm, run_adaptive
from adaptive.latency import early_policies, interleaved, percentile, static_policies
from adaptive.thresholds import EVERYBODY, NOBODY, exit_of, quota_thresholds
from eval_dynamic import Evaluation
from models import MultiExitModel, create_model
from utils import describe_machine

SIZES = (1, 8, 64, 256)
BURST = 4  # calls in a row at batch 1; the first of them, whose caches others have filled, is not counted
# Top-1 of the exits on ImageNet and the depth_factor it was published with
# (https://arxiv.org/abs/2306.11248).
PUBLISHED = {
    "reg800m_perceiver_t128": ([1, 1, 1, 2], ("68.62", "78.32", "79.15", "79.86")),
    "resnet50_0375_perceiver_t128": ([1, 1, 1, 1], ("72.93", "77.52", "74.32", "77.70")),
    "mobilenetV3_0x75_perceiver_t128": ([1, 1, 1, 3], ("53.13", "71.65", "71.89", "74.59")),
}


def trained_subject(checkpoint, count):
    """Network, images and thresholds of a checkpoint."""
    job = Evaluation({"checkpoint": checkpoint, "num_workers": 1}, {})
    calib, test, _ = job.calibrate(job.tables(job.splits.test, "test"))
    rows = job.operating_points(calib, test)
    row = rows[job.choose(rows, calib)[0]]
    images = torch.stack(
        [job.splits.test[i][0] for i in range(0, len(job.splits.test), max(1, len(job.splits.test) // count))]
    )
    print(
        f"{checkpoint}: {row['policy']}, simulated accuracy {100 * row['accuracy']:.2f} % on all test images"
    )
    return job.model, images[:count], torch.tensor(row["thresholds"])


def random_subject(name, options, shares, count, side):
    """A network with random weights, random images, and thresholds at which `shares` of them leave."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, **options).eval()
    side = side or (224 if "imagenet" in name else 32)
    images = torch.randn(count, 3, side, side)
    with torch.inference_mode():
        confidence = torch.cat([max_prob(torch.stack(model(part))) for part in images.split(64)], dim=1)
    return model, images, quota_thresholds(confidence, torch.tensor(shares) / 100)


def report(title, model, tuned, images, tuned_images, thresholds, rounds):
    """One table: batch size by policy."""
    costs = exit_costs(model, tuple(images.shape[1:]))
    policies = static_policies(model, tuned, images, tuned_images)
    policies = {
        "all exits": policies["all exits"],
        **early_policies(tuned, tuned_images, thresholds, "max_prob"),
    }
    print(f"\n{title}")
    print(
        "batch   all exits   throughput order   ratio   latency order   ratio   ideal   exits unlike simulated"
    )
    with torch.inference_mode():
        confidence = torch.cat([max_prob(torch.stack(tuned(part))) for part in tuned_images.split(64)], dim=1)
    simulated = exit_of(confidence, thresholds)
    for size in SIZES:
        count = min(len(images), max(256, 32 * size))
        ideal = costs[-1] / torch.tensor(costs, dtype=torch.float64)[simulated[:count]].mean().item()
        calls = {name: partial(p.run, p.images[:count], size) for name, p in policies.items()}
        answers = {name: call() for name, call in calls.items()}
        rates = {
            name: count / t for name, t in interleaved(calls, rounds=rounds, device=images.device).items()
        }
        differ = [int((answers[order][1] != simulated[:count]).sum()) for order in ("throughput", "latency")]
        everything, pooled, compacted = rates.values()
        line = f"{size:5}{everything:12.0f}{pooled:19.0f}{pooled / everything:8.2f}{compacted:16.0f}"
        unlike = f"{differ[0]} and {differ[1]} of {count}"
        print(f"{line}{compacted / everything:8.2f}{ideal:8.2f}{unlike:>25}")


class OneExit(MultiExitModel):
    """Any classifier as a network with one exit."""

    num_exits = 1

    def __init__(self, network):
        super().__init__()
        self.network = network

    def begin(self, images):
        """The state is the images [B, 3, H, W]."""
        return images

    def trunk(self, k, state):
        """The whole network."""
        return self.network(state), None

    def head(self, k, features):
        """The logits are there already."""
        return features


def latency_subject(name, depth_factor=None):
    """A network with random weights and, by exit, the top-1 that is told of it."""
    if name.startswith("torchvision/"):
        name = name.removeprefix("torchvision/")
        told = [
            w.meta["_metrics"]["ImageNet-1K"]["acc@1"] for w in torchvision.models.get_model_weights(name)
        ]
        row = f"{' or '.join(f'{acc:.2f}' for acc in told)} (torchvision docs, by weights)"
        return OneExit(torchvision.models.get_model(name)).eval(), [row]
    depth, told = PUBLISHED.get(name, (None, ()))
    wanted = depth_factor or depth
    model = create_model(name, **({"depth_factor": wanted} if wanted else {})).eval()
    return model, [f"{acc} (published)" for acc in told] if wanted == depth and told else [
        "-"
    ] * model.num_exits


@torch.inference_mode()
def answer(model, image, k):
    """Logits of exit k, at which the image really stops; one-exit networks have nothing to decide and just
    run."""
    if model.num_exits == 1:
        return model(image)[0]
    return run_adaptive(model, image, torch.tensor([NOBODY] * k + [EVERYBODY] * (model.num_exits - k)))[0]


def report_latency(names, depth_factor, side, rounds):
    """One table: exits of the first network and the other networks, as built and tuned."""
    torch.manual_seed(0)
    image, layout = torch.randn(1, 3, side, side), torch.channels_last
    calls, rows, differ = {}, [], 0.0
    for i, name in enumerate(names):
        model, told = latency_subject(name, None if i else depth_factor)
        tuned = fold_batch_norm(model).to(memory_format=layout)
        for k, macs in enumerate(exit_costs(model, (3, side, side))):
            both = partial(answer, model, image, k), partial(answer, tuned, image.to(memory_format=layout), k)
            expected, found = (call() for call in both)  # warms up, too
            differ = max(differ, ((expected - found).abs().max() / expected.abs().max()).item())
            rows.append((name, k, macs, told[k] if side == 224 else "-"))
            calls |= {(name, k, kind, n): call for kind, call in enumerate(both) for n in range(BURST)}
    turns = [interleaved(calls, rounds=1, device=image.device) for _ in range(rounds)]
    print(
        f"\nbatch 1, {side} pixels, fp32, ms; tuned = batch norm folded, channels-last (logits within {differ:.0e})"
    )
    print(f"{'':36}{'':5}{'':9}    as built         tuned      top-1, %, not measured here")
    print(f"{'network':36} exit  MACs, M     p50     p95     p50     p95")
    for name, k, macs, told in rows:
        line = f"{name:36}{k:5}{macs / 1e6:9.1f}"
        for kind in range(2):
            times = [1e3 * turn[name, k, kind, n] for turn in turns for n in range(1, BURST)]
            line += "".join(f"{percentile(times, share):8.1f}" for share in (0.5, 0.95))
        print(f"{line}  {told}")


def main():
    """Prints a table for the network as it is and one for each way to deploy it, or the table of
    latencies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--model", help="default: msdnet_cifar_lin5, with --latency reg800m_perceiver_t128")
    parser.add_argument(
        "--depth_factor", type=int, nargs=4, help="default: the network's, with --latency as published"
    )
    parser.add_argument("--input_size", type=int, help="default: the network's, with --latency 224")
    parser.add_argument("--latency", action="store_true", help="batch 1 instead of throughput")
    baselines = ["torchvision/regnet_y_800mf", "torchvision/regnet_y_400mf"]
    parser.add_argument("--baselines", nargs="*", default=baselines, help="one-exit networks for --latency")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--shares", type=float, nargs="+", default=[50, 20, 15, 10, 5])
    parser.add_argument("--rounds", type=int, help="default: 3, with --latency 50")
    args = parser.parse_args()
    if args.latency:
        print(describe_machine(torch.device("cpu")))
        names = [args.model or "reg800m_perceiver_t128", *args.baselines]
        report_latency(names, args.depth_factor, args.input_size or 224, args.rounds or 50)
        return
    if args.checkpoint:
        model, images, thresholds = trained_subject(args.checkpoint, args.images)
    else:
        options = {"depth_factor": args.depth_factor} if args.depth_factor else {}
        model, images, thresholds = random_subject(
            args.model or "msdnet_cifar_lin5", options, args.shares, args.images, args.input_size
        )
    rounds = args.rounds or 3
    print(describe_machine(images.device))
    report("eager, fp32, images/s", model, model, images, images, thresholds, rounds)
    layout = torch.channels_last
    folded, fast = fold_batch_norm(model).to(memory_format=layout), images.to(memory_format=layout)
    report(
        "batch norm folded, channels-last, fp32, images/s", model, folded, images, fast, thresholds, rounds
    )
    half = fold_batch_norm(model).to(torch.bfloat16, memory_format=layout)
    half_images = images.to(torch.bfloat16, memory_format=layout)
    report("the same in bf16, images/s", model, half, images, half_images, thresholds, rounds)


if __name__ == "__main__":
    main()
