"""Trains a multi-exit network; with `--eval true` evaluates it (as `eval_dynamic.py` does)."""

import math
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adaptive.thresholds import geometric_quotas
from datasets import Split, set_epoch, train_loader
from engine import epoch_line, evaluate_all, train_one_epoch
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
from training.flags import GROUPS, OPTIMIZATION_FLAGS, TRANSFORM_FLAGS, check, parse_flags
from training.foreign import (
    architecture,
    check_same_run,
    fine_tune,
    load_teacher,
    resume_update,
    resume_weighting,
    resume_weights,
)
from training.l2w import SampleWeighting, Weighting
from training.losses import (
    Objective,
    exit_weights,
    joint_objective,
    self_distillation,
    teacher_distillation,
    with_energy_hinge,
)
from training.optim import Update, lr_at, make_optimizer, weight_decay_at
from training.popular import balanced
from training.regimes import phase_of, trained_through
from training.weights import write_tables
from utils import Board, Compute, append_json, gather, run_main, seed_everything, start_compute

FLAGS = {**GROUPS, "data": DATA_FLAGS, "exits": EXIT_FLAGS}


def training_loader(args: Namespace, splits: Splits, compute: Compute) -> DataLoader:
    """Shuffled, augmented, and mixed if mixup or cutmix is on."""
    mixing = {name: getattr(args, name) for name in ("mixup", "cutmix", "cutmix_minmax", "smoothing")}
    mixing |= {name: getattr(args, f"mixup_{name}") for name in ("prob", "switch_prob", "mode")}
    collate = mixup_collate(num_classes=splits.source.num_classes, **mixing)
    loader = train_loader(
        splits.train,
        batch_size=args.batch_size,
        update_freq=args.update_freq // math.gcd(args.update_freq, passes(args)),
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and compute.device.type == "cuda",
        collate=collate,
        seed=args.seed,
        rank=compute.rank,
        world_size=compute.world_size,
    )
    if args.popular_classes:
        loader.sampler.chances = balanced(splits.train, len(args.popular_classes))
    return loader


def passes(args: Namespace) -> int:
    """Losses that the objective makes of a batch."""
    return 2 if args.l2w else 1


def make_update(args: Namespace, network: MultiExitModel, steps: int, compute: Compute) -> Update:
    """Optimizer, schedules and moving average for `steps` optimizer steps per epoch."""
    together = passes(args) if args.update_freq == 1 else 1  # steps that one batch takes, at one rate
    steps //= together
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
        lr_scales=args.lr_scales,
    )
    lr = partial(
        lr_at,
        schedule=args.schedule,
        base=args.lr,
        minimum=args.min_lr,
        warmup_steps=args.warmup_steps // together if args.warmup_steps > 0 else args.warmup_epochs * steps,
        total_steps=args.epochs * steps,
        milestones=sorted(epoch * steps for epoch in args.decay_epochs),
        decay_rate=args.decay_rate,
    )
    decay = partial(
        weight_decay_at, base=args.weight_decay, end=args.weight_decay_end, total_steps=args.epochs * steps
    )
    average = {
        "decay": args.model_ema_decay,
        "use_warmup": args.model_ema_warmup,
        "device": "cpu" if args.model_ema_force_cpu else None,
    }
    return Update(
        network,
        optimizer,
        lr=lambda step: lr(step // together),
        weight_decay=lambda step: decay(step // together),
        clip_grad=args.clip_grad or None,
        update_freq=args.update_freq,
        fp16=compute.amp == torch.float16,
        ema=ModelEmaV3(network, **average) if args.model_ema else None,
    )


class Training:
    """A run: everything that an epoch needs, from the start or as a checkpoint left it."""

    def __init__(self, args: Namespace, options: dict[str, Any], compute: Compute) -> None:
        self.args, self.compute, self.out = args, compute, Path(args.output_dir) if args.output_dir else None
        if self.out and compute.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
        path = args.resume or (self.out and args.auto_resume and latest(self.out)) or None
        content = load(path) if path else {}
        check_same_run(vars(args), content, path, [*DATA_FLAGS, *OPTIMIZATION_FLAGS])
        augment = {flag.name: getattr(args, flag.name) for flag in TRANSFORM_FLAGS}
        self.splits = open_splits(args, content.get("calib_indices"), **augment)
        # A published network has seen the images held out from here on, so they are not stored as unseen.
        self.held_out = content.get("calib_indices") if path else self.splits.calib_indices
        self.loader = training_loader(args, self.splits, compute)

        seed_everything(args.seed, 0, 0)
        num_classes = self.splits.source.num_classes
        seen = self.splits.augment
        self.arch = architecture(
            args.model, options, num_classes, seen.input_size, mean=seen.mean, std=seen.std
        )
        # Weights of the network's authors are fetched for a first epoch only.
        self.network = create_model(
            args.model, num_classes, **({} if path else options) | self.arch["options"]
        )
        if path:
            resume_weights(self.network, self.arch, content, path)
        elif args.finetune:
            line = fine_tune(
                self.network, args.finetune, model_key=args.model_key, model_prefix=args.model_prefix
            )
            if compute.rank == 0:
                print(line)
        layout = torch.channels_last if compute.channels_last else torch.preserve_format
        self.network = self.network.to(compute.device, memory_format=layout)
        if args.compile:
            self.network.compile()
        self.steps = len(self.loader) * passes(args) // args.update_freq
        self.update = make_update(args, self.network, self.steps, compute)
        self.first, self.best, self.phase = args.start_epoch, -1.0, ""
        self.update.start(self.first * self.steps)
        if path:
            self.best = content.get("best", self.best)
            self.first = resume_update(self.update, content, path, self.steps)
        self.teacher = None
        if args.kd_teacher:
            teacher = load_teacher(args.kd_teacher, num_classes, self.splits.augment)
            self.teacher = teacher.to(compute.device, memory_format=layout)
        self.enter(self.phase_at(self.first))
        if args.l2w and self.first:
            line = resume_weighting(self.objective, content, path, self.first)
            if line and compute.rank == 0:
                print(line)
        if compute.rank == 0:
            size, parts = sum(p.numel() for p in self.network.parameters()), ("train", "calib", "test")
            print(f"{args.model}: {self.network.num_exits} exits, {size / 1e6:.3f} M parameters")
            print(", ".join(f"{len(getattr(self.splits, part))} {part} images" for part in parts))
            print(f"{compute.world_size} x {compute.device}" + (f", going on from {path}" if path else ""))
            if args.flops:
                print_costs(self.network, self.arch, self.splits.augment.input_size)

    def phase_at(self, epoch: int) -> str:
        """What the regime does in an epoch."""
        regime = "heads" if self.args.freeze_backbone else self.args.regime
        return phase_of(regime, epoch, round(self.args.first_share * self.args.epochs))

    def make_objective(self, phase: str) -> Objective:
        """The losses of a phase."""
        args, num_exits = self.args, self.network.num_exits
        factors = {name: getattr(args, f"loss_{name}_factor") for name in ("att", "cnn", "merge")}
        given = args.exit_weights or (
            None if any(w is not None for w in factors.values()) else self.network.loss_weights
        )
        weights, distil = exit_weights(num_exits, given, **factors), None
        if phase == "last":
            weights = [0.0] * (num_exits - 1) + [1.0]
        if self.teacher is not None:
            distil = teacher_distillation(self.teacher, args.alpha_kd, args.T_kd, last_only=phase == "last")
        elif args.with_kd and phase != "last":
            distil = self_distillation(args.alpha_kd, args.T_kd)
        losses = {"exit_weights": weights, "smoothing": args.smoothing, "distil": distil}
        if not args.l2w:
            objective = joint_objective(**losses)
            other = len(args.popular_classes)
            return with_energy_hinge(objective, other, *args.energy_hinge) if args.energy_hinge else objective
        options = Weighting(**{name: getattr(args, name) for name in Weighting.__annotations__})
        proportions = geometric_quotas(args.target_p_index / 20, num_exits)
        run = {"proportions": proportions, "batches": len(self.loader), "epochs": args.epochs}
        return SampleWeighting(options, self.update, **run, **losses)

    def enter(self, phase: str) -> None:
        """Trains from now on as `phase` of the regime says."""
        side = self.splits.augment.input_size
        core = trained_through(self.network, phase, (3, side, side))
        if self.compute.world_size > 1:
            on_gpu = self.compute.device.type == "cuda"
            core = DistributedDataParallel(core, device_ids=[self.compute.device] if on_gpu else None)
        self.model, self.phase, self.objective = core, phase, self.make_objective(phase)
        self.update.attach(core)

    def state(self, epoch: int) -> dict[str, Any]:
        """What a checkpoint holds after `epoch`; every epoch seeds its own generators, so none need
        saving."""
        mean, std, size = self.splits.augment.mean, self.splits.augment.std, self.splits.augment.input_size
        return {
            "model": self.network.state_dict(),
            **self.update.state_dict(),
            "arch": self.arch,
            "epoch": epoch,
            "best": self.best,
            "args": {**vars(self.args), "mean": list(mean), "std": list(std), "input_size": size},
            "calib_indices": self.held_out,
            "l2w": self.objective.state_dict() if self.args.l2w else None,
        }

    def run(self) -> None:
        """All epochs that are left: train, evaluate on calib, log, save."""
        args, rank = self.args, self.compute.rank
        board = Board(
            args.log_dir if rank == 0 else None, args.project if args.enable_wandb else None, vars(args)
        )
        if self.first >= args.epochs and rank == 0:
            print(f"all {args.epochs} epochs are done")
        for epoch in range(self.first, args.epochs):
            start = time.monotonic()
            seed_everything(args.seed, epoch, rank)
            set_epoch(self.loader, epoch)
            if self.phase_at(epoch) != self.phase:
                self.enter(self.phase_at(epoch))
            means = train_one_epoch(
                self.model,
                self.loader,
                self.objective,
                self.update,
                self.compute,
                epoch=epoch,
                print_freq=args.print_freq,
                on_print=lambda means: board.add(
                    {**means, **self.update.figures()}, self.update.step, "train/"
                ),
            )
            figures = {} if args.disable_eval else self.evaluate(last=epoch == args.epochs - 1)
            judged = [value for key, value in figures.items() if key.startswith(self.judge)]
            score = sum(judged) / len(judged) if judged else -1.0
            best, self.best = (
                score > self.best or not judged,
                max(score, self.best),
            )  # the last, with none to judge by
            record = {
                "epoch": epoch,
                **{f"train/{k}": v for k, v in means.items()},
                **figures,
                **self.update.figures(),
            }
            record |= {"best": self.best, "seconds": time.monotonic() - start}
            if args.l2w:
                record |= self.log_weights(board, epoch)
            if rank == 0:
                board.add({**figures, "seconds": record["seconds"]}, self.update.step)
                print(epoch_line(record, args.epochs))
                self.save(record, best)

    def log_weights(self, board: Board, epoch: int) -> dict[str, float]:
        """What the weight net did in this epoch: `l2w/...`, histograms, and a file if one is due."""
        figures, tables = self.objective.take_figures(self.compute), self.objective.take_tables()
        board.add_histograms(tables, self.update.step, "l2w/")
        if self.out and self.args.l2w_tables and (epoch + 1) % self.args.l2w_tables == 0:
            train, order = self.splits.train, range(len(tables["losses"]))
            if isinstance(train, Split):  # otherwise a stream, whose samples have no number
                order = [train.indices[i] for i in self.loader.sampler]
            shards = gather({"index": torch.tensor(order), **tables}, self.compute)
            if self.compute.rank == 0:
                write_tables(self.out / f"l2w-{epoch}.npz", shards)
        return {f"l2w/{name}": value for name, value in figures.items()}

    @property
    def judge(self) -> str:
        """The figures whose mean over exits makes a checkpoint the best."""
        return "calib_ema/acc1/" if self.args.model_ema and self.args.model_ema_eval else "calib/acc1/"

    def evaluate(self, last: bool) -> dict[str, float]:
        """`calib/...`, after the last epoch also `test/...`, and of the moving average `calib_ema/...` if
        asked for."""
        average = self.args.model_ema and self.args.model_ema_eval
        networks = {"": self.network, **({"_ema": self.update.ema.module} if average else {})}
        figures = {}
        for part in ("calib", "test") if last else ("calib",):
            images = getattr(self.splits, part)
            if len(images):
                loader = ordered_loader(images, self.args, self.compute)
                figures |= evaluate_all(networks, loader, self.compute, title=part)
        return figures

    def save(self, record: dict[str, Any], best: bool) -> None:
        """Adds the epoch to the log and writes its checkpoints."""
        if self.out is None:
            return
        append_json(
            self.out / "log.txt", record
        )  # first: who is killed in between repeats the epoch, and this line
        if self.args.save_ckpt:
            freq, keep = self.args.save_ckpt_freq, self.args.save_ckpt_num
            save_epoch(
                self.out, self.state(record["epoch"]), epoch=record["epoch"], best=best, freq=freq, keep=keep
            )


def main(argv: list[str]) -> None:
    """The command line."""
    given, options = parse_flags(FLAGS, argv, model_options, nearest)
    args = filled_in(FLAGS, given)
    if args.eval:
        path = args.resume or (args.output_dir and latest(args.output_dir))
        if not path:
            raise ValueError(
                "nothing to evaluate: give --resume FILE, or an --output_dir that holds a checkpoint"
            )
        Evaluation({**given, "checkpoint": str(path)}, options).run()
        return
    check(args)
    compute = start_compute(args.device, args.amp_dtype if args.use_amp else "none", args.channels_last)
    Training(args, options, compute).run()


if __name__ == "__main__":
    run_main(main)
