"""Training a classifier by a recipe: what is built once, and what every epoch does."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptive.flops import print_costs
from adaptive.thresholds import geometric_quotas
from datasets import Splits, open_splits, with_readable
from engine import train_one_epoch
from experiment.announce import farewell, opening
from experiment.batches import loader_of
from experiment.cached import features_of
from experiment.fit import fit_to
from experiment.judge import Judge
from experiment.log import epoch_line, logger_of
from experiment.open import architecture, open_teacher, read_weights
from experiment.options import plain
from experiment.place import Place
from experiment.published import Stored
from experiment.recipe import Recipe
from experiment.resume import Pace, as_started, checkpoint_of, resume, with_global_batch
from experiment.run import Figures, Run, Saving
from experiment.stopping import Signals, Stopped, Timetable
from models import MultiExitModel, create_model
from training.l2w import SampleWeighting
from training.optim import Update, make_update
from training.parallel import wrapped
from training.regimes import PHASES, phase_of, trained_through
from training.weight_net import write_tables
from utils import Compute, UserError, gather, seed_everything


class Classifier:
    """A network in training: all that an epoch needs, from the start or as restored from a checkpoint.

    Without `splits` the recipe's data are opened.
    """

    def __init__(
        self, recipe: Recipe, compute: Compute, signals: Signals, splits: Splits | None = None
    ) -> None:
        self.folder = Path(recipe.runtime.output_dir) if recipe.runtime.output_dir else None
        self.recipe, self.compute = recipe, compute
        stored = checkpoint_of(recipe, self.say)
        if stored:
            self.recipe = recipe = as_started(recipe, stored)
        held_out = stored.held_out if stored else None
        self.splits = splits or open_splits(recipe.data, recipe.view, recipe.transform, held_out)
        # Images held out from here on are not stored as unseen: a published network was trained on them.
        self.held_out = held_out if stored else self.splits.calib_indices
        self.passes = 2 if recipe.weighting.l2w else 1  # losses per batch
        seed_everything(recipe.data.seed, 0, 0)
        self.arch, self.network = self._network(fresh=stored is None)
        self.recipe = recipe = with_global_batch(recipe, compute.world_size, stored)
        self.pace = Pace.of(recipe, compute.world_size, stored)
        # After what may refuse the flags: it may read all images.
        train = with_readable(self.splits.train, recipe.data, recipe.runtime, compute)
        self.splits = replace(self.splits, train=train)
        self.features = features_of(recipe, self.splits, self.network, self.arch, compute)
        self.loader = loader_of(recipe, self.splits, compute, self.passes, self.features)
        self.update = self._update()
        self.regime = recipe.objective.way
        self.weighting: SampleWeighting | None = None
        self.objectives = self._objectives()
        self.judge = Judge(recipe, self.splits, self.network, self.update, compute, self.features)
        self.run = self._run()
        timetable = Timetable(recipe.session, signals)
        self.place = Place(self.run, timetable, self.loader, self.update, self.weighting, compute, self.steps)
        self._start(stored)
        self.enter(self.phase_at(self.run.first))
        self.logger = logger_of(recipe, compute, self.update.step)
        self.judged: Figures = {}  # of the last epoch

    def _network(self, *, fresh: bool) -> tuple[dict[str, Any], MultiExitModel]:
        """The architecture, and the network on its device; a fresh one may start from other weights."""
        recipe, name = self.recipe, self.recipe.network.model
        arch = architecture(name, recipe.options, self.splits.source.num_classes, self.splits.view)
        # Weights of the network's authors are fetched for a first epoch only.
        options = {**recipe.options, **arch["options"]} if fresh else arch["options"]
        network = create_model(name, arch["num_classes"], **options)
        recipe.low_start.check(network, self.splits.view.size)
        if fresh and recipe.start.finetune:
            fit = fit_to(network, read_weights(recipe.start, network))
            network.load_state_dict(fit.weights)
            self.say(fit.line(recipe.start.finetune))
        return arch, self.compute.place(network)

    def _update(self) -> Update:
        """Optimizer, schedules and moving average; `steps` are the optimizer steps of an epoch."""
        recipe = self.recipe
        losses, update_freq = len(self.loader) * self.passes, recipe.optimization.update_freq
        rest = 0 if recipe.data.drop_last else losses % update_freq  # the length of a stream is an estimate
        self.steps = losses // update_freq + (rest > 0)
        return make_update(
            self.network,
            self.pace.scaled(recipe.optimization),
            steps=self.steps,
            rest=rest,
            losses_per_batch=self.passes,
            fp16=self.compute.amp == torch.float16,
            measure_every=max(1, recipe.session.print_freq * self.passes // update_freq),
        )

    def _objectives(self) -> dict[str, Any]:
        """The objective of every phase of the regime; they live as long as the run."""
        recipe, objective, teacher = self.recipe, self.recipe.objective, None
        if objective.kd_teacher:
            classes = self.splits.source.num_classes
            teacher = open_teacher(objective.kd_teacher, classes, self.splits.view, self.compute.device)
            recipe.low_start.check(teacher, self.splits.view.size)
            teacher = self.compute.place(teacher)
        if recipe.weighting.l2w:
            self.weighting = SampleWeighting(
                recipe.weighting,
                self.update,
                objective.losses(self.network, "joint", teacher),
                proportions=geometric_quotas(recipe.weighting.target_p_index / 20, self.network.num_exits),
                batches=len(self.loader),
                epochs=recipe.optimization.epochs,
            )
            return dict.fromkeys(PHASES[self.regime], self.weighting)
        popular = len(recipe.data.popular_classes)
        return {
            phase: objective.function(self.network, phase, teacher, popular) for phase in PHASES[self.regime]
        }

    def _run(self) -> Run:
        parts = {"model": self.network, **self.update.parts}
        if self.weighting:
            parts["l2w"] = self.weighting
        session = self.recipe.session
        saving = Saving(self.folder, session.save_ckpt, session.save_ckpt_freq, session.save_ckpt_num)
        return Run(
            parts,
            self.facts,
            saving,
            score=self.judge.score,
            tell=self.tell,
            main_process=self.compute.rank == 0,
        )

    def facts(self) -> dict[str, Any]:
        """What a checkpoint stores about the run, besides the state of its parts."""
        return {
            "arch": self.arch,
            "args": self.recipe.flags() | plain(self.splits.view),
            "calib_indices": self.held_out,
            "class_names": list(self.splits.source.class_names),
            "step": self.update.step,
            "pace": asdict(self.pace),
        }

    def _start(self, stored: Stored | None) -> None:
        """Moves to the first step to be done, and reports where that is."""
        recipe, run = self.recipe, self.run
        run.first = recipe.start.start_epoch
        if stored:
            missing = resume(run, stored, self.network, self.update.optimizer, self.arch)
            if "model_ema" in missing and self.update.ema:
                self.update.ema.set(self.network)  # a moving average that the file lacks starts here
            if changes := self.pace.changes(recipe, stored):
                self.say(f"other than in {stored.source}: {changes}")
            if "l2w" in missing:
                self.say(f"checkpoint {stored.source} holds no weight net: it starts anew")
        seen = gather((run.first, run.partial.get("batch"), bool(run.partial.get("figures"))), self.compute)
        if len(set(seen)) > 1:
            raise UserError(f"--output_dir {self.folder}: all processes must see the same checkpoint there")
        images = self.pace.images / stored.content["pace"]["images"] if stored and run.partial else 1.0
        self.place.move(run.first, run.partial, images)
        source = stored.source if stored else ""
        self.say("\n".join(opening(recipe, self.network, self.splits, self.compute, source)))
        if recipe.runtime.flops and self.compute.rank == 0:
            print_costs(self.network, self.arch, self.splits.view.size)

    def phase_at(self, epoch: int) -> str:
        """The phase of the regime in an epoch."""
        first = round(self.recipe.objective.first_share * self.recipe.optimization.epochs)
        return phase_of(self.regime, epoch, first)

    def enter(self, phase: str) -> None:
        """From now on trains as this phase of the regime does."""
        side = self.splits.view.size
        core = trained_through(self.network, phase, (3, side, side))
        if self.features:
            core = self.features.heads(core)
        if self.recipe.session.compile:
            core.compile()
        self.model, self.phase = wrapped(core, self.compute), phase
        self.update.attach(self.model)

    def fit(self) -> None:
        """All epochs that are left: train, evaluate on calib, save, log; after the last one on test too.

        Raises `Stopped` if a signal stopped it.
        """
        if self.features:
            self.features.compute_missing()
        self.place.signals.train()
        try:
            self.run.fit(self.recipe.optimization.epochs, self.one_epoch, partial(self.evaluate, "test"))
        except Stopped:
            self.say(self.place.stopped(self.recipe.start.resume))
            raise
        self.logger.close(self.judged)
        if self.folder and self.compute.rank == 0:
            print("\n".join(farewell(self.recipe)))

    def one_epoch(self, number: int) -> Figures:
        """Trains through what is left of an epoch and evaluates on calib; returns the metrics to log."""
        if number != self.place.epoch.number:
            self.place.move(number, {})
        figures = self.run.partial.get("figures") or self._train()
        try:
            return figures | self.evaluate("calib")
        except (Stopped, RuntimeError):  # another process may have been stopped
            self.place.save(figures)
            raise

    def _train(self) -> Figures:
        """The metrics of the epoch's training."""
        epoch, recipe = self.place.epoch, self.recipe
        phase = self.phase_at(epoch.number)
        if phase != self.phase:
            self.enter(phase)
        means = train_one_epoch(
            self.model,
            self.loader,
            recipe.low_start.objective(self.objectives[self.phase], epoch.number, recipe.optimization.epochs),
            self.update,
            self.compute,
            epoch=epoch,
            print_freq=recipe.session.print_freq,
            on_print=self.report,
        )
        figures = {f"train/{name}": value for name, value in means.items()} | self.update.figures()
        return figures | self.weighting_figures(epoch.number)

    def report(self, means: Figures) -> None:
        """Logs the metrics so far within an epoch."""
        self.logger.add(means | self.update.figures(), self.update.step, "train/")
        if self.weighting:
            self.logger.add(self.weighting.figures(), self.update.step, "l2w/")

    def tell(self, record: dict[str, Any]) -> None:
        """Logs and prints an epoch."""
        self.judged = {
            name: value for name, value in record.items() if name.startswith(("calib", "test", "best"))
        }
        self.logger.add({**self.judged, "seconds": record["seconds"]}, self.update.step)
        print(epoch_line(record, self.recipe.optimization.epochs))

    def evaluate(self, part: str) -> Figures:
        """The judge's figures of a split; a signal breaks it off."""
        with self.place.signals.at_once():
            return self.judge.evaluate(part)

    def weighting_figures(self, epoch: int) -> Figures:
        """Metrics of the weight net in this epoch, `l2w/...`; adds histograms, and a file if one is due."""
        if not self.weighting:
            return {}
        means, tables = self.weighting.take_figures(self.compute), self.weighting.take_tables()
        figures = {f"l2w/{name}": value for name, value in means.items()}
        self.logger.add_histograms(tables, self.update.step, "l2w/")
        every = self.recipe.weighting.l2w_tables
        if self.folder and every and (epoch + 1) % every == 0:
            count = len(tables["losses"])
            rows = self.loader.rows or range(count)  # samples of a stream have no index
            if len(rows) != count:
                self.say(f"no l2w-{epoch + 1}.npz: other processes began the epoch")
                return figures
            shards = gather({"index": torch.tensor(rows), **tables}, self.compute)
            if self.compute.rank == 0:
                write_tables(self.folder / f"l2w-{epoch + 1}.npz", shards)
        return figures

    def say(self, line: str) -> None:
        """Prints a line, once for all processes."""
        if self.compute.rank == 0:
            print(line)
