"""Multi-exit networks; importing the package registers every family."""

from models import (  # noqa: F401 (to register names)
    boosted,
    cifar,
    cifar_plain,
    dyn_perceiver,
    ebjr,
    mobilenetv2,
    mobilenetv3,
    msdnet,
    ranet,
    regnet,
    resnet,
    rexnet,
    timm_exits,
    vit_exits,
)
from models.multi_exit import MultiExitModel, State, join, map_leaves, take
from models.registry import (
    create_model,
    kind_of,
    list_models,
    model_class,
    model_options,
    nearest,
    spelled_out,
)
from models.tuning import tune

__all__ = [
    "MultiExitModel",
    "State",
    "create_model",
    "join",
    "kind_of",
    "list_models",
    "map_leaves",
    "model_class",
    "model_options",
    "nearest",
    "spelled_out",
    "take",
    "tune",
]
