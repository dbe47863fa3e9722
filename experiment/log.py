"""The log of a run: TensorBoard, and a line of JSON and a line of text per epoch."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from experiment.recipe import Recipe
from utils import Compute, UserError, to_json, write_text, writing


class Logger:
    """Logs to TensorBoard and, if a project is given, to Weights & Biases; without a folder to neither.

    `config` holds the flags of the run, by name; it starts after optimizer step `step`: what an earlier
    process logged beyond is not shown.
    """

    def __init__(
        self, folder: str | None, wandb_project: str | None, config: dict[str, Any], step: int = 0
    ) -> None:
        self.writer, self.config = None, config
        if not folder:
            return
        try:
            if wandb_project:
                import wandb

                wandb.init(project=wandb_project, config=config, sync_tensorboard=True, dir=folder)
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"--log_dir needs a package: pip install {error.name}") from None
        with writing(Path(folder)):
            self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def add(self, values: dict[str, float], step: int, prefix: str = "") -> None:
        """Adds scalars at an optimizer step."""
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(prefix + name, value, step)

    def add_histograms(self, tables: dict[str, Tensor], step: int, prefix: str = "") -> None:
        """Adds the distribution of every column of tables [N, K] at an optimizer step."""
        for name, table in tables.items() if self.writer else ():
            for k, column in enumerate(table.T):
                self.writer.add_histogram(f"{prefix}{name}/exit{k}", column, step)

    def close(self, metrics: dict[str, float]) -> None:
        """Ends the log with the run's flags and its final `metrics`, for TensorBoard's table of runs."""
        if self.writer and metrics:
            words = {name: str(v) if isinstance(v, (list, tuple)) else v for name, v in self.config.items()}
            final = {f"final/{name}": value for name, value in metrics.items()}
            self.writer.add_hparams(words, final, run_name=".")
        if self.writer:
            self.writer.close()


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON object as a line to a log, or nothing of it; UserError where the system cannot write.

    A line that a killed process left unfinished is removed. A figure that is not finite is null.
    """
    line = (to_json(record) + "\n").encode()
    with writing(path), open(path, "ab+", buffering=0) as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        try:
            file.truncate(end)
            while line:  # a disk that is filling up takes a part
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


def last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a log; {} without one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else {}


def count_from_one(path: Path) -> None:
    """Numbers the epochs of a log from 1, where they are numbered from 0, as they were once."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    if records and records[0]["epoch"] == 0:
        renumbered = [{**record, "epoch": record["epoch"] + 1} for record in records]
        write_text(path, "".join(to_json(record) + "\n" for record in renumbered))


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One line that sums up an epoch."""
    accuracies = [f"{100 * value:.2f}" for key, value in record.items() if key.startswith("calib/acc1/")]
    text = f"epoch {record['epoch']}/{epochs}: loss {record['train/loss']:.4f}"
    calib = f", calib top-1 by exit {' '.join(accuracies)} %" if accuracies else ""
    return f"{text}{calib}, {record['seconds']:.0f} s"


def logger_of(recipe: Recipe, compute: Compute, step: int) -> Logger:
    """The logger of a run that starts at an optimizer step; only the first process writes."""
    session = recipe.session
    folder = session.log_dir if compute.rank == 0 else None
    project = session.project if session.enable_wandb else None
    return Logger(folder, project, {**recipe.flags(), **recipe.options}, step)
