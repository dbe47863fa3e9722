"""Trains a multi-exit network; with `--eval true` evaluates it (as `eval_dynamic.py` does)."""

import installed  # noqa: F401

# isort: split
from eval_dynamic import evaluate_checkpoint
from experiment.checkpoint import latest
from experiment.checks import check
from experiment.classifier import Classifier
from experiment.folder import run_folder
from experiment.procedures import PUBLISHED, training_recipe
from experiment.recipe import GROUPS, read_command
from experiment.stopping import Signals
from training.parallel import start_compute
from utils import UserError, run_main


def main(argv: list[str]) -> None:
    """The command line."""
    given = read_command(list(GROUPS.values()), argv)
    recipe = training_recipe(given)
    if recipe.session.eval:
        folder = recipe.runtime.output_dir
        path = recipe.start.resume or (folder and latest(folder))
        if not path:
            raise UserError(
                "nothing to evaluate: give --resume FILE, or an --output_dir that holds a checkpoint"
            )
        values = {"procedure": PUBLISHED, **given.values, "checkpoint": str(path)}
        evaluate_checkpoint(given._replace(values=values))
        return
    check(recipe)
    compute = start_compute(recipe.runtime)
    signals = Signals(recipe.session.requeue_code, compute)
    with signals.answered(), run_folder(recipe, compute) as recipe:
        Classifier(recipe, compute, signals).fit()


if __name__ == "__main__":
    run_main(main)
