"""How good a network in training is: evaluated after every epoch, and what chooses the best of them."""

from datasets import Splits, ordered_loader
from engine import evaluate_all
from experiment.cached import Features
from experiment.recipe import Recipe
from experiment.run import Figures
from models import MultiExitModel
from training.optim import Update
from utils import Compute


class Judge:
    """Evaluates a network, and the moving average of its weights if that is wanted."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        network: MultiExitModel,
        update: Update,
        compute: Compute,
        features: Features | None = None,
    ) -> None:
        self.recipe, self.splits, self.network = recipe, splits, network
        self.update, self.compute, self.features = update, compute, features
        self.judges_average = recipe.optimization.model_ema and recipe.optimization.model_ema_eval

    def evaluate(self, part: str) -> Figures:
        """`calib/...` or `test/...`; of the moving average `calib_ema/...` if wanted."""
        images = getattr(self.splits, part)
        if self.recipe.session.disable_eval or not len(images):
            return {}
        networks = {"": self.network}
        if self.judges_average and self.update.ema:
            networks["_ema"] = self.update.ema.module
        if self.features:
            heads = {name: self.features.heads(network) for name, network in networks.items()}
            return evaluate_all(heads, self.features.ordered(part), self.compute, title=part)
        loader = ordered_loader(images, self.recipe.runtime, self.compute)
        return evaluate_all(networks, loader, self.compute, title=part)

    def score(self, figures: Figures) -> float | None:
        """Mean top-1 over exits on calib, which selects the best checkpoint."""
        prefix = "calib_ema/acc1/" if self.judges_average else "calib/acc1/"
        judged = [value for name, value in figures.items() if name.startswith(prefix)]
        return sum(judged) / len(judged) if judged else None
