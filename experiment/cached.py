"""Features of a frozen backbone, computed once and kept in files, and heads that train on them."""

import math
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from adaptive.policy import content_hash
from datasets import Split, Splits, TrainLoader, eval_transform, ordered_loader
from experiment.feature_files import alone_in, data_hash, key_of, mapped, share_of, write_table
from experiment.recipe import Recipe
from models import MultiExitModel, State, tune
from models.bases import Wrapped
from training.regimes import modules_of_heads
from utils import Compute, Progress, UserError, gather, seed_everything

UNREAD = "head_width", "drop_rate", "drop_path_rate"  # options that change no feature of given weights


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


class AugmentedView(Split):
    """A split in which an image's augmentation is drawn by the view's number and its row alone."""

    def __init__(self, split: Split, number: int) -> None:
        super().__init__(split.base, split.indices, split.transform)
        self.number = number

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed_everything(self.number, self.indices[index])
        return super().__getitem__(index)


class Rows:
    """Some rows of a table of features: [i] -> features [B, D] and labels [B], for any index of NumPy's."""

    def __init__(self, table: np.ndarray, places: np.ndarray) -> None:
        self.table, self.places = table, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        read = torch.from_numpy(np.asarray(self.table[self.places[index]]))
        return read[:, :-1], read[:, -1].long()


class Features:
    """Features of all images, in files [N, D + 1] whose last column is the label; one a view of an image set.

    View 0 is an image as evaluation has it, the others are augmented. Images that training and calibration
    share are in one file, so that runs of any seed read the same. Raises ValueError for a network whose heads
    cannot be run on features.
    """

    def __init__(
        self, recipe: Recipe, splits: Splits, network: MultiExitModel, arch: dict[str, Any], compute: Compute
    ) -> None:
        self.recipe, self.splits, self.network, self.compute = recipe, splits, network, compute
        self.folder = Path(recipe.caching.cache_dir or Path(recipe.runtime.output_dir, "features"))
        options = {name: value for name, value in arch["options"].items() if name not in UNREAD}
        self.arch = {"name": arch["name"], "options": options}
        self.tables: dict[tuple[str, int], np.ndarray] = {}
        self.blank = next(network.parameters()).new_zeros(1, 3, splits.view.size, splits.view.size)
        with _evaluating(network):
            self.shapes = [features.shape[1:] for features in self._of(self.blank)]
        self.width = sum(shape.numel() for shape in self.shapes) + 1
        train, calib = splits.train, splits.calib
        if not all(isinstance(part, Split) for part in (train, calib, splits.test)):
            raise UserError("--cache_features true needs images by index; a stream has none")
        self.images = {"train": train, "calib": calib, "test": splits.test}
        if calib.base is train.base:
            rows = sorted({*train.indices, *calib.indices})
            both = Split(train.base, rows, train.transform)
            self.images |= {"train": both, "calib": both}

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

    def compute_missing(self) -> None:
        """Maps the files of features, and computes those that are not there, with the network as it is now.

        Raises ValueError where the disk has no room for them.
        """
        paths = self._paths()
        shapes = {place: (len(self.images[place[0]]), self.width) for place in paths}
        with alone_in(self.folder, self.compute):
            missing = [place for place, path in paths.items() if mapped(path, shapes[place]) is None]
            missing = gather(missing, self.compute)[0]  # what the first process finds, which waits for others
            self._check_room(sum(4 * math.prod(shapes[place]) for place in missing), len(missing), len(paths))
            for place in missing:
                self._compute(place, paths[place], shapes[place])
        for place, path in paths.items():
            table = mapped(path, shapes[place])
            assert table is not None
            self.tables[place] = table

    def _paths(self) -> dict[tuple[str, int], Path]:
        """The file of every view that the run reads, by part and view."""
        recipe = self.recipe
        views = {"train": recipe.caching.cache_views}
        if not recipe.session.disable_eval:
            views |= {"test": 1}
            if self.images["calib"] is not self.images["train"]:
                views |= {"calib": 1}
        facts = {
            "arch": self.arch,
            "weights": content_hash(self._trunk()),
            "precision": str(self.compute.amp),
            "view": asdict(self.splits.view),
        }
        paths = {}
        for part in (part for part in views if len(self.images[part])):
            images = data_hash(recipe.data, self.images[part])
            for view in range(views[part]):
                augmented = {"view": view, **asdict(recipe.transform)} if view else None
                key = key_of(**facts, images=images, augmented=augmented)
                paths[part, view] = self.folder / f"{part}-{view}-{key}.npy"
        return paths

    def _trunk(self) -> dict[str, Tensor]:
        """Parameters and buffers, by name, of what runs before the heads."""
        with _evaluating(self.network):
            heads = modules_of_heads(self.network, tuple(self.blank.shape[1:]))
        inside = set()
        for module in heads:
            inside |= {id(tensor) for tensor in module.parameters(recurse=False)}
            inside |= {id(tensor) for tensor in module.buffers(recurse=False)}
        every = [*self.network.named_parameters(), *self.network.named_buffers()]
        return {name: tensor for name, tensor in every if id(tensor) not in inside}

    def _check_room(self, needed: int, missing: int, count: int) -> None:
        """Says what is there and what is needed, in bytes; ValueError where that does not fit on the disk."""
        free = gather(shutil.disk_usage(self.folder).free, self.compute)[0]
        said = f"{missing} of {count} files to compute, {needed / 1e6:,.1f} MB; {free / 1e6:,.1f} MB are free"
        if needed > free:
            raise UserError(
                f"--cache_features true: {said} in {self.folder}; --cache_dir names another place"
            )
        if self.compute.rank == 0:
            print(f"features in {self.folder}: {said}")
            if self.recipe.caching.cache_views == 1:
                print("they are of images as they are, not augmented: --cache_views 4 keeps augmented views")

    def _compute(self, place: tuple[str, int], path: Path, shape: tuple[int, int]) -> None:
        (part, view), compute, start = place, self.compute, time.monotonic()
        images = self.images[part]
        seen = AugmentedView(images, view)
        if view == 0:
            seen = Split(images.base, images.indices, eval_transform(self.splits.view))
        title = f"features of {part}, view {view}"
        mine = Subset(seen, share_of(len(seen), compute))
        loader = ordered_loader(mine, self.recipe.runtime, replace(compute, rank=0, world_size=1))
        progress = Progress(loader, title, len(loader), shown=compute.rank == 0)
        with _evaluating(self.network):
            tune(self.network, compute.device)
            write_table(path, shape, map(self._row, progress), compute)
        if compute.rank == 0:
            seconds = time.monotonic() - start
            print(f"{title}: {shape[0]} x {shape[1] - 1} numbers computed in {seconds:.1f} s")

    def _row(self, batch: tuple[Tensor, Tensor]) -> np.ndarray:
        images, labels = batch
        with self.compute.autocast():
            features = self._of(self.compute.put(images))
        columns = [x.flatten(1).float().cpu() for x in features]
        return torch.cat([*columns, labels[:, None].float()], 1).numpy()

    def rows(self, part: str, view: int = 0) -> Rows:
        """The features of a split ("train", "calib", "test")."""
        images, split = self.images[part], getattr(self.splits, part)
        name = "train" if images is self.images["train"] else part
        return Rows(self.tables[name, view], np.searchsorted(images.indices, split.indices))

    def heads(self, network: MultiExitModel) -> OnFeatures:
        """The heads of a network that has this backbone."""
        return OnFeatures(network, self.shapes)

    def ordered(self, part: str) -> "OrderedRows":
        """A split's features in order, for evaluation."""
        return OrderedRows(self, part)


def features_of(
    recipe: Recipe, splits: Splits, network: MultiExitModel, arch: dict[str, Any], compute: Compute
) -> Features | None:
    """The features of a run that keeps them."""
    return Features(recipe, splits, network, arch, compute) if recipe.caching.cache_features else None


class OrderedRows:
    """Batches of features [B, D] and labels [B] in order; process r of n has rows r, r + n, ..."""

    def __init__(self, features: Features, part: str) -> None:
        self.rows, self.split = features.rows(part), getattr(features.splits, part)
        compute = features.compute
        self.places = range(len(self.rows))[compute.rank :: compute.world_size]
        self.size = 4 * features.recipe.runtime.batch_size

    def __len__(self) -> int:
        return -(-len(self.places) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.places), self.size):
            yield self.rows[self.places[start : start + self.size]]

    def name(self, position: int) -> str:
        """The name of an image in messages, by its position in what this process reads."""
        return self.split.name(self.places[position])


class FeatureLoader(TrainLoader):
    """A TrainLoader of the training images' features; epochs go through their views in turn.

    It has no processes of its own.
    """

    def __init__(self, features: Features, **options: Any) -> None:
        self.features = features
        recipe = features.recipe
        super().__init__(features.splits.train, recipe.runtime, features.compute, **options)

    def _read(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        views = self.features.recipe.caching.cache_views
        rows = self.features.rows("train", self.epoch % views)
        for batch in range(self.first, len(self)):
            places = self.batches.places(batch)
            yield rows[self.batches.order[places.start : places.stop : places.step]]
