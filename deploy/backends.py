"""Backends by name; other runtimes run the folder that would be shipped, by the runner that ships with it."""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive.backend import Backend, Eager, Run, Staged, static, tuned
from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.pipeline import Stage
from adaptive.policy import Policy
from adaptive.timing import interleaved
from deploy import decide
from deploy.alone import Alone
from deploy.compiled import Compiled
from deploy.export import export, shared
from deploy.folder import IMAGES
from deploy.quantize import CALIBRATING, quantise
from deploy.runner import Runner
from experiment.open import Opened
from experiment.samples import calib_images, test_images
from experiment.subject import Subject
from models import MultiExitModel
from utils import UserError

# The precisions of each, and packages that it needs besides torch.
PRECISIONS = {
    "eager": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
NEEDED = {name: ("onnx", "onnxscript", name) for name in ("onnxruntime", "openvino")}
ALL = "-r requirements-deploy.txt"
TRIED = 64  # images per call by which backends are compared


class Exports:
    """Exported folders of a network, each made when it is first asked for; they go with this object.

    `calib` returns images [N, 3, H, W] to calibrate int8 on; without it there is none.
    """

    def __init__(self, opened: Opened, calib: Callable[[], Tensor] | None = None) -> None:
        self.opened = opened
        self.calib = calib
        self.root = TemporaryDirectory(prefix="exported")

    @classmethod
    def of(cls, subject: Subject) -> "Exports":
        """Those of a network on its data."""
        return cls(subject.opened, lambda: calib_images(subject, CALIBRATING))

    def without(self, off: Collection[int], precision: str) -> Path:
        """The network with these exits switched off."""
        policy = replace(through(self.opened.network), off=tuple(off))
        quantised = self.without((), precision) if off and precision == "int8" else None
        return self._made(f"without {sorted(off)}", self.opened, policy, precision, quantised)

    def alone(self, k: int, precision: str) -> Path:
        """Exit k as a network of one exit."""
        opened = replace(self.opened, network=Alone(self.opened.network, k))
        return self._made(f"alone {k}", opened, through(opened.network), precision)

    def policy(self, policy: Policy) -> decide.Policy:
        """A policy as a runner reads it."""
        path = Path(self.root.name, "policy.json")
        policy.save(path)
        return decide.Policy(path)

    def _made(self, name: str, opened: Opened, policy: Policy, precision: str, quantised: Any = None) -> Path:
        weights = "int8" if precision == "int8" else "fp32"
        folder = Path(self.root.name, f"{name} in {weights}")
        if not folder.exists():
            if weights == "int8" and self.calib and not quantised:
                quantised = partial(quantise, images=_array(self.calib()))
            export(opened, shared(policy, weights), folder, quantise=quantised)
        return folder


class Exported:
    """A network in onnxruntime or OpenVINO."""

    def __init__(self, exports: Exports, name: str, precision: str = "fp32") -> None:
        self.exports = exports
        self.name = name
        self.precision = precision
        self.runners: dict[tuple[Path, int], Runner] = {}

    def network(self) -> MultiExitModel:
        """All exits; nothing is merged."""
        return Staged(self.exports.opened.network, self.stages())

    def stages(self, off: Collection[int] = ()) -> list[Stage]:
        """States are arrays that hold until the stage that made them runs again."""
        runner = self._runner(self.exports.without(off, self.precision))

        def run(k: int, state: decide.State) -> tuple[Tensor, decide.State]:
            logits, made = runner.stages[k](state)
            return torch.from_numpy(logits.copy()), decide.only(state, runner.later[k]) | made

        first, *later = (partial(run, k) for k in range(len(runner.stages)))
        return [lambda images: first({IMAGES: _array(images)}), *later]

    def early(self, policy: Policy, order: str) -> Run:
        """The runner's answers."""
        folder = self.exports.without(policy.off, self.precision)
        decides = self.exports.policy(policy)

        def run(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
            runner = self._runner(folder, size)
            runner.policy = decides
            answers = runner.answer(_array(images), order)
            return torch.from_numpy(answers.logits), torch.from_numpy(answers.exits)

        return run

    def alone(self, k: int) -> Run:
        """Exported with all other exits switched off; nothing is pooled, nothing decided."""
        (stage,) = self._runner(self.exports.alone(k, self.precision)).stages

        def run(part: Tensor, _: int) -> Tensor:
            logits, _made = stage({IMAGES: _array(part)})
            return torch.from_numpy(logits.copy())

        return static(run, k)

    def _runner(self, folder: Path, size: int = 1) -> Runner:
        """The runner of a folder for micro-batches of this size."""
        key = folder, size
        if key not in self.runners:
            try:
                threads = torch.get_num_threads()  # as many as rivals have
                runner = Runner(folder, self.name, self.precision, threads=threads, micro_batch=size)
                self.runners[key] = runner
            except decide.RunnerError as error:
                raise UserError(str(error)) from error
        return self.runners[key]


def through(model: MultiExitModel) -> Policy:
    """By which nobody leaves before the last exit."""
    early = model.num_exits - 1
    return Policy.of([NOBODY] * early + [EVERYBODY])


def _array(images: Tensor) -> decide.Array:
    return np.ascontiguousarray(images.float().cpu().numpy())


def open_backend(name: str, precision: str, exports: Exports) -> Backend:
    """A backend for a network, which stays as it is. Raises ValueError for what cannot be had."""
    if precision not in PRECISIONS[name]:
        accepted = ", ".join(PRECISIONS[name])
        raise UserError(f"--precision {precision}: accepted with --backend {name}: {accepted}")
    if missing := absent(name, precision):
        raise UserError(f"--backend {name} in {precision} needs {missing}: pip install {missing}")
    network = exports.opened.network
    device = next(network.parameters()).device.type
    if name in NEEDED and device != "cpu":
        raise UserError(f"--backend {name} runs on the processor, the network on {device}: add --device cpu")
    if name == "eager":
        return Eager(tuned(network, precision), precision)
    if name == "compile":
        side = exports.opened.view.size
        return Compiled(network, (3, side, side), precision)
    return Exported(exports, name, precision)


def absent(name: str, precision: str) -> str:
    """The packages that a backend lacks, in words."""
    needed = list(NEEDED.get(name, ()))
    if precision == "int8":
        needed.append("nncf")
    return " ".join(package for package in needed if not find_spec(package))


def fastest(precision: str, exports: Exports, images: Tensor) -> tuple[Backend, str]:
    """The backend that takes images [N, 3, H, W] through all stages fastest, and a line that says so.

    On a CPU `torch.compile` is not tried: it takes minutes to compile. On a GPU other runtimes are none.
    """
    others = ["compile"] if images.device.type == "cpu" else NEEDED
    backends = []
    for name, known in PRECISIONS.items():
        if precision in known and name not in others and not absent(name, precision):
            backends.append(open_backend(name, precision, exports))
    if not backends:
        raise UserError(f"--backend auto: none for {precision} is installed: pip install {ALL}")
    policy = through(exports.opened.network)
    calls = {one: partial(one.early(policy, "throughput"), images, TRIED) for one in backends}
    for call in calls.values():
        call()
    times = interleaved(calls, rounds=3, device=images.device)
    best = min(times, key=times.__getitem__)
    speeds = ", ".join(f"{one.name} {len(images) / seconds:.0f}" for one, seconds in times.items())
    return best, f"backend {best.name}, in {precision}: images/s through all exits: {speeds}"


def with_backend(subject: Subject) -> tuple[Subject, str]:
    """The subject with the backend that its flags name, and a line about it, if there is one."""
    exits = subject.recipe.exits
    compute = subject.compute
    if (exits.backend, exits.precision) == ("eager", "fp32"):
        return subject, ""  # as trained, or as --use_amp and others have it
    asked = f"--backend {exits.backend} --precision {exits.precision}"
    if compute.amp or compute.world_size > 1:
        other = "--use_amp true" if compute.amp else f"{compute.world_size} processes"
        raise UserError(f"{asked}: not with {other}")
    exports = Exports.of(subject)
    line = ""
    if exits.backend == "auto":
        backend, line = fastest(exits.precision, exports, test_images(subject, 4 * TRIED)[0])
    else:
        backend = open_backend(exits.backend, exits.precision, exports)
        if exits.backend == "compile":
            line = "backend compile: stages are compiled when they first run, for minutes on a CPU"
    return replace(subject, backend=backend), line
