"""Training a detector of `detectors.py` on data in COCO's format, as scripts/main_detection.py does it."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from detection.data import CocoImages, collate
from detection.detectors import DetectorOptions, create_detector
from detection.measure import detect, precision
from experiment.checkpoint import LAST, latest, load
from experiment.entries import check_entries
from experiment.folder import hold, release
from experiment.options import fill
from experiment.published import read
from experiment.run import Run, Saving
from loading.loaders import shuffled
from models.multi_exit import map_leaves
from training.optim import Optimization, make_update
from training.parallel import start_compute
from utils import Meters, Progress, Runtime, UserError, option, seed_everything

# What torchvision trains detectors with: plain SGD, whose rate falls to a tenth at each milestone.
SGD = {"opt": "sgd", "schedule": "multistep", "warmup_epochs": 0, "filter_bias_and_bn": False}


@dataclass(frozen=True)
class Detection(DetectorOptions):
    """A run of scripts/main_detection.py; the fields are its flags."""

    model: str = option("faster_rcnn_rexnet_100", "faster_rcnn_rexnet_WIDTH or mask_rcnn_rexnet_WIDTH")
    data_path: str = option("", "folder in COCO's layout")
    train_split: str = option("train2017", "name of the split to train on")
    val_split: str = option("val2017", "name of the split to evaluate on")
    output_dir: str = option("runs/detection", "where log and checkpoints go")
    backbone_weights: str = option("", "a ReXNetV1 classifier to start from, as published")
    epochs: int = option(12, low=1)
    batch_size: int = option(2, low=1)
    lr: float = option(0.0025, "peak learning rate; torchvision takes 0.02 for 16 images", low=0)
    momentum: float = option(0.9, low=0, high=0.9999)
    weight_decay: float = option(1e-4, low=0)
    warmup_steps: int = option(500, "steps of linear warm-up", low=0)
    decay_epochs: tuple[int, ...] = option((8, 11), "epochs after which the rate falls to a tenth", low=0)
    clip_grad: float | None = option(None, "largest gradient norm", low=0)
    num_workers: int = option(2, "data loading processes", low=0)
    seed: int = option(0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    eval: bool = option(False, "evaluate the last checkpoint in --output_dir instead of training")
    flops: bool = option(False, "print the detector's costs instead of training")

    def check(self) -> None:
        """Raises ValueError for what no single flag's limits catch."""
        if self.batch_size == 1 and not (self.freeze_norm or self.eval):
            raise UserError(
                "--batch_size 1: ReXNet's batch norms need 2 images or more, or --freeze_norm true"
            )
        if not self.data_path:
            raise UserError("name a folder in COCO's layout: --data_path FOLDER")


class Job:
    """A run at its start: data, detector and optimizer, and what one epoch does with them.

    Raises ValueError, in one line, for flags or files that contradict each other.
    """

    def __init__(self, detection: Detection) -> None:
        detection.check()
        self.detection = detection
        self.device = start_compute(Runtime(device=detection.device)).device
        data, self.held_out = _open_data(detection)
        seed, size = detection.seed, detection.batch_size
        seed_everything(seed, 0, 0)
        path, num_classes = detection.backbone_weights, len(data.categories) + 1
        weights = read(path).weights() if path else None
        detector = create_detector(detection.model, num_classes, detection, weights)
        self.detector: Any = detector.to(self.device)
        self.num_images = len(data)
        self.order = self.draw(0)  # of the samples of an epoch, which `train` takes
        if not self.order:
            raise UserError(f"{len(data)} training images are fewer than --batch_size {size}")
        workers = detection.num_workers
        loader = partial(DataLoader, batch_size=size, num_workers=workers, collate_fn=collate)
        self.draws = torch.Generator()
        self.train = loader(data, sampler=self.order, generator=self.draws)
        self.val = loader(self.held_out)
        optimization = fill(Optimization, SGD, vars(detection))
        self.update = make_update(self.detector, optimization, steps=len(self.train))

    def draw(self, epoch: int) -> list[int]:
        """The samples of an epoch in its order, in full batches."""
        count = self.num_images - self.num_images % self.detection.batch_size
        return shuffled(self.num_images, self.detection.seed, epoch)[:count].tolist()

    def run(self) -> Run:
        """The run: the parts to train, what its checkpoints store, and how the best of them is chosen."""
        parts = {"model": self.detector, **self.update.parts}
        saving = Saving(Path(self.detection.output_dir))
        return Run(parts, self.facts, saving, score=lambda figures: figures["AP"])

    def facts(self) -> dict[str, Any]:
        """What a checkpoint stores besides the parts' states: enough for `detectors.detector_of`."""
        return {
            "model_name": self.detection.model,
            "args": asdict(self.detection),
            "categories": self.held_out.categories,
            "step": self.update.step,
        }

    def resume(self, run: Run, path: Path) -> None:
        """Resumes from a checkpoint; ValueError if it is of another detector."""
        content = load(path)
        check_entries(content, path)
        name = content.get("model_name")
        if name != self.detection.model or not isinstance(content.get("epoch"), int):
            raise UserError(f"checkpoint {path} holds {name}, not --model {self.detection.model}")
        for flag, there in vars(fill(DetectorOptions, content["args"])).items():
            here = getattr(self.detection, flag)
            if here != there:
                raise UserError(f"checkpoint {path} was trained with --{flag} {there}, not {here}")
        run.resume(content, path)
        self.update.start(content["step"])

    def one_epoch(self, epoch: int) -> dict[str, float]:
        """Trains once through the data and evaluates: means of the losses, `train/loss` ..., and COCO's AP.

        Everything random is drawn from the seed and the epoch, so that a resumed run equals an unbroken one.
        """
        seed = self.detection.seed
        seed_everything(seed, epoch, 0)
        self.order[:] = self.draw(epoch)
        self.draws.manual_seed(int(np.random.default_rng((seed, epoch)).integers(2**63)))
        losses, figures = self._train(epoch), self.evaluate()
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"epoch {epoch + 1}/{self.detection.epochs}: loss {losses['train/loss']:.4f}, {shown}")
        return losses | figures

    def _train(self, epoch: int) -> dict[str, float]:
        """The means of the losses of a pass through the data; ValueError if one is not finite."""
        self.detector.train()
        meters = Meters()
        progress = Progress(self.train, f"epoch {epoch + 1}", len(self.train), shown=True)
        for batch in progress:
            losses = self.detector(*map_leaves(lambda leaf: leaf.to(self.device), batch))
            loss = sum(losses.values())
            if not loss.isfinite():
                raise UserError(
                    f"the loss is not finite in epoch {epoch + 1}; lower --lr or give --clip_grad 10"
                )
            self.update(loss)
            for name, value in {"loss": loss, **losses}.items():
                meters.add(f"train/{name}", value.detach(), 1)
            progress.note(meters.means())
        return meters.means()

    def evaluate(self) -> dict[str, float]:
        """COCO's metrics on the validation split."""
        return precision(self.held_out, detect(self.detector, self.val, self.device))


def _open_data(detection: Detection) -> tuple[CocoImages, CocoImages]:
    """The images to train and to evaluate on; for an evaluation alone they are the same."""
    masks = detection.model.startswith("mask_rcnn")
    val = CocoImages(detection.data_path, detection.val_split, masks=masks)
    if detection.eval:
        return val, val
    train = CocoImages(detection.data_path, detection.train_split, masks=masks, flip=True)
    if train.categories != val.categories:
        raise UserError(f"{train.path} and {val.path} have different categories")
    return train, val


def evaluate(detection: Detection) -> dict[str, float]:
    """COCO's metrics of the last checkpoint in `output_dir`; ValueError if there is none."""
    job, last = Job(detection), latest(detection.output_dir)
    if last is None:
        raise UserError(f"nothing to evaluate: {detection.output_dir} holds no {LAST}")
    job.resume(job.run(), last)
    return job.evaluate()


def fit(detection: Detection) -> Job:
    """Trains the epochs that are left; the log and the last and best checkpoints go to `output_dir`."""
    folder = hold(Path(detection.output_dir))
    try:
        job, last = Job(detection), latest(folder)
        run = job.run()
        if last:
            job.resume(run, last)
        run.fit(detection.epochs, job.one_epoch)
    finally:
        release(folder)
    return job
