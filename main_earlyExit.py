"""Trains a multi-exit network; with `--eval true` evaluates it (as `eval_dynamic.py` does)."""

import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets import set_epoch, train_loader
from engine import evaluate, summarise, train_one_epoch
from eval_dynamic import (
    DATA_FLAGS,
    EXIT_FLAGS,
    Evaluation,
    Splits,
    filled_in,
    open_splits,
    ordered_loader,
    print_costs,
)
from models import MultiExitModel, create_model, model_options, nearest
from training.augment import mixup_collate
from training.checkpoint import latest, load, save_epoch
from training.flags import (
    AUGMENTATION_FLAGS,
    MODEL_FLAG,
    MODEL_FLAGS,
    OBJECTIVE_FLAGS,
    OPTIMIZATION_FLAGS,
    REFUSED,
    RUN_FLAGS,
    TRAIN_RUN_FLAGS,
    TRANSFORM_FLAGS,
    Flag,
    check,
    parse_flags,
)
from training.foreign import architecture, fine_tune, resume_update, resume_weights, stored_flags
from training.losses import exit_weights, joint_objective
from training.optim import Update, lr_at, make_optimizer, weight_decay_at
from utils import Board, Compute, append_json, run_main, seed_everything, share_buffers, start_compute

FLAGS = {
    "model": [MODEL_FLAG, *MODEL_FLAGS],
    "data": DATA_FLAGS,
    "augmentation": AUGMENTATION_FLAGS,
    "optimization": OPTIMIZATION_FLAGS,
    "exits": [*OBJECTIVE_FLAGS, *EXIT_FLAGS],
    "running": [*RUN_FLAGS, *TRAIN_RUN_FLAGS],
    "accepted with their default only": [Flag(name, type(v), v, why) for name, (v, why) in REFUSED.items()],
}


def training_loader(args: Namespace, splits: Splits, compute: Compute) -> DataLoader:
    """Shuffled, augmented, and mixed if mixup or cutmix is on."""
    collate = mixup_collate(
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        smoothing=args.smoothing,
        num_classes=splits.source.num_classes,
    )
    return train_loader(
        splits.train,
        batch_size=args.batch_size,
        update_freq=args.update_freq,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and compute.device.type == "cuda",
        collate=collate,
        seed=args.seed,
        rank=compute.rank,
        world_size=compute.world_size,
    )


def make_update(args: Namespace, model: nn.Module, network: MultiExitModel, steps: int, compute: Compute) -> Update:
    """Optimizer, schedules and moving average for `steps` optimizer steps per epoch."""
    optimizer = make_optimizer(
        network,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        eps=args.opt_eps,
        betas=args.opt_betas,
        filter_bias_and_bn=args.filter_bias_and_bn,
        decay_embeddings=args.decay_embeddings,
    )
    lr = partial(
        lr_at,
        schedule=args.schedule,
        base=args.lr,
        minimum=args.min_lr,
        warmup_steps=args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * steps,
        total_steps=args.epochs * steps,
        milestones=sorted(epoch * steps for epoch in args.decay_epochs),
        decay_rate=args.decay_rate,
    )
    decay = partial(weight_decay_at, base=args.weight_decay, end=args.weight_decay_end, total_steps=args.epochs * steps)
    average = {
        "decay": args.model_ema_decay,
        "use_warmup": args.model_ema_warmup,
        "device": "cpu" if args.model_ema_force_cpu else None,
    }
    return Update(
        model,
        optimizer,
        lr=lr,
        weight_decay=decay,
        clip_grad=args.clip_grad or None,
        update_freq=args.update_freq,
        fp16=compute.amp == torch.float16,
        ema=ModelEmaV3(network, **average) if args.model_ema else None,
    )


def check_same_run(args: Namespace, content: dict, path: str | Path | None) -> None:
    """Refuses to go on from checkpoint `path` with other images, or another optimizer, than it was trained with."""
    stored = stored_flags(content, [*DATA_FLAGS, *OPTIMIZATION_FLAGS], path)
    for name in ("data_set", "num_calib", "seed", "opt"):
        if stored.get(name, getattr(args, name)) != getattr(args, name):
            raise ValueError(f"--{name} {getattr(args, name)}, but {path} was trained with {stored[name]}")


class Training:
    """A run: everything that an epoch needs, from the start or as a checkpoint left it."""

    def __init__(self, args: Namespace, options: dict[str, Any], compute: Compute) -> None:
        self.args, self.compute, self.out = args, compute, Path(args.output_dir) if args.output_dir else None
        if self.out and compute.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
        path = args.resume or (self.out and args.auto_resume and latest(self.out)) or None
        content = load(path) if path else {}
        check_same_run(args, content, path)
        augment = {flag.name: getattr(args, flag.name) for flag in TRANSFORM_FLAGS}
        self.splits = open_splits(args, content.get("calib_indices"), **augment)
        # A published network has seen the images held out from here on, so they are not stored as unseen.
        self.held_out = content.get("calib_indices") if path else self.splits.calib_indices
        self.loader = training_loader(args, self.splits, compute)

        seed_everything(args.seed, 0, 0)
        num_classes = self.splits.source.num_classes
        self.arch = architecture(args.model, options, num_classes, self.splits.augment.input_size)
        # Weights of the network's authors are fetched for a first epoch only.
        self.network = create_model(args.model, num_classes, **({} if path else options) | self.arch["options"])
        if path:
            resume_weights(self.network, self.arch, content, path)
        elif args.finetune:
            line = fine_tune(self.network, args.finetune, model_key=args.model_key, model_prefix=args.model_prefix)
            if compute.rank == 0:
                print(line)
        layout = torch.channels_last if compute.channels_last else torch.preserve_format
        model = self.network = self.network.to(compute.device, memory_format=layout)
        if args.compile:
            self.network.compile()
        if compute.world_size > 1:
            on_gpu = compute.device.type == "cuda"
            model = DistributedDataParallel(self.network, device_ids=[compute.device] if on_gpu else None)
        self.model = model
        self.steps = len(self.loader) // args.update_freq
        self.update = make_update(args, model, self.network, self.steps, compute)
        self.first, self.best = args.start_epoch, -1.0
        self.update.start(self.first * self.steps)
        if path:
            self.best = content.get("best", self.best)
            self.first = resume_update(self.update, content, path, self.steps)
        factors = {name: getattr(args, f"loss_{name}_factor") for name in ("att", "cnn", "merge")}
        self.objective = joint_objective(
            exit_weights=exit_weights(self.network.num_exits, args.exit_weights, **factors),
            smoothing=args.smoothing,
            kd_alpha=args.alpha_kd if args.with_kd else 0.0,
            kd_temperature=args.T_kd,
        )
        if compute.rank == 0:
            size, parts = sum(p.numel() for p in self.network.parameters()), ("train", "calib", "test")
            print(f"{args.model}: {self.network.num_exits} exits, {size / 1e6:.3f} M parameters")
            print(", ".join(f"{len(getattr(self.splits, part))} {part} images" for part in parts))
            print(f"{compute.world_size} x {compute.device}" + (f", going on from {path}" if path else ""))
            if args.flops:
                print_costs(self.network, self.arch, self.splits.augment.input_size)

    def state(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint holds after `epoch`; every epoch seeds its own generators, so none need saving."""
        mean, std, size = self.splits.augment.mean, self.splits.augment.std, self.splits.augment.input_size
        return {
            "model": self.network.state_dict(),
            **self.update.state_dict(),
            "arch": self.arch,
            "epoch": epoch,
            "best": self.best,
            "args": {**vars(self.args), "mean": list(mean), "std": list(std), "input_size": size},
            "calib_indices": self.held_out,
        }

    def run(self) -> None:
        """All epochs that are left: train, evaluate on calib, log, save."""
        args, rank = self.args, self.compute.rank
        board = Board(args.log_dir if rank == 0 else None, args.project if args.enable_wandb else None, vars(args))
        if self.first >= args.epochs and rank == 0:
            print(f"all {args.epochs} epochs are done")
        for epoch in range(self.first, args.epochs):
            start = time.monotonic()
            seed_everything(args.seed, epoch, rank)
            set_epoch(self.loader, epoch)
            means = train_one_epoch(
                self.model,
                self.loader,
                self.objective,
                self.update,
                self.compute,
                epoch=epoch,
                print_freq=args.print_freq,
                on_print=lambda means: board.add({**means, **self.update.figures()}, self.update.step, "train/"),
            )
            figures = {} if args.disable_eval else self.evaluate(last=epoch == args.epochs - 1)
            judged = [value for key, value in figures.items() if key.startswith(self.judge)]
            score = sum(judged) / len(judged) if judged else -1.0
            best, self.best = score > self.best, max(score, self.best)
            record = {"epoch": epoch, **{f"train/{k}": v for k, v in means.items()}, **figures, **self.update.figures()}
            record |= {"best": self.best, "seconds": time.monotonic() - start}
            if rank == 0:
                board.add({**figures, "seconds": record["seconds"]}, self.update.step)
                print(epoch_line(record, args.epochs))
                self.save(record, best)

    @property
    def judge(self) -> str:
        """The figures whose mean over exits makes a checkpoint the best."""
        return "calib_ema/acc1/" if self.args.model_ema and self.args.model_ema_eval else "calib/acc1/"

    def evaluate(self, last: bool) -> dict[str, float]:
        """`calib/...`, after the last epoch also `test/...`, and of the moving average `calib_ema/...` if asked for."""
        average = self.args.model_ema and self.args.model_ema_eval
        networks = {"": self.network, **({"_ema": self.update.ema.module} if average else {})}
        figures = {}
        for network in networks.values():
            share_buffers(network, self.compute)
        for part in ("calib", "test") if last else ("calib",):
            images = getattr(self.splits, part)
            for suffix, network in networks.items() if len(images) else ():
                loader = ordered_loader(images, self.args, self.compute)
                device = next(network.parameters()).device  # the average may be kept in main memory
                where = self.compute if device == self.compute.device else Compute(device, **self.compute.ranks)
                tables = evaluate(network, loader, where, title=part + suffix)
                figures |= {f"{part}{suffix}/{key}": value for key, value in summarise(tables).items()}
        return figures

    def save(self, record: dict[str, Any], best: bool) -> None:
        """Adds the epoch to the log and writes its checkpoints."""
        if self.out is None:
            return
        append_json(self.out / "log.txt", record)  # first: who is killed in between repeats the epoch, and this line
        if self.args.save_ckpt:
            freq, keep = self.args.save_ckpt_freq, self.args.save_ckpt_num
            save_epoch(self.out, self.state(record["epoch"]), epoch=record["epoch"], best=best, freq=freq, keep=keep)


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One line that sums up an epoch."""
    accuracies = [f"{100 * value:.2f}" for key, value in record.items() if key.startswith("calib/acc1/")]
    text = f"epoch {record['epoch'] + 1}/{epochs}: loss {record['train/loss']:.4f}"
    return f"{text}, calib top-1 by exit {' '.join(accuracies) or '-'} %, {record['seconds']:.0f} s"


def main(argv: list[str]) -> None:
    """The command line."""
    given, options = parse_flags(FLAGS, argv, model_options, nearest)
    args = filled_in(FLAGS, given)
    if args.eval:
        path = args.resume or (args.output_dir and latest(args.output_dir))
        if not path:
            raise ValueError("nothing to evaluate: give --resume FILE, or an --output_dir that holds a checkpoint")
        Evaluation({**given, "checkpoint": str(path)}, options).run()
        return
    check(args)
    compute = start_compute(args.device, args.amp_dtype if args.use_amp else "none", args.channels_last)
    Training(args, options, compute).run()


if __name__ == "__main__":
    run_main(main)
