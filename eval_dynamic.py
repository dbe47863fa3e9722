"""Evaluates a checkpoint: every exit alone (anytime), thresholds swept over budgets (dynamic), real early exit (runtime)."""

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from adaptive.confidence import CONFIDENCES
from adaptive.flops import cost_table, count
from adaptive.inference import ExitTables, fold_batch_norm
from adaptive.latency import measure, policies_of
from adaptive.report import plot_curve, write_report
from adaptive.tables import anytime_lines, dynamic_lines, runtime_lines
from adaptive.thresholds import SWEEPS, cheapest, geometric_quotas, quota_thresholds, simulate, within_budget
from datasets import Source, default_num_calib, eval_loader, make_split, open_data, split_train
from engine import evaluate, summarise
from models import MultiExitModel, create_model, model_options, nearest
from training.augment import Augment, eval_transform, train_transform
from training.checkpoint import load, load_weights
from training.foreign import weights_of
from utils import Compute, Flag, describe_machine, parse_flags, run_main, start_compute, with_defaults, write_json

DATA_FLAGS = [
    Flag(
        "data_set",
        str,
        "DIGITS",
        "DIGITS, CIFAR10, CIFAR100, FashionMNIST, IMNET, image_folder, or a timm name (hfds/...)",
    ),
    Flag("data_path", str, None, "folder or .npz file of the training images"),
    Flag("eval_data_path", str, None, "folder or .npz file of the test images"),
    Flag("nb_classes", int, None, "number of classes, where the data set does not tell", low=1),
    Flag("input_size", int, None, "side of the images in pixels; default: the data set's own", low=1),
    Flag("mean", float, None, "mean per channel instead of the data set's own", many=True),
    Flag("std", float, None, "standard deviation per channel instead of the data set's own", many=True),
    Flag("imagenet_default_mean_and_std", bool, True, "false: normalise with 0.5 / 0.5 instead of the data set's own"),
    Flag("crop_pct", float, None, "share of the short side that evaluation keeps above 32 pixels; default 224/256"),
    Flag("num_calib", int, None, "training images held out for calibration; default: a tenth, at most 5,000", low=0),
    Flag("seed", int, 0, "seed of the splits, the weights and the training", low=0),
    Flag("download", bool, False, "fetch torchvision data sets that are missing"),
    Flag("train_split", str, "train", "timm data sets: name of the training split"),
    Flag("val_split", str, "validation", "timm data sets: name of the test split"),
    Flag("calib_split", str, None, "timm data sets that are streams: name of the calibration split"),
]
RUN_FLAGS = [
    Flag("output_dir", str, "", "where results go; default when evaluating: beside the checkpoint"),
    Flag("device", str, "auto", "auto, cpu, cuda or cuda:N"),
    Flag("batch_size", int, 64, "images per process and micro-batch; evaluation takes 1.5 times as many", low=1),
    Flag("num_workers", int, 10, "data loading processes", low=1),
    Flag("pin_mem", bool, True, "load into pinned memory (GPU only)"),
    Flag("use_amp", bool, False, "mixed precision"),
    Flag(
        "amp_dtype",
        str,
        "auto",
        "mixed precision type; auto: fp16 on GPU, bf16 on CPU",
        choices=("auto", "bf16", "fp16"),
    ),
    Flag("channels_last", bool, False, "channels-last memory format"),
    Flag("flops", bool, False, "print what every exit costs, under each convention"),
]
EXIT_FLAGS = [
    Flag("mode", str, "all", "what to evaluate", choices=("anytime", "dynamic", "runtime", "all")),
    Flag("confidence", str, "max_prob", "when an exit is sure", choices=tuple(CONFIDENCES)),
    Flag("calib", str, "held_out", "images for thresholds", choices=("held_out", "train_augmented", "half_test")),
    Flag("quota_sweep", str, "msdnet", "published list of exit distributions", choices=tuple(SWEEPS)),
    Flag(
        "quota_scales",
        float,
        (),
        "factors on the quota of each exit but the last (Dyn-Perceiver: 0.85 1 0.5)",
        many=True,
    ),
    Flag(
        "budget",
        float,
        None,
        "runtime: mean multiply-adds allowed; default: the cheapest as good as the last exit",
        low=0,
    ),
    Flag("row", int, None, "runtime: row of dynamic.json to run instead, from 0", low=0),
    Flag("runtime_images", int, 2000, "runtime: how many of the test images to time", low=1),
    Flag("micro_batch", int, None, "runtime: images per call; default: the fastest of 16 to 256, measured", low=1),
    Flag("fold_bn", bool, True, "runtime: fold batch norm into the convolutions"),
]
FLAGS = {
    "checkpoint": [
        Flag("checkpoint", str, None, "file to evaluate, ours or a published one"),
        Flag("weights", str, "auto", "auto: the moving average if there is one", choices=("auto", "model", "ema")),
        Flag("model", str, "", "network, for checkpoints that do not name theirs"),
    ],
    "data (default: as stored in the checkpoint)": DATA_FLAGS,
    "running": RUN_FLAGS,
    "exits": EXIT_FLAGS,
}


class Splits(NamedTuple):
    """An opened data set, cut; `calib_indices` are the rows of `source.train` that `calib` holds."""

    source: Source
    augment: Augment
    train: Dataset
    calib: Dataset
    test: Dataset
    calib_indices: list[int]


def open_splits(args: Namespace, calib_indices: list[int] | None = None, **augment: Any) -> Splits:
    """Opens the data that the data flags name and cuts it; `augment` are options of the training transform."""
    source = open_data(
        args.data_set,
        args.data_path,
        args.eval_data_path,
        splits=(args.train_split, args.val_split),
        calib_split=args.calib_split,
        num_classes=args.nb_classes,
        download=args.download,
        seed=args.seed,
    )
    if args.nb_classes not in (None, source.num_classes):
        raise ValueError(f"--nb_classes {args.nb_classes}, but {args.data_set} has {source.num_classes} classes")
    mean, std = (source.mean, source.std) if args.imagenet_default_mean_and_std else ((0.5,) * 3, (0.5,) * 3)
    size, mean, std = args.input_size or source.input_size, tuple(args.mean or mean), tuple(args.std or std)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"--mean {mean} --std {std}: give three numbers each, deviations above 0")
    options = Augment(input_size=size, mean=mean, std=std, crop_pct=args.crop_pct, **augment)
    train_rows = None
    if source.calib is None:
        total = len(source.train)
        if calib_indices is None:
            wanted = default_num_calib(args.data_set, total) if args.num_calib is None else args.num_calib
            _, calib_indices = split_train(total, wanted, args.seed)
        held = set(calib_indices)
        train_rows = [i for i in range(total) if i not in held]
    clean = eval_transform(options)
    train = make_split(source.train, train_rows, train_transform(options))
    calib = make_split(source.train if source.calib is None else source.calib, calib_indices, clean)
    return Splits(source, options, train, calib, make_split(source.test, None, clean), calib_indices or [])


def test_loader(split: Dataset, args: Namespace, compute: Compute) -> DataLoader:
    """A loader in order, every image once over all processes."""
    return eval_loader(
        split,
        batch_size=max(1, int(1.5 * args.batch_size)),
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and compute.device.type == "cuda",
        rank=compute.rank,
        world_size=compute.world_size,
    )


def amp_type(args: Namespace) -> str:
    """none, bf16, fp16 or auto, as the flags say."""
    return args.amp_dtype if args.use_amp else "none"


AUGMENT_FLAGS = ("color_jitter", "aa", "train_interpolation", "reprob", "remode", "recount")


def load_network(
    content: dict, args: Namespace, options: dict[str, Any], num_classes: int
) -> tuple[MultiExitModel, dict[str, Any], str]:
    """The network of a checkpoint with its weights, its architecture, and which weights these are."""
    average = content.get("model_ema") is not None if args.weights == "auto" else args.weights == "ema"
    weights, arch = weights_of(content, args.checkpoint, ema=average)
    if arch is None:
        if not args.model:
            raise ValueError(f"checkpoint {args.checkpoint} does not name its network: give --model and its options")
        arch = {"name": args.model, "options": options, "num_classes": num_classes}
    if arch["num_classes"] != num_classes:
        raise ValueError(f"checkpoint {args.checkpoint} has {arch['num_classes']} classes, the data set {num_classes}")
    model = create_model(arch["name"], arch["num_classes"], **arch["options"])
    load_weights(model, weights, f"checkpoint {args.checkpoint}")
    return model.eval(), arch, "moving average of the weights" if average else "weights"


def calibrate(
    args: Namespace, splits: Splits, model: MultiExitModel, compute: Compute, test: ExitTables
) -> tuple[ExitTables, ExitTables, str]:
    """Tables to choose thresholds on, tables to report on, and what the first are."""
    if args.calib == "half_test":
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))
        half = len(test) // 2
        return (
            test.part(order[:half]),
            test.part(order[half:]),
            f"{half} random test images; all results are on the others",
        )
    images, origin = splits.calib, f"{len(splits.calib)} images held out of the training set, evaluation transform"
    if args.calib == "train_augmented":
        order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(args.seed))
        images = Subset(splits.train, order[: 101 * args.batch_size].tolist())
        origin = f"{len(images)} training images with training augmentation, the published procedure"
    if len(images) == 0:
        raise ValueError("no images were held out for calibration (--num_calib 0); use --calib half_test")
    loader = test_loader(images, args, compute)
    return evaluate(model, loader, compute, confidence=args.confidence, title="calibrate"), test, origin


def operating_points(args: Namespace, calib: ExitTables, test: ExitTables, costs: list[int]) -> list[dict[str, Any]]:
    """The quota rule at every ratio of the sweep: thresholds chosen on calib, what they do to it and to test."""
    rows = []
    for ratio in SWEEPS[args.quota_sweep]:
        thresholds = quota_thresholds(calib.confidence, geometric_quotas(ratio, len(costs), args.quota_scales))
        on_calib = simulate(calib.confidence, calib.correct, thresholds, costs)
        on_test = simulate(test.confidence, test.correct, thresholds, costs)
        row = {"policy": f"{args.quota_sweep} p={ratio:.4g}", "confidence": args.confidence}
        row |= {"thresholds": thresholds.tolist()}
        row |= {"accuracy": on_test.accuracy, "macs": on_test.cost, "shares": on_test.shares}
        row |= {"calib_accuracy": on_calib.accuracy, "calib_macs": on_calib.cost}
        rows.append(row)
    return rows


def choose_row(args: Namespace, rows: list[dict[str, Any]], calib: ExitTables) -> int:
    """The operating point to run: the row asked for, the best within the budget, or the cheapest as good as the last
    exit; judged on calib alone.
    """
    if args.row is not None:
        if args.row >= len(rows):
            raise ValueError(f"--row {args.row}, but there are rows 0 to {len(rows) - 1}")
        return args.row
    accuracies, costs = [row["calib_accuracy"] for row in rows], [row["calib_macs"] for row in rows]
    if args.budget is not None:
        return within_budget(accuracies, costs, args.budget)
    return cheapest(accuracies, costs, calib.correct[-1].double().mean().item())


def run_exits(
    args: Namespace, model: MultiExitModel, splits: Splits, compute: Compute, row: dict[str, Any], costs: list[int]
) -> dict[str, Any]:
    """Really exits early with the thresholds of `row` and times it beside the static networks."""
    test = Subset(splits.test, range(min(args.runtime_images, len(splits.test))))
    alone = Compute(compute.device)
    loader = test_loader(test, args, alone)
    images, targets = (torch.cat(column).to(compute.device) for column in zip(*loader, strict=True))
    tables = evaluate(
        model, list(zip(images.split(64), targets.split(64), strict=True)), alone, confidence=args.confidence
    )
    thresholds = torch.tensor(row["thresholds"], dtype=tables.confidence.dtype)
    simulated = simulate(tables.confidence, tables.correct, thresholds, costs)

    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    tuned = fold_batch_norm(model) if args.fold_bn else copy.deepcopy(model)
    tuned = tuned.to(dtype=compute.amp, memory_format=layout)
    tuned_images = images.to(dtype=compute.amp or images.dtype, memory_format=layout)
    policies = policies_of(model, tuned, images, tuned_images, thresholds, args.confidence)
    table = measure(policies, targets, costs, micro_batch=args.micro_batch)
    for line in table:
        exits = line.pop("exits")
        line["mismatches"] = int((exits != simulated.exit_index).sum()) if line["policy"].startswith("early") else None
    by_name = {line["policy"]: line for line in table}
    early, static = by_name["early exit, throughput order"], by_name[f"exit {len(costs) - 1} alone"]
    return {
        "order": "throughput",
        "policy": row["policy"],
        "thresholds": row["thresholds"],
        "accuracy": early["accuracy"],
        "macs": early["macs"],
        "shares": simulated.shares,
        "mismatches": early["mismatches"],
        "num_images": len(test),
        "table": table,
        "speedup": early["images_per_s"] / static["images_per_s"],
        "macs_ratio": static["macs"] / early["macs"],
        "speedup_over_plain": early["images_per_s"] / by_name["all exits, as trained"]["images_per_s"],
    }


def print_costs(model: MultiExitModel, arch: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """The cost of every exit under each convention, and whatever the counters disagree on or cannot count."""
    published = model
    if "lazy" in model_options(arch["name"]):
        published = create_model(arch["name"], arch["num_classes"], **{**arch["options"], "lazy": False})
    print("\n".join(cost_table(model, published, shape)))


def held_out_rows(content: dict, args: Namespace) -> list[int] | None:
    """The calibration images of a checkpoint, unless it is evaluated on other data than it was trained on."""
    stored = content["args"] if isinstance(content.get("args"), dict) else {}
    same = all(getattr(args, name) == stored.get(name) for name in ("data_set", "data_path", "num_calib", "seed"))
    return content.get("calib_indices") if same else None


def run(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Evaluates as the given flags and model options say; the data are those of the checkpoint unless given."""
    if not given.get("checkpoint"):
        raise ValueError("name the file to evaluate: --checkpoint FILE")
    content = load(given["checkpoint"])
    stored = content["args"] if isinstance(content.get("args"), dict) else {}
    args = with_defaults(FLAGS, {flag.name: stored[flag.name] for flag in DATA_FLAGS if flag.name in stored}, given)
    compute = start_compute(args.device, amp_type(args), args.channels_last)
    calib_rows = held_out_rows(content, args)
    splits = open_splits(args, calib_rows, **{name: stored[name] for name in AUGMENT_FLAGS if name in stored})
    model, arch, which = load_network(content, args, options, splits.source.num_classes)
    model = model.to(compute.device)
    shape = (3, splits.augment.input_size, splits.augment.input_size)
    costs = count(model, shape).macs
    if compute.rank == 0:
        print(f"{arch['name']}: {which} in {args.checkpoint}, {model.num_exits} exits, {len(splits.test)} test images")
        if calib_rows is None and args.calib == "held_out" and args.mode != "anytime":
            print("note: the checkpoint stores no held-out images of this data; calib's were probably trained on")
        if args.flops:
            print_costs(model, arch, shape)
    test = evaluate(model, test_loader(splits.test, args, compute), compute, confidence=args.confidence, title="test")
    calib, origin = None, "none"
    if args.mode != "anytime":
        calib, test, origin = calibrate(args, splits, model, compute, test)
    if compute.rank == 0:
        facts = {
            "Network": f"{arch['name']} {arch['options'] or ''}, {which} in {args.checkpoint}",
            "Test images": f"{test.loss.shape[1]} of {args.data_set} {args.eval_data_path or args.data_path or ''}",
            "Thresholds": f"chosen on {origin}; confidence {args.confidence}; quotas {args.quota_sweep} {args.quota_scales or ''}",
            "MACs": "multiply-adds that the stages execute for one image, counted operator by operator on the meta device, "
            "heads of earlier exits included",
            "Speed": f"{describe_machine(compute.device)}; every policy at its fastest micro-batch, medians of interleaved rounds",
        }
        write_results(args, model, splits, compute, costs, test, calib, f"{arch['name']} on {args.data_set}", facts)


def write_results(
    args: Namespace,
    model: MultiExitModel,
    splits: Splits,
    compute: Compute,
    costs: list[int],
    test: ExitTables,
    calib: ExitTables | None,
    title: str,
    facts: dict[str, str],
) -> None:
    """Prints the tables that the mode asks for and writes them to the output folder."""
    out = Path(args.output_dir or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    figures = summarise(test)
    names = ("loss", "acc1", "acc5")
    exits = [{"exit": k, **{n: figures[f"{n}/exit{k}"] for n in names}, "macs": macs} for k, macs in enumerate(costs)]
    print("\n".join(anytime_lines(exits)))
    write_json(out / "anytime.json", exits)
    if calib is None:
        return
    rows, runtime = operating_points(args, calib, test, costs), None
    print("\n".join(dynamic_lines(rows)))
    write_json(out / "dynamic.json", rows)
    (out / "dynamic.txt").write_text("".join(f"{100 * r['accuracy']:.6f}\t{r['macs']:.1f}\n" for r in rows))
    if args.mode != "dynamic":
        chosen = choose_row(args, rows, calib)
        runtime = run_exits(args, model, splits, compute, rows[chosen], costs)
        print("\n".join(runtime_lines(runtime, chosen)))
        write_json(out / "runtime.json", runtime)
    plot_curve(out / "curve.png", exits, rows, title=title, runtime=runtime)
    subtitle = f"{len(exits)} exits, {test.loss.shape[1]} test images"
    write_report(
        out / "report.html",
        title=title,
        subtitle=subtitle,
        exits=exits,
        rows=rows,
        runtime=runtime,
        facts=facts.items(),
    )
    print(f"wrote curve.png, report.html and the tables to {out}")


def main(argv: list[str]) -> None:
    """The command line."""
    run(*parse_flags(FLAGS, argv, model_options, nearest))


if __name__ == "__main__":
    run_main(main)
