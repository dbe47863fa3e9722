"""One epoch of training and one pass of evaluation, for any network and any objective."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from adaptive.inference import ExitTables
from datasets import batch_names
from models import MultiExitModel
from training.losses import Objective
from utils import Compute, Meters, Progress, gather, share_buffers


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    update: Callable[[Tensor], None],
    compute: Compute,
    *,
    epoch: int = 0,
    print_freq: int = 50,
    on_print: Callable[[dict[str, float]], None] = lambda means: None,
) -> dict[str, float]:
    """Trains once through the loader; means over all processes of `loss` and, for hard targets,
    `acc1/exit{k}`.

    `objective(model, images, targets)` yields (loss, every exit's logits) whenever `update` is to act, of the
    whole batch or of one part of it after another. Raises ValueError on every process once a loss of any is
    not finite, at the next report (every `print_freq` batches).
    """
    model.train()
    meters, watch = Meters(), FiniteWatch(loader, epoch, compute)
    progress = Progress(loader, f"epoch {epoch}", len(loader), shown=compute.rank == 0)
    for step, (images, targets) in enumerate(progress):
        images, targets = compute.put(images), compute.put(targets)
        seen = 0
        with compute.autocast():
            for loss, exits in objective(model, images, targets):
                update(loss)
                watch.see(loss, step)
                part = targets[seen : seen + len(exits[0])]
                seen += len(part)
                meters.add("loss", loss.detach() * len(part), len(part))
                if not part.is_floating_point():
                    for k, logits in enumerate(exits):
                        meters.add(f"acc1/exit{k}", (logits.argmax(1) == part).sum(), len(part))
        if (step + 1) % print_freq == 0:
            watch.check()
            progress.note(means := meters.means())
            on_print(means)
    watch.check()
    return meters.means(compute)


@torch.inference_mode()
def evaluate(
    model: MultiExitModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    *,
    confidence: str = "max_prob",
    title: str = "evaluate",
) -> ExitTables:
    """Runs every exit on every sample; the table, on the CPU and the same on all processes, is in the data
    set's order.

    Each process reads its own samples and none is read twice, so counts are exact for every data size.
    """
    model.eval()
    parts = []
    for images, targets in Progress(loader, title, len(loader), shown=compute.rank == 0):
        with compute.autocast():
            exits = model(compute.put(images))
        parts.append(ExitTables.of(exits, compute.put(targets), confidence).cpu())
    # Process r holds samples r, r + world size, ...; the last processes hold none if there are fewer samples.
    shards = gather(ExitTables.cat(parts) if parts else None, compute)
    return ExitTables.interleave([shard for shard in shards if shard is not None])


def evaluate_all(
    networks: dict[str, MultiExitModel],
    loader: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    *,
    title: str,
) -> dict[str, float]:
    """`{title}{name}/...` of every named network, as `summarise` has them; a network may be on another
    device."""
    figures = {}
    for name, network in networks.items():
        share_buffers(network, compute)
        device = next(network.parameters()).device
        where = compute if device == compute.device else Compute(device, **compute.ranks)
        tables = evaluate(network, loader, where, title=title + name)
        figures |= {f"{title}{name}/{key}": value for key, value in summarise(tables).items()}
    return figures


def epoch_line(record: dict[str, float], epochs: int) -> str:
    """One line that sums up an epoch."""
    accuracies = [f"{100 * value:.2f}" for key, value in record.items() if key.startswith("calib/acc1/")]
    text = f"epoch {record['epoch'] + 1}/{epochs}: loss {record['train/loss']:.4f}"
    return f"{text}, calib top-1 by exit {' '.join(accuracies) or '-'} %, {record['seconds']:.0f} s"


def summarise(tables: ExitTables) -> dict[str, float]:
    """`loss/exit{k}`, `acc1/exit{k}`, `acc5/exit{k}` (fractions) of every exit."""
    rows = {"loss": tables.loss, "acc1": tables.correct, "acc5": tables.correct5}
    return {
        f"{name}/exit{k}": row.double().mean().item()
        for name, table in rows.items()
        for k, row in enumerate(table)
    }


class FiniteWatch:
    """Remembers the first batch whose loss was not finite, without waiting for the device, and stops all
    processes."""

    def __init__(self, loader: Iterable, epoch: int, compute: Compute) -> None:
        self.loader, self.epoch, self.compute = loader, epoch, compute
        self.never = torch.iinfo(torch.int64).max
        self.first = torch.tensor(self.never, device=compute.device)

    def see(self, loss: Tensor, step: int) -> None:
        """Looks at the loss of batch `step`."""
        self.first = torch.where(loss.isfinite(), self.first, self.first.clamp(max=step))

    def check(self) -> None:
        """Raises ValueError on every process if any has seen a loss that is not finite."""
        first = gather(int(self.first), self.compute)
        if min(first) == self.never:
            return
        rank = first.index(min(first))
        names = gather(batch_names(self.loader, min(first)), self.compute)[rank]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(
            f"the loss is not finite at epoch {self.epoch}, batch {min(first)}, process {rank}: {shown}"
        )
