"""How fast a cascade of two networks answers real images: the published way, the teacher alone, and really
routed.

    python scripts/bench_ebjr.py "$DATA/cifar10_test.npz" STUDENT.pth TEACHER.pth

The published way is batch 1: student, a test in Python, teacher. The teacher alone and the cascade run at
their fastest micro-batch, as trained and as deployed (batch norm folded, channels-last), all in turn in one
run. The floor is the multiply-adds at the speed of a large matrix product.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.confidence import confidence_function
from adaptive.flops import exit_costs, single_costs
from adaptive.inference import fold_batch_norm, run_adaptive, run_single
from adaptive.latency import interleaved
from datasets import load_npz
from models import create_model
from training.augment import Augment
from training.cascade import assemble, read_parts
from utils import describe_machine, run_main

SIZES = (8, 16, 32, 64, 128, 250)
CPU = torch.device("cpu")


@torch.inference_mode()
def published(model, images, thresholds, confidence):
    """Logits [N, C], image by image; a teacher where the student is not sure."""
    sure, limit, answers = confidence_function(confidence), thresholds[0].item(), []
    for image in images.split(1):
        state = model.begin(image)
        logits, state = model.step(0, state)
        answers.append(logits if sure(logits).item() >= limit else model.step(1, state)[0])
    return torch.cat(answers)


def alone(model, images, size, k):
    """Logits [N, C] of exit k for all images."""
    return torch.cat([run_single(model, part, k) for part in images.split(size)])


def routed(model, images, size, thresholds, confidence):
    """Logits [N, C] of the cascade, survivors pooled to full micro-batches."""
    return run_adaptive(model, images, thresholds, confidence, order="throughput", micro_batch=size)[0]


def peak(dtype):
    """Operations per second of a matrix product."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    calls = {"product": lambda: a @ b}
    calls["product"]()
    return 2 * 2048**3 / interleaved(calls, rounds=15, device=CPU)["product"]


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="an .npz file of 32 x 32 test images")
    parser.add_argument(
        "networks", nargs=2, help="student, teacher: NAME:weights=FILE, or a checkpoint of ours"
    )
    parser.add_argument("--confidence", default="energy_softmax")
    parser.add_argument("--threshold", type=float, default=2.46)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    data = load_npz(Path(args.images), args.classes)
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous() / 255
    labels, thresholds = (
        torch.from_numpy(data.labels),
        torch.tensor([args.threshold, -1e8], dtype=torch.float64),
    )
    parts = read_parts([text if "weights=" in text else f"weights={text}" for text in args.networks])
    content = assemble(parts, args.classes, Augment(32, (0.0,) * 3, (1.0,) * 3))
    plain = create_model("ebjr", args.classes, **content["arch"]["options"])
    plain.load_state_dict(content["model"])
    plain.eval()
    tuned = fold_batch_norm(plain).to(memory_format=torch.channels_last)
    forms = {"plain": (plain, images, torch.float32)}
    forms["tuned"] = (tuned, images.to(memory_format=torch.channels_last), torch.float32)
    half = fold_batch_norm(plain).to(torch.bfloat16, memory_format=torch.channels_last)
    forms["tuned bf16"] = (half, images.to(torch.bfloat16, memory_format=torch.channels_last), torch.bfloat16)

    costs, single = exit_costs(plain, (3, 32, 32)), single_costs(plain, (3, 32, 32))
    exits = run_adaptive(plain, images, thresholds, args.confidence, order="throughput")[1]
    share = (exits > 0).double().mean().item()
    mean = torch.tensor(costs, dtype=torch.float64)[exits].mean().item()
    calls = {"(a) the published way": partial(published, plain, images, thresholds, args.confidence)}
    macs, kinds = {"(a) the published way": mean}, {"(a) the published way": torch.float32}
    for form, (model, x, dtype) in forms.items():
        for name, run, cost in (
            ("student alone", partial(alone, k=0), single[0]),
            ("(b) teacher alone", partial(alone, k=1), single[1]),
            ("(c) cascade", partial(routed, thresholds=thresholds, confidence=args.confidence), mean),
        ):
            size = min(SIZES, key=lambda s, m=model, v=x, r=run: seconds(partial(r, m, v[:500], s)))
            title = f"{name}, {form}, batches of {size}"
            calls[title], macs[title], kinds[title] = partial(run, model, x, size), cost, dtype
    answers = {name: call() for name, call in calls.items()}
    times = interleaved(calls, rounds=args.rounds, device=CPU)
    peaks = {dtype: peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(f"{describe_machine(CPU)}; {len(images)} images, {100 * share:.1f} % routed")
    print(
        f"matrix product {peaks[torch.float32] / 1e9:.0f} GFLOP/s in fp32, {peaks[torch.bfloat16] / 1e9:.0f} in bf16"
    )
    print(
        f"{'':42}{'images/s':>9}{'of (a)':>8}{'MACs, M':>9}{'top-1, %':>9}{'floor, images/s':>17}{'of floor':>9}"
    )
    first = len(images) / times["(a) the published way"]
    for name, time_taken in times.items():
        speed, floor = len(images) / time_taken, peaks[kinds[name]] / 2 / macs[name]
        right = 100 * (answers[name].argmax(1) == labels).double().mean().item()
        figures = f"{speed:9.0f}{speed / first:8.2f}{macs[name] / 1e6:9.2f}{right:9.2f}"
        print(f"{name:42}{figures}{floor:17.0f}{speed / floor:9.2f}")
    for form in forms:
        student, teacher, cascade = (
            next(spent for name, spent in times.items() if name.startswith(f"{kind}, {form}, ")) / len(images)
            for kind in ("student alone", "(b) teacher alone", "(c) cascade")
        )
        gain, ideal, parts = teacher / cascade, single[1] / mean, teacher / (student + share * teacher)
        print(
            f"{form}: (c) / (b) {gain:.2f}; by multiply-adds {ideal:.2f}, by the speeds of both networks {parts:.2f}"
        )


def seconds(call):
    """Time of the second call."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_main(main)
