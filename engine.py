"""One epoch of training and one pass of evaluation, for any network and any objective."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.exit_tables import ExitTables, GrowingTables, first_not_finite
from adaptive.reading import Reading
from models import MultiExitModel, tune
from training.losses import ObjectiveFunction, full_precision
from training.parallel import share_buffers
from utils import Compute, Meters, Progress, UserError, gather


@dataclass
class Epoch:
    """An epoch of training, counted from 0, and what of it is done: micro-batches, and their figures.

    `after_batch(check)` is called after each; before it saves the weights it calls `check`, which raises
    ValueError on every process if a loss was not finite.
    """

    number: int = 0
    batch: int = 0
    meters: Meters = field(default_factory=Meters)
    after_batch: Callable[[Callable[[], None]], None] = lambda check: None

    def add(self, loss: Tensor, exits: list[Tensor], targets: Tensor) -> None:
        """Adds to the figures a loss, and the logits K x [B, C] and targets of the images that it is of."""
        count = len(targets)
        self.meters.add("loss", loss.detach() * count, count)
        for name, sums in exit_sums(exits, targets).items():
            self.meters.add(name, sums, count)


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    objective: ObjectiveFunction,
    update: Callable[[Tensor], None],
    compute: Compute,
    *,
    epoch: Epoch | None = None,
    print_freq: int = 50,
    on_print: Callable[[dict[str, float]], None] = lambda means: None,
) -> dict[str, float]:
    """Trains on what is left of an epoch; returns means over all processes of `loss` and of `exit_sums`.

    `loader` starts at the epoch's next batch. `on_print` gets this process's means every `print_freq`
    batches, and those returned at the end, both with the `images_per_s` of all processes in this pass.
    `objective(model, images, targets)` yields (loss, every exit's logits) whenever `update` is to act, for
    the whole batch or for one part of it after another. Once a loss is not finite, raises ValueError on every
    process at the next report.
    """
    epoch = epoch or Epoch()
    model.train()
    tune(model, compute.device)
    meters, watch = epoch.meters, FiniteWatch(loader, epoch.number, compute)
    title, shown = f"epoch {epoch.number + 1}", compute.rank == 0
    progress = Progress(loader, title, len(loader), shown=shown, first=epoch.batch)
    start, before = time.monotonic(), meters.counts.get("loss", 0)

    def report(means: dict[str, float]) -> None:
        images = compute.world_size * (meters.counts.get("loss", 0) - before)
        on_print(means | {"images_per_s": images / (time.monotonic() - start)})

    for images, targets in progress:
        images, targets = compute.put(images), compute.put(targets)
        with compute.autocast():
            seen = 0
            for loss, exits in objective(model, images, targets):
                update(loss)
                watch.see(loss, epoch.batch)
                part = targets[seen : seen + len(exits[0])]
                seen += len(part)
                epoch.add(loss, exits, part)
        epoch.batch += 1
        if epoch.batch % print_freq == 0:
            watch.check()
            means = meters.means()
            progress.note({name: value for name, value in means.items() if "loss/" not in name})
            report(means)
        epoch.after_batch(watch.check)
    watch.check()
    report(means := meters.means(compute))
    return means


@torch.no_grad()
def exit_sums(exits: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Sums over a batch at every exit, [K] each, from logits K x [B, C] and targets [B] or [B, C].

    `loss/exit` is the cross-entropy against the targets as they are, without smoothing; `acc1/exit` counts
    hits and is for hard targets only. All exits go through one kernel each, and nothing waits for the device.
    """
    logits, repeated = full_precision(torch.stack(exits)), torch.cat([targets] * len(exits))
    losses = F.cross_entropy(logits.flatten(0, 1), repeated, reduction="none")
    sums = {"loss/exit": losses.view(len(exits), -1).sum(1)}
    if not targets.is_floating_point():
        sums["acc1/exit"] = (logits.argmax(2) == targets).sum(1)
    return sums


def evaluate(
    model: MultiExitModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    *,
    reading: Reading | str = "max_prob",
    title: str = "evaluate",
) -> ExitTables:
    """Runs every exit on every sample; all processes get the same table, on the CPU, in data-set order.

    Each process reads its own samples and none is read twice, so counts are exact for every data size. Raises
    ValueError on every process for logits that are not finite, with the network, the exit and the image.
    """
    return evaluate_readings(model, loader, compute, readings=[reading], title=title)[0]


@torch.inference_mode()
def evaluate_readings(
    model: MultiExitModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    *,
    readings: Sequence[Reading | str],
    title: str = "evaluate",
    watch: Callable[[list[Tensor], Tensor], None] = lambda exits, targets: None,
) -> list[ExitTables]:
    """As `evaluate`, in one pass for several ways to read the logits: a table for each.

    `watch` sees the logits, K x [B, C], and targets [B] of every batch of this process.
    """
    model.eval()
    tune(model, compute.device)
    grown, fault = [GrowingTables() for _ in readings], ""
    for images, targets in Progress(loader, title, len(loader), shown=compute.rank == 0):
        with compute.autocast():
            exits = model(compute.put(images))
        if found := first_not_finite(exits):
            k, row, value = found
            name = loader.name(grown[0].count + row)
            fault = f"{title}: {type(model).__name__} gives the logit {value} at exit {k} for {name}"
            break  # and not raise, since the other processes wait for this one below
        targets = compute.put(targets)
        watch(exits, targets)
        for tables, reading in zip(grown, readings, strict=True):
            tables.add(ExitTables.of(exits, targets, reading))
    # Process r holds samples r, r + world size, ...; the last processes hold none if there are fewer samples.
    found_by = gather((tuple(tables.table() for tables in grown), fault), compute)
    shards, faults = zip(*found_by, strict=True)
    if any(faults):
        raise UserError(next(filter(None, faults)))
    by_reading = zip(*shards, strict=True)
    return [ExitTables.interleave([shard for shard in parts if shard]) for parts in by_reading]


def evaluate_all(
    networks: dict[str, MultiExitModel],
    loader: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    *,
    title: str,
) -> dict[str, float]:
    """`{title}{name}/...` of every named network, with the metrics of `summarise`.

    A network may be on another device.
    """
    figures = {}
    for name, network in networks.items():
        share_buffers(network, compute)
        device = next(network.parameters()).device
        where = compute
        if device != compute.device:
            where = Compute(device, rank=compute.rank, world_size=compute.world_size)
        tables = evaluate(network, loader, where, title=title + name)
        figures |= {f"{title}{name}/{key}": value for key, value in summarise(tables).items()}
    return figures


def summarise(tables: ExitTables) -> dict[str, float]:
    """`loss/exit{k}`, `acc1/exit{k}`, `acc5/exit{k}` (fractions) of every exit."""
    means = tables.means()
    return {f"{name}/exit{k}": value for name, row in means.items() for k, value in enumerate(row)}


class FiniteWatch:
    """Remembers the first batch whose loss was not finite, and stops all processes.

    Remembering does not wait for the device.
    """

    def __init__(self, loader: Iterable, epoch: int, compute: Compute) -> None:
        self.loader, self.epoch, self.compute = loader, epoch, compute
        self.first = torch.tensor(torch.inf, device=compute.device)

    def see(self, loss: Tensor, step: int) -> None:
        """Looks at the loss of batch `step`."""
        self.first = torch.where(loss.isfinite(), self.first, self.first.clamp(max=step))

    def check(self) -> None:
        """Raises ValueError on every process if any has seen a loss that is not finite."""
        first = gather(self.first.item(), self.compute)
        if min(first) == torch.inf:
            return
        rank, step = first.index(min(first)), int(min(first))
        names = gather(self.loader.names(step), self.compute)[rank]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"the loss is not finite at epoch {self.epoch + 1}, batch {step}, process {rank}: {shown}"
        )
