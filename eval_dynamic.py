"""Evaluates a checkpoint: every exit (anytime), thresholds over budgets (dynamic), real early exit
(runtime)."""

import copy
import json
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from adaptive.confidence import CONFIDENCES, confidence_function
from adaptive.flops import cost_table, count, single_costs
from adaptive.inference import ExitTables, fold_batch_norm
from adaptive.latency import compare_orders
from adaptive.policies import Policies
from adaptive.report import plot_curve, write_report
from adaptive.routing import routing
from adaptive.tables import anytime_lines, dynamic_lines, routing_lines, runtime_lines
from adaptive.thresholds import SWEEPS
from datasets import OPENERS, Source, default_num_calib, eval_loader, make_split, open_data, split_train
from engine import evaluate, summarise
from models import MultiExitModel, create_model, model_class, model_options, nearest
from training.augment import Augment, eval_transform, train_transform
from training.cascade import assemble, read_parts, stored_run
from training.checkpoint import load, save
from training.flags import MODEL_FLAG, RUN_FLAGS, TRANSFORM_FLAGS, Flag, parse_flags, with_defaults
from training.foreign import load_network, stored_flags
from training.popular import only_popular
from utils import Compute, describe_machine, one_process_first, run_main, start_compute, write_text

NAMES = f"{', '.join(OPENERS)} or a timm name (hfds/..., wds/..., tfds/..., torch/...)"
DATA_FLAGS = [
    Flag("data_set", str, "DIGITS", f"{NAMES}; IMNET where only --data_path is given"),
    Flag("data_path", str, None, "folder or .npz file of the training images"),
    Flag("eval_data_path", str, None, "folder or .npz file of the test images"),
    Flag("popular_classes", int, (), "only these classes, and all others as one more", many=True, low=0),
    Flag("nb_classes", int, None, "number of classes, where the data set does not tell", low=1),
    Flag("input_size", int, None, "side of the images in pixels; default: the data set's own", low=1),
    Flag("mean", float, None, "mean per channel instead of the data set's own", many=True),
    Flag("std", float, None, "standard deviation per channel instead of the data set's own", many=True),
    Flag(
        "imagenet_default_mean_and_std",
        bool,
        True,
        "false: normalise with 0.5 / 0.5 instead of the data set's own",
    ),
    Flag(
        "crop_pct",
        float,
        None,
        "share of the short side that evaluation keeps above 32 pixels; default 224/256",
    ),
    Flag(
        "num_calib",
        int,
        None,
        "training images held out for calibration; default: a tenth, at most 5,000",
        low=0,
    ),
    Flag("seed", int, 0, "seed of the splits, the weights and the training", low=0),
    Flag("download", bool, False, "fetch torchvision data sets that are missing"),
    Flag("train_split", str, "train", "timm data sets: name of the training split"),
    Flag("val_split", str, "validation", "timm data sets: name of the test split"),
    Flag("calib_split", str, None, "timm data sets that are streams: name of the calibration split"),
]
EXIT_FLAGS = [
    Flag(
        "weights", str, "auto", "auto: the moving average if there is one", choices=("auto", "model", "ema")
    ),
    Flag("mode", str, "all", "what to evaluate", choices=("anytime", "dynamic", "runtime", "all")),
    Flag(
        "confidence",
        str,
        "max_prob",
        f"{', '.join(CONFIDENCES)}; energies with a temperature: energy_logits:2",
    ),
    Flag(
        "calib",
        str,
        "held_out",
        "images for thresholds",
        choices=("held_out", "train_augmented", "half_test"),
    ),
    Flag(
        "quota_sweep",
        str,
        "msdnet",
        "list of exit distributions; all but wide are published",
        choices=tuple(SWEEPS),
    ),
    Flag(
        "quota_scales", float, (), "factor on the quota of each exit but the last, e.g. 0.85 1 0.5", many=True
    ),
    Flag(
        "router_threshold", float, (), "thresholds of all exits but the last, beside the sweep's", many=True
    ),
    Flag(
        "shares", float, (), "shares to leave at all exits but the last, beside the sweep's", many=True, low=0
    ),
    Flag("budget", float, None, "runtime: multiply-adds allowed; default: as good as the last exit", low=0),
    Flag("accuracy", float, None, "runtime: least accuracy wanted, a fraction, instead of a budget", low=0),
    Flag("row", int, (), "runtime: rows of dynamic.json to run instead, from 0", many=True, low=0),
    Flag("runtime_images", int, 2000, "runtime: how many of the test images to time", low=1),
    Flag(
        "micro_batch",
        int,
        None,
        "runtime: images per call; default: the fastest of 16 to 256, measured",
        low=1,
    ),
    Flag("fold_bn", bool, True, "runtime: fold batch norm into the convolutions"),
]
FLAGS = {
    "checkpoint": [
        Flag("checkpoint", str, None, "file to evaluate, ours or a published one"),
        MODEL_FLAG,
    ],
    "data (default: as stored in the checkpoint)": DATA_FLAGS,
    "running": RUN_FLAGS,
    "exits": EXIT_FLAGS,
}


def filled_in(groups: dict[str, list[Flag]], *given: dict[str, Any]) -> Namespace:
    """`with_defaults`, where images in a folder are ImageNet's unless a data set is named."""
    implied = {"data_set": "IMNET"} if any(values.get("data_path") for values in given) else {}
    return with_defaults(groups, implied, *given)


class Splits(NamedTuple):
    """An opened data set, cut; `calib_indices` are the rows of `source.train` that `calib` holds."""

    source: Source
    augment: Augment
    train: Dataset
    calib: Dataset
    test: Dataset
    calib_indices: list[int]


def open_splits(args: Namespace, calib_indices: list[int] | None = None, **augment: Any) -> Splits:
    """Opens the data that the data flags name and cuts it; `augment` are options of the training
    transform."""
    with one_process_first(args.download):
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
        raise ValueError(
            f"--nb_classes {args.nb_classes}, but {args.data_set} has {source.num_classes} classes"
        )
    if args.popular_classes:
        source = only_popular(source, args.popular_classes)
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
        if max(calib_indices, default=0) >= total:
            held = f"image {max(calib_indices)} of its training set"
            raise ValueError(f"the checkpoint held out {held}, but {args.data_path} has {total} images")
        held = set(calib_indices)
        train_rows = [i for i in range(total) if i not in held]
    clean = eval_transform(options)
    train = make_split(source.train, train_rows, train_transform(options))
    held_out = (source.train, calib_indices) if source.calib is None else (source.calib, None)
    calib = make_split(*held_out, clean)
    return Splits(source, options, train, calib, make_split(source.test, None, clean), calib_indices or [])


def ordered_loader(split: Dataset, args: Namespace, compute: Compute) -> DataLoader:
    """A loader in order, every image once over all processes."""
    return eval_loader(
        split,
        batch_size=max(1, int(1.5 * args.batch_size)),
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and compute.device.type == "cuda",
        rank=compute.rank,
        world_size=compute.world_size,
    )


def print_costs(model: MultiExitModel, arch: dict[str, Any], input_size: int) -> None:
    """The cost of every exit under each convention; a network that can run as published is also built to do
    so."""
    published = model
    if "lazy" in model_options(arch["name"]):
        published = create_model(arch["name"], arch["num_classes"], **{**arch["options"], "lazy": False})
    print("\n".join(cost_table(model, published, (3, input_size, input_size))))


class Evaluation:
    """A checkpoint's network on its data: what is given on the command line, the rest as it was trained."""

    def __init__(self, given: dict[str, Any], options: dict[str, Any]) -> None:
        source, parts = given.get("checkpoint"), []
        if not source and not options.get("networks"):
            raise ValueError(
                "name the file to evaluate: --checkpoint FILE, or the networks of a cascade: --networks"
            )
        if not source:
            source, parts = "of the cascade", read_parts(options.pop("networks"))
        content = stored_run(parts) if parts else load(source)
        stored = stored_flags(content, [*DATA_FLAGS, *TRANSFORM_FLAGS], source)
        if not parts and given.get("model") and not content.get("args"):  # as its authors saw the images
            stored |= dict(zip(("mean", "std"), model_class(given["model"]).normalisation, strict=False))
        if given.get("data_set", stored.get("data_set")) != stored.get("data_set"):
            stored |= {
                "data_path": None,
                "eval_data_path": None,
            }  # they are of the data set it was trained on
        self.args = args = filled_in(FLAGS, stored, given)
        confidence_function(
            args.confidence
        )  # so that a wrong name is said now, not after the images are read
        self.compute = start_compute(
            args.device, args.amp_dtype if args.use_amp else "none", args.channels_last
        )
        same_split = all(
            getattr(args, name) == stored.get(name) for name in ("data_set", "num_calib", "seed")
        )
        held_out = content.get("calib_indices") if same_split else None
        self.trained_on_calib = held_out is None
        if held_out is None and args.calib == "train_augmented":
            held_out = []  # as published: all training images are there to be sampled
        augment = {flag.name: stored[flag.name] for flag in TRANSFORM_FLAGS if flag.name in stored}
        self.splits = open_splits(args, held_out, **augment)
        seen = self.splits.augment
        images = {"num_classes": self.splits.source.num_classes, "input_size": seen.input_size}
        if parts:
            content = content | assemble(parts, images["num_classes"], seen)
        images |= {"mean": seen.mean, "std": seen.std}
        model, self.arch, self.which = load_network(
            content, source, args.weights, name=args.model, options=options, **images
        )
        self.source = "; ".join(part.source for part in parts) or source
        self.cascade = None
        if parts:  # to be written as a checkpoint that is enough by itself
            run = {
                **vars(args),
                "mean": list(seen.mean),
                "std": list(seen.std),
                "input_size": seen.input_size,
            }
            run = {flag.name: run[flag.name] for flag in DATA_FLAGS}
            self.cascade = {**content, "arch": self.arch, "args": run, "epoch": "cascade"}
        self.model = model.to(self.compute.device)
        self.shape = (3, self.splits.augment.input_size, self.splits.augment.input_size)
        counted = count(model, self.shape)
        self.costs, self.papers, self.uncounted = counted.macs, counted.papers, counted.uncounted
        self.policies = Policies(
            args.quota_sweep,
            len(self.costs),
            scales=args.quota_scales,
            shares=args.shares,
            thresholds=args.router_threshold,
            picked=args.row,
        )

    def run(self) -> None:
        """Prints and writes what the mode asks for."""
        args, main_process = self.args, self.compute.rank == 0
        if main_process:
            print(f"{self.arch['name']}: {self.which} in {self.source}, {len(self.splits.test)} test images")
            if args.flops:
                print_costs(self.model, self.arch, self.shape[1])
        calib, origin, test = None, "none", self.tables(self.splits.test, "test")
        if args.mode != "anytime":
            calib, test, origin = self.calibrate(test)
        if main_process:
            self.write(test, calib, origin)

    def tables(self, images: Dataset, title: str) -> ExitTables:
        """What every exit says about every image."""
        loader = ordered_loader(images, self.args, self.compute)
        return evaluate(self.model, loader, self.compute, confidence=self.args.confidence, title=title)

    def calibrate(self, test: ExitTables) -> tuple[ExitTables, ExitTables, str]:
        """Tables to choose thresholds on, tables to report on, and what the first are."""
        args, train, calib = self.args, self.splits.train, self.splits.calib
        generator = torch.Generator().manual_seed(args.seed)
        if args.calib == "half_test":
            order, half = torch.randperm(len(test), generator=generator), len(test) // 2
            return (
                test.part(order[:half]),
                test.part(order[half:]),
                f"{half} random test images, not reported on",
            )
        origin = f"{len(calib)} images held out of the training set, evaluation transform"
        if args.calib == "train_augmented" and isinstance(train, IterableDataset):
            raise ValueError("--calib train_augmented needs training images by index; a stream has none")
        if args.calib == "train_augmented":
            first = torch.randperm(len(train), generator=generator)[: 101 * args.batch_size]
            calib = Subset(train, first.tolist())
            origin = f"{len(calib)} training images with training augmentation, the published procedure"
        elif self.trained_on_calib:
            origin += " (of a checkpoint without a stored split: the network was probably trained on them)"
        if len(calib) == 0:
            raise ValueError("no images were held out for calibration (--num_calib 0); use --calib half_test")
        if self.compute.rank == 0:
            print(f"thresholds are chosen on {origin}")
        return self.tables(calib, "calibrate"), test, origin

    def run_exits(self, rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Really exits early with the thresholds of `rows` and times it beside the static networks."""
        args, compute = self.args, self.compute
        test, count = self.splits.test, args.runtime_images
        if not isinstance(test, IterableDataset):  # files may be sorted by class
            count = min(count, len(test))
            test = Subset(test, torch.linspace(0, len(test) - 1, count).long().tolist())
        loader = ordered_loader(test, args, Compute(compute.device))
        parts = islice(loader, -(-count // loader.batch_size))
        images, targets = (
            torch.cat(column)[:count].to(compute.device) for column in zip(*parts, strict=True)
        )
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        tuned = fold_batch_norm(self.model) if args.fold_bn else copy.deepcopy(self.model)
        tuned = tuned.to(dtype=compute.amp, memory_format=layout)
        tuned_images = images.to(dtype=compute.amp or images.dtype, memory_format=layout)
        points = {f"row {i}": torch.tensor(row["thresholds"], dtype=torch.float64) for i, row in rows.items()}
        return compare_orders(
            points, self.model, tuned, images, tuned_images, targets, args.confidence, args.micro_batch
        )

    def write(self, test: ExitTables, calib: ExitTables | None, origin: str) -> None:
        """Prints and writes the tables, the curve and the report."""
        out = Path(
            self.args.output_dir
            or (Path(self.args.checkpoint).parent if self.args.checkpoint else "runs/ebjr")
        )
        out.mkdir(parents=True, exist_ok=True)
        if self.cascade:
            save(out / "cascade.pth", self.cascade)
        figures, alone = summarise(test), single_costs(self.model, self.shape)
        exits = [{"exit": k, "macs": macs, "alone": alone[k]} for k, macs in enumerate(self.costs)]
        for row in exits:
            row |= {name: figures[f"{name}/exit{row['exit']}"] for name in ("loss", "acc1", "acc5")}
        print("\n".join(anytime_lines(exits)))
        write_text(out / "anytime.json", json.dumps(exits, indent=1))
        if calib is None:
            return
        about = {"confidence": self.args.confidence, "num_classes": self.arch["num_classes"]}
        rows, runtime, router = self.policies.rows(calib, test, self.costs, about), None, None
        print("\n".join(dynamic_lines(rows)))
        write_text(out / "dynamic.json", json.dumps(rows, indent=1))
        write_text(
            out / "dynamic.txt", "".join(f"{100 * r['accuracy']:.6f}\t{r['macs']:.1f}\n" for r in rows)
        )
        chosen = self.policies.choose(rows, calib, budget=self.args.budget, accuracy=self.args.accuracy)
        if len(exits) > 1:
            router = rows[chosen[0]] | routing(test, rows[chosen[0]]["thresholds"], self.costs, self.papers)
            print("\n".join(routing_lines(router)))
            write_text(out / "routing.json", json.dumps(router, indent=1))
        if self.args.mode in ("runtime", "all"):
            runtime = self.run_exits({i: rows[i] for i in chosen})
            print("\n".join(runtime_lines(runtime)))
            write_text(out / "runtime.json", json.dumps(runtime, indent=1))
        title = f"{self.arch['name']} on {self.args.data_set}"
        drawn = {"runtime": runtime, "router": router}
        plot_curve(out / "curve.png", exits, rows, title=title, **drawn)
        page = {
            "title": title,
            "subtitle": f"{len(exits)} exits, {len(test)} test images",
            "facts": self.facts(origin),
        }
        write_report(out / "report.html", exits=exits, rows=rows, **drawn, **page)
        print(f"wrote the tables, curve.png and report.html to {out}")

    def facts(self, origin: str) -> list[tuple[str, str]]:
        """How each number was obtained."""
        args = self.args
        return [
            ("Network", f"{self.arch['name']} {self.arch['options'] or ''}: {self.which} in {self.source}"),
            (
                "Test images",
                f"{args.data_set} {args.eval_data_path or args.data_path or ''}, {self.shape[1]} pixels",
            ),
            ("Thresholds", f"chosen on {origin}; confidence {args.confidence}; quotas of {args.quota_sweep}"),
            (
                "MACs",
                f"multiply-adds run for one image, earlier heads included; uncounted: {self.uncounted or 'none'}",
            ),
            (
                "Speed",
                f"{describe_machine(self.compute.device)}; medians of rounds in turn, best micro-batch per kind",
            ),
        ]


def main(argv: list[str]) -> None:
    """The command line."""
    Evaluation(*parse_flags(FLAGS, argv, model_options, nearest)).run()


if __name__ == "__main__":
    run_main(main)
