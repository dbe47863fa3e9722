"""Guards a refactor: short fixed trainings of every objective must end in the same bits as before.

    python scripts/check_identity.py --root ../before --save before.json
    python scripts/check_identity.py --against before.json [--only plain l2w]

Every run is a process of its own that calls `main_earlyExit.py` of the checkout `--root` on the embedded
digits, one thread, a few batches. Kept of each: the training loss of every epoch (`float.hex`), a sha256 over
the metrics in log.txt without the seconds, and one over each of `model`, `model_ema` and `optimizer` in
checkpoint-last.pth. The last run resumes the one before it after its first epoch, and must end in the
same weights. Exit code 1 where a run fails or differs. About 100 s on one core."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import digest_of, read_flags

import torch

from utils import UserError, option, run_main

HERE = Path(__file__).resolve().parents[1]
PARTS = ("model", "model_ema", "optimizer")
COMMON = (
    "--data_set DIGITS --num_calib 1400 --num_workers 1 --device cpu --batch_size 8 --epochs 1 --seed 3 "
    "--warmup_epochs 0 --opt sgd --lr 0.05 --weight_decay 1e-4 --save_ckpt_num 0 --disable_eval true"
)
MSDNET = "--model msdnet --nBlocks 3 --nChannels 8 --growthRate 4 --grFactor 1-2 --bnFactor 1-2"
CLEAN = "--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0"
L2W = f"{MSDNET} {CLEAN} --l2w true --meta_net_hidden_size 8 --meta_lr 0.01"
PERCEIVER = "--model reg400m_perceiver_t32 --opt adamw --lr 0.004"
AUGMENTED = f"{MSDNET} --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --aa rand-m9-mstd0.5-inc1 --reprob 0.25"
LONG = (
    f"{MSDNET} {CLEAN} --epochs 2 --warmup_epochs 1 --opt adamw --lr 0.01 --model_ema true --save_ckpt_num 2"
)
RUNS = {
    "plain": f"{MSDNET} {CLEAN} --disable_eval false",
    "kd": f"{MSDNET} {CLEAN} --with_kd true --exit_weights 0.5 1 1.5",
    "teacher": f"{MSDNET} {CLEAN} --kd_teacher {{plain}}/checkpoint-last.pth",
    "l2w": L2W,
    "l2w+kd": f"{L2W} --with_kd true --epochs 2 --meta_net_input_type both --constraint_dimension mat",
    "equilibrium": f"{MSDNET} {CLEAN} --regime equilibrium",
    "l2w+equilibrium": f"{L2W} --regime equilibrium",
    "disjoint": f"{MSDNET} {CLEAN} --regime disjoint --epochs 2",
    "mixed": f"{MSDNET} {CLEAN} --regime mixed --epochs 2 --schedule multistep --decay_epochs 1",
    "boosted": f"{MSDNET.replace('msdnet', 'boosted/msdnet')} {CLEAN}",
    "ema+accumulation": f"{MSDNET} {CLEAN} --model_ema true --model_ema_decay 0.5 --update_freq 2 "
    "--clip_grad 1",
    "bf16": f"{MSDNET} {CLEAN} --use_amp true --amp_dtype bf16",
    "mixup+augmentation": AUGMENTED,
    "popular+energy": f"{MSDNET} {CLEAN} --popular_classes 1 7 --energy_hinge 0.1 -5 -20",
    "perceiver": f"{PERCEIVER} {CLEAN} --decay_embeddings true --weight_decay 0.05 --weight_decay_end 0.1",
    "perceiver+factors": f"{PERCEIVER} {CLEAN} --loss_cnn_factor 0.3 --with_kd true "
    "--lr_scales cnn_body.=0.1",
    "ranet": "--model ranet --nBlocks 1 --nChannels 8 --growthRate 4 --stepmode even --step 2 " + CLEAN,
    "heads": f"{MSDNET} {CLEAN} --finetune {{plain}}/checkpoint-last.pth --freeze_backbone true",
    "unbroken": LONG,
    "resumed": f"{LONG} --resume {{first}}",
}
SAME_WEIGHTS = {"resumed": "unbroken"}
NEEDS = SAME_WEIGHTS | {"teacher": "plain", "heads": "plain"}


@dataclass(frozen=True)
class Flags:
    """What is run and compared."""

    root: Path = option(HERE, "checkout to run")
    save: Path | None = option(None, "JSON file to write")
    against: Path | None = option(None, "JSON file to compare with")
    only: tuple[str, ...] = option((), "these runs, and those they need", choices=tuple(RUNS))


def outcome(folder: Path) -> dict[str, Any]:
    """Losses and digests of a run's folder."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    content = torch.load(folder / "checkpoint-last.pth", map_location="cpu", weights_only=True)
    losses = [line["train/loss"].hex() for line in lines]
    log = digest_of([{**line, "seconds": 0} for line in lines])
    return {"loss": losses, "log": log, **{part: digest_of(content.get(part)) for part in PARTS}}


def train(root: Path, name: str, folders: Path) -> dict[str, Any]:
    """Runs one training of a checkout; raises RuntimeError with its last line where it fails."""
    first = min(folders.glob("unbroken/checkpoint-?.pth"), default="")  # older commits count epochs from 0
    words = f"{COMMON} {RUNS[name]}".format(plain=folders / "plain", first=first)
    command = [sys.executable, "main_earlyExit.py", *shlex.split(words), "--output_dir", folders / name]
    one_thread = {"cwd": root, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    end = subprocess.run(map(str, command), capture_output=True, text=True, **one_thread)
    if end.returncode:
        raise RuntimeError(f"ended with {end.returncode}: {end.stderr.strip().splitlines()[-1]}")
    return outcome(folders / name)


def chosen(only: Collection[str]) -> list[str]:
    """The runs to do in order, with those that they need."""
    needed = {NEEDS.get(name) for name in only}
    return [name for name in RUNS if not only or name in needed.union(only)]


def verdict(name: str, found: dict[str, Any], before: dict[str, Any] | None) -> str:
    """The table's entry for a run: "yes" or "NO: " and what differs; without `before` "saved"."""
    was = found if before is None else before
    differs = [key for key, value in found[name].items() if value != was.get(name, {}).get(key)]
    if name in SAME_WEIGHTS:
        other = found.get(SAME_WEIGHTS[name], {})
        differs += [f"{part} after the break" for part in PARTS if found[name][part] != other.get(part)]
    same = "saved" if before is None else "yes"
    return f"NO: {', '.join(differs)}" if differs else same


def main(argv: list[str]) -> int:
    """Runs, prints the table, saves and compares."""
    args = read_flags(Flags, argv, __doc__)
    if args.against and not args.against.is_file():
        raise UserError(f"--against {args.against}: no such file")
    before = json.loads(args.against.read_text(encoding="utf-8")) if args.against else None
    found, wrong = {}, 0
    print(f"{'objective':20} {'loss':>12} weights identical?")
    with tempfile.TemporaryDirectory() as folders:
        for name in chosen(args.only):
            try:
                found[name] = train(args.root.resolve(), name, Path(folders))
                text, loss = verdict(name, found, before), float.fromhex(found[name]["loss"][-1])
            except RuntimeError as error:
                text, loss = f"NO: {error}", float("nan")
            wrong += text.startswith("NO")
            print(f"{name:20} {loss:12.8f} {text}", flush=True)
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    run_main(lambda argv: sys.exit(main(argv)))
