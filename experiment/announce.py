"""What a training run prints when it starts and when it has ended."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

from datasets import PREFIXES, Splits
from experiment.checkpoint import BEST
from experiment.log import last_record
from experiment.recipe import Recipe
from models import MultiExitModel
from training.parallel import has_bf16
from utils import Compute

EVALUATE = Path(__file__).resolve().parents[1] / "eval_dynamic.py"


def opening(
    recipe: Recipe, network: MultiExitModel, splits: Splits, compute: Compute, source: str = ""
) -> list[str]:
    """What is trained, on what and where; `source` is the checkpoint that the run goes on from."""
    size = sum(p.numel() for p in network.parameters())
    counts = {"train": splits.train, "calib": splits.calib, "test": splits.test}
    procedure = f", procedure {recipe.network.procedure}" if recipe.network.procedure else ""
    going_on = f", going on from {source}" if source else ""
    fast = compute.amp != torch.bfloat16 or has_bf16(compute.device.type)
    slow = "" if fast else ", which has no bf16 instructions: --use_amp false is faster"
    return [
        f"{recipe.network.model}: {network.num_exits} exits, {size / 1e6:.3f} M parameters",
        *splits.source.notes,
        ", ".join(f"{len(images)} {part} images" for part, images in counts.items()),
        f"{compute.world_size} x {compute.device}{slow}{procedure}{going_on}",
    ]


def farewell(recipe: Recipe) -> list[str]:
    """What a finished run says: top-1 on test by exit, where its files are, and how to evaluate it."""
    folder, lines = Path(recipe.runtime.output_dir), []
    record = last_record(folder / "log.txt")
    for name in ("test", "test_ema"):
        tops = [f"{100 * value:.2f}" for key, value in record.items() if key.startswith(f"{name}/acc1/")]
        if tops:
            lines.append(f"{name} top-1 by exit: {' '.join(tops)} %")
    lines.append(f"log and checkpoints are in {folder}")
    if (folder / BEST).exists():
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        words = [python, os.path.relpath(EVALUATE), "--checkpoint", str(folder / BEST)]
        streamed = recipe.data.data_set.startswith(PREFIXES)  # what is fetched must be named, too
        for name in ("data_set",) * streamed + ("data_path", "eval_data_path"):
            value = getattr(recipe.data, name)
            words += [f"--{name}", value] if value else []
        if recipe.data.num_calib == 0:  # thresholds need images
            words += ["--calib", "half_test"]
        lines.append(f"next: {shlex.join(words)}")
    return lines
