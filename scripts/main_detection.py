"""Trains a detector of models/detection.py on data in COCO's format and evaluates it with COCO's measures.

    python scripts/main_detection.py --model faster_rcnn_rexnet_100 --data_path "$DATA/coco" --output_dir
        runs/coco \ --backbone_weights rexnetv1_1.0.pth --freeze_norm true

`--data_path` holds annotations/instances_{split}.json and the images in {split}/, as https://cocodataset.org
has it. The same command goes on where a run was stopped; `--eval true` only evaluates; `--flops true` only
prints what the detector costs. Average precision needs pycocotools (requirements-extra.txt); training does
not.
"""

import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.detection import create_detector, detector_costs
from models.registry import nearest
from training.checkpoint import LAST, load, load_weights, save_epoch
from training.detection import BUILD, CocoImages, collate, detect, precision, train_epoch
from training.flags import Flag, parse_flags, with_defaults
from training.foreign import weights_of
from training.optim import Update, lr_at, make_optimizer
from utils import ShardSampler, append_json, run_main, seed_everything, start_compute

FLAGS = [
    Flag("model", str, "faster_rcnn_rexnet_100", "faster_rcnn_rexnet_WIDTH or mask_rcnn_rexnet_WIDTH"),
    Flag("data_path", str, "", "folder in COCO's layout"),
    Flag("train_split", str, "train2017", "name of the split to train on"),
    Flag("val_split", str, "val2017", "name of the split to evaluate on"),
    Flag("output_dir", str, "runs/detection", "where log and checkpoints go"),
    Flag("backbone_weights", str, "", "a ReXNetV1 classifier to start from, as published"),
    Flag("freeze_norm", bool, False, "keep the backbone's batch norms as they are"),
    Flag("min_size", int, 800, "short side of the images in pixels", low=32),
    Flag("max_size", int, 1333, "longest long side in pixels", low=32),
    Flag("smallest_anchor", int, 32, "side of the finest level's anchors in pixels", low=1),
    Flag("proposals", int, 1000, "boxes per image that are classified in evaluation", low=1),
    Flag("sampled", int, 512, "boxes per image that training classifies", low=1),
    Flag("epochs", int, 12, "", low=1),
    Flag("batch_size", int, 2, "", low=1),
    Flag("lr", float, 0.0025, "peak learning rate; torchvision takes 0.02 for 16 images", low=0),
    Flag("momentum", float, 0.9, "", low=0),
    Flag("weight_decay", float, 1e-4, "", low=0),
    Flag("warmup_steps", int, 500, "steps of linear warm-up", low=0),
    Flag("decay_epochs", int, (8, 11), "epochs after which the rate falls to a tenth", many=True, low=0),
    Flag("clip_grad", float, None, "largest gradient norm", low=0),
    Flag("num_workers", int, 2, "data loading processes", low=0),
    Flag("seed", int, 0, ""),
    Flag("device", str, "auto", "auto, cpu, cuda or cuda:N"),
    Flag("eval", bool, False, "evaluate the last checkpoint in --output_dir instead of training"),
    Flag("flops", bool, False, "print the detector's costs instead of training"),
]


def print_costs(name, num_classes):
    """What the parts of a detector cost for 800 x 1200 pixels, the published size, and for 800 x 1280."""
    with torch.device("meta"):
        detector = create_detector(name, num_classes)
    print(f"{name}: {num_classes} classes, multiply-adds in G on one image, 1,000 proposals")
    for height, width in ((800, 1200), (800, 1280)):
        costs = detector_costs(detector, height, width)
        parts = ", ".join(
            f"{part} {value / 1e9:.1f}" for part, value in costs._asdict().items() if part != "params"
        )
        print(
            f"{height} x {width}: {costs.params / 1e6:.2f} M parameters; {parts}; total {costs.total / 1e9:.1f}"
        )


def given_weights(path):
    """The state dict of a classifier, or None where no file is named."""
    return weights_of(load(path), path) if path else None


class Run:
    """Data, detector and optimizer, from the start or as the last checkpoint left them."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.output_dir)
        self.device = start_compute(args.device, "none", False).device
        masks = args.model.startswith("mask_rcnn")
        self.val = CocoImages(args.data_path, args.val_split, masks=masks)
        self.train = (
            self.val if args.eval else CocoImages(args.data_path, args.train_split, masks=masks, flip=True)
        )
        if self.train.categories != self.val.categories:
            raise ValueError(f"{self.train.path} and {self.val.path} have different categories")
        seed_everything(args.seed, 0, 0)
        self.classes = len(self.train.categories) + 1
        self.detector = create_detector(
            args.model,
            self.classes,
            backbone_weights=given_weights(args.backbone_weights),
            **{name: getattr(args, name) for name in BUILD},
        ).to(self.device)
        self.sampler = ShardSampler(len(self.train), shuffle=True, seed=args.seed, group=args.batch_size)
        options = {"collate_fn": collate, "num_workers": args.num_workers, "batch_size": args.batch_size}
        self.loader = DataLoader(self.train, sampler=self.sampler, generator=torch.Generator(), **options)
        self.val_loader = DataLoader(self.val, **options)
        if not self.sampler.used:
            raise ValueError(
                f"{len(self.train)} training images are fewer than --batch_size {args.batch_size}"
            )
        settings = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum}
        optimizer = make_optimizer(
            self.detector, opt="sgd", eps=None, betas=None, filter_bias_and_bn=False, **settings
        )
        steps = len(self.loader)
        schedule = {
            "schedule": "multistep",
            "base": args.lr,
            "minimum": 0.0,
            "warmup_steps": args.warmup_steps,
        }
        schedule |= {
            "total_steps": args.epochs * steps,
            "milestones": sorted(e * steps for e in args.decay_epochs),
        }
        rate, decay = partial(lr_at, **schedule), lambda step: args.weight_decay
        self.update = Update(
            self.detector, optimizer, lr=rate, weight_decay=decay, clip_grad=args.clip_grad or None
        )
        self.first, self.best = 0, -1.0
        last = self.out / LAST
        if last.exists():
            self.restore(load(last), last)
        elif args.eval:
            raise ValueError(f"nothing to evaluate: {self.out} holds no {LAST}")

    def restore(self, content, source):
        """Goes on from a checkpoint of this program."""
        if content.get("model_name") != self.args.model or not isinstance(content.get("epoch"), int):
            raise ValueError(
                f"checkpoint {source} holds {content.get('model_name')}, not --model {self.args.model}"
            )
        for name in BUILD:
            here, there = getattr(self.args, name), content["args"][name]
            if here != there:
                raise ValueError(f"checkpoint {source} was trained with --{name} {there}, not {here}")
        load_weights(self.detector, content["model"], f"checkpoint {source}")
        self.update.load_state_dict(content)
        self.first, self.best = content["epoch"] + 1, content["best"]

    def evaluate(self):
        """COCO's figures on the validation split."""
        return precision(self.val, detect(self.detector, self.val_loader, self.device))

    def fit(self):
        """All epochs that are left: train, evaluate, log, save."""
        self.out.mkdir(parents=True, exist_ok=True)
        for epoch in range(self.first, self.args.epochs):
            start = time.monotonic()
            seed_everything(self.args.seed, epoch, 0)
            self.sampler.set_epoch(epoch)
            self.loader.generator.manual_seed(
                int(np.random.default_rng((self.args.seed, epoch)).integers(2**63))
            )
            means = train_epoch(self.detector, self.loader, self.update, self.device, epoch)
            figures = self.evaluate() if find_spec("pycocotools") else {}
            score = figures.get("AP", -1.0)
            best, self.best = score >= self.best, max(score, self.best)
            losses = {f"train/{name}": value for name, value in means.items()}
            seconds = time.monotonic() - start
            append_json(self.out / "log.txt", {"epoch": epoch, **losses, **figures, "seconds": seconds})
            state = {
                "model": self.detector.state_dict(),
                **self.update.state_dict(),
                "epoch": epoch,
                "best": self.best,
            }
            state |= {
                "model_name": self.args.model,
                "args": vars(self.args),
                "categories": self.train.categories,
            }
            save_epoch(self.out, state, epoch=epoch, best=best, freq=1, keep=0)
            shown = (
                ", ".join(f"{name} {value:.3f}" for name, value in figures.items()) or "no pycocotools, no AP"
            )
            print(f"epoch {epoch + 1}/{self.args.epochs}: loss {means['loss']:.4f}, {shown}")


def main(argv):
    """The command line."""
    given, _ = parse_flags({"flags": FLAGS}, argv, lambda name: {}, nearest)
    args = with_defaults({"flags": FLAGS}, given)
    if args.flops:
        print_costs(args.model, 91)
        return
    if args.batch_size == 1 and not (args.freeze_norm or args.eval):
        raise ValueError("--batch_size 1: ReXNet's batch norms need 2 images or more, or --freeze_norm true")
    if not args.data_path:
        raise ValueError("name a folder in COCO's layout: --data_path FOLDER")
    run = Run(args)
    if not args.eval:
        run.fit()
    elif not find_spec("pycocotools"):
        raise ValueError("--eval true needs a package: pip install pycocotools")
    else:
        print(", ".join(f"{name} {value:.4f}" for name, value in run.evaluate().items()))


if __name__ == "__main__":
    run_main(main)
