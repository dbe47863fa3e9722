"""Features of a frozen backbone, computed once and kept on the device, and heads that train on them."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from datasets import Split, Splits, TrainLoader, eval_transform, ordered_loader
from experiment.recipe import Recipe
from models import MultiExitModel, State, tune
from models.bases import Wrapped
from utils import Compute, Progress, UserError, gather

ROOM = 2**34  # bytes, of all splits' features


class OnFeatures(Wrapped):
    """The heads of `network` on rows [B, D] that hold the features of all exits, of `shapes`, one by one."""

    def __init__(self, network: MultiExitModel, shapes: list[torch.Size]) -> None:
        super().__init__(network)
        self.shapes = shapes

    def begin(self, images: Tensor) -> State:
        """The state is the features that are left, [B, D]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The features of exit k, and those after them."""
        shape = self.shapes[k]
        features, rest = state.tensor_split([shape.numel()], dim=1)
        return features.unflatten(1, shape), rest


@contextmanager
def _evaluating(network: MultiExitModel) -> Iterator[None]:
    """Evaluation mode; after it every module is in its own mode again."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Features:
    """Features of the splits' images, in the view of evaluation; each split's are computed when first read.

    Raises ValueError for a network whose heads cannot be run on them, and for more than the device should
    hold.
    """

    def __init__(self, recipe: Recipe, splits: Splits, network: MultiExitModel, compute: Compute) -> None:
        self.runtime, self.splits = recipe.runtime, splits
        self.network, self.compute = network, compute
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}
        side = splits.view.size
        blank = next(network.parameters()).new_zeros(1, 3, side, side)
        with _evaluating(network):
            self.shapes = [features.shape[1:] for features in self._of(blank)]
        parts = [splits.train, splits.calib, splits.test]
        if not all(isinstance(part, Split) for part in parts):
            raise UserError("--cache_features true needs images by index; a stream has none")
        size = 4 * sum(map(len, parts)) * sum(shape.numel() for shape in self.shapes)
        if size > ROOM:
            held = f"features of {sum(map(len, parts))} images are {size / 2**30:.1f} GiB"
            raise UserError(f"--cache_features true: {held}; accepted: at most {ROOM / 2**30:.0f}")

    @torch.no_grad()
    def _of(self, images: Tensor) -> list[Tensor]:
        """What every head reads of images [B, 3, H, W]."""
        network, every = self.network, []
        state = network.begin(images)
        for k in range(network.num_exits):
            if network.reads_logits(k):
                name = type(network).__name__
                raise UserError(f"--cache_features true: later stages of {name} read the logits of exits")
            features, state = network.trunk(k, state)
            if not isinstance(features, Tensor):
                raise UserError(f"--cache_features true: exit {k} reads more than one tensor")
            every.append(features)
        return every

    def table(self, part: str) -> tuple[Tensor, Tensor]:
        """Features [N, D] and labels [N] of a split ("train", "calib", "test"), on the device."""
        if part not in self.tables:
            start = time.monotonic()
            self.tables[part] = self._computed(part)
            if self.compute.rank == 0:
                rows, width = self.tables[part][0].shape
                seconds = time.monotonic() - start
                print(f"features of {part}: {rows} x {width} numbers computed in {seconds:.1f} s")
        return self.tables[part]

    def _computed(self, part: str) -> tuple[Tensor, Tensor]:
        compute, split = self.compute, getattr(self.splits, part)
        clean = Split(split.base, split.indices, eval_transform(self.splits.view))
        loader, rows, labels = ordered_loader(clean, self.runtime, compute), [], []
        progress = Progress(loader, f"features of {part}", len(loader), shown=compute.rank == 0)
        with _evaluating(self.network):
            tune(self.network, compute.device)
            for images, targets in progress:
                with compute.autocast():
                    features = self._of(compute.put(images))
                rows.append(torch.cat([x.flatten(1).float() for x in features], 1).cpu())
                labels.append(targets)
        mine = (torch.cat(rows), torch.cat(labels)) if rows else None
        shards = gather(mine, compute)
        count, step = len(split), compute.world_size  # process r has rows r, r + step, ...
        first = next(shard for shard in shards if shard)
        whole = [part.new_empty(count, *part.shape[1:]) for part in first]
        for rank, shard in enumerate(shards):
            for table, part_of_it in zip(whole, shard or (), strict=False):
                table[rank::step] = part_of_it
        table, targets = whole
        return table.to(compute.device), targets.to(compute.device)

    def heads(self, network: MultiExitModel) -> OnFeatures:
        """The heads of a network that has this backbone."""
        return OnFeatures(network, self.shapes)

    def ordered(self, part: str) -> "OrderedRows":
        """A split's features in order, for evaluation."""
        return OrderedRows(self, part)


def features_of(recipe: Recipe, splits: Splits, network: MultiExitModel, compute: Compute) -> Features | None:
    """The features of a run that keeps them."""
    return Features(recipe, splits, network, compute) if recipe.objective.cache_features else None


class OrderedRows:
    """Batches of features [B, D] and labels [B] in order; process r of n has rows r, r + n, ..."""

    def __init__(self, features: Features, part: str) -> None:
        compute = features.compute
        mine = slice(compute.rank, None, compute.world_size)
        self.rows, self.labels = (table[mine] for table in features.table(part))
        self.split, self.places = getattr(features.splits, part), range(len(features.table(part)[1]))[mine]
        self.size = 4 * features.runtime.batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.rows.split(self.size), self.labels.split(self.size), strict=True)

    def name(self, position: int) -> str:
        """The name of an image in messages, by its position in what this process reads."""
        return self.split.name(self.places[position])


class FeatureLoader(TrainLoader):
    """A TrainLoader of the training images' features; it has no processes of its own."""

    def __init__(self, features: Features, **options: Any) -> None:
        self.features = features
        super().__init__(features.splits.train, features.runtime, features.compute, **options)

    def _read(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        rows, labels = self.features.table("train")
        order = torch.as_tensor(self.batches.order, device=rows.device)
        for batch in range(self.first, len(self)):
            places = self.batches.places(batch)
            mine = order[places.start : places.stop : places.step]
            yield rows[mine], labels[mine]
