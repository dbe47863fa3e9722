"""The training batches of a recipe."""

import math

from datasets import DeviceLoader, Splits, TrainLoader, mixer, mixup_collate
from experiment.cached import FeatureLoader, Features
from experiment.recipe import Recipe
from utils import Compute


def loader_of(
    recipe: Recipe, splits: Splits, compute: Compute, passes: int, features: Features | None = None
) -> TrainLoader:
    """Shuffled, augmented, and mixed if mixup or cutmix is on; batch norm needs 2 images per loss.

    An objective takes `passes` losses from a batch. With `features`, of a frozen backbone, those are read.
    """
    update_freq = recipe.optimization.update_freq
    options = {
        "update_freq": update_freq // math.gcd(update_freq, passes),
        "least": 0 if recipe.data.drop_last else 2 * passes,
        "seed": recipe.data.seed,
        "epoch_images": recipe.data.epoch_images,
    }
    if features:
        return FeatureLoader(features, **options)
    places = splits.train, recipe.runtime, compute
    mixing = recipe.mixing, recipe.objective.smoothing, splits.source.num_classes
    transform = recipe.transform
    if transform.device_data:
        mix = mixer(*mixing)
        return DeviceLoader(*places, view=splits.view, transform=transform, mix=mix, **options)
    return TrainLoader(*places, collate=mixup_collate(*mixing), **options)
