"""Multi-exit networks; importing the package registers every family."""

from models import dyn_perceiver, msdnet, plain_cnn, timm_exits  # noqa: F401  (imported to register their names)
from models.multi_exit import MultiExitModel, State, join, take
from models.registry import create_model, list_models, model_options, nearest, spelled_out

__all__ = [
    "MultiExitModel",
    "State",
    "create_model",
    "join",
    "list_models",
    "model_options",
    "nearest",
    "spelled_out",
    "take",
]
