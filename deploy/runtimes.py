"""Stages in onnxruntime or OpenVINO: named tensors in, logits and named tensors out.

Maps between stages have channels last, and in bf16 that type: a compiler need not reorder or convert them
where the network is cut, and half as many bytes are handed over.
"""

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.decide import Array, RunnerError, State
from deploy.folder import IMAGES, Port, StageFiles

BYTES = "int8", "uint8"  # that maps, float32 in the manifest, may have between quantised stages


def size_for(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is `count` or more: few sizes, little in vain."""
    step = 1 << max(0, (count - 1).bit_length() - 2)
    return -(-count // step) * step


def processors() -> int:
    """How many processors this process may use at once, by its affinity and the quota of its container."""
    allowed = getattr(os, "sched_getaffinity", None)  # not everywhere
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return count
    return max(1, math.floor(min(count, quota(Path("/sys/fs/cgroup"), groups))))


def quota(root: Path, groups: str) -> float:
    """The least quota, in processors, of control groups, as in /proc/self/cgroup, and of those above them."""
    found = math.inf
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):  # of version 2, or 1
            top = root / "cpu" if controllers else root
            group = top / path.lstrip("/")
            # A container may have its group at the top, whatever its path is outside.
            for one in (group, *group.parents):
                if one.is_relative_to(top):
                    found = min(found, _quota(one))
    return found


def _quota(group: Path) -> float:
    new = group / "cpu.max"
    try:
        if new.exists():
            limit, period = map(int, new.read_text().split())
        else:
            limit = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):  # no such group; "max"
        return math.inf
    return limit / period if limit > 0 else math.inf


class Bound(NamedTuple):
    """A stage for batches of one size: what binds an input and runs it, the results."""

    bind: Callable[[int, Array], None]
    run: Callable[[], Any]
    logits: Array
    made: State


# How to make a `Bound` for ends and a size of batch; the ends in order, the logits last.
Loaded = tuple[Callable[[StageFiles, int], Bound], list[Port]]


class Runtime:
    """Runs stages, for one caller at a time; `threads` 0: one per processor that this process may use."""

    def __init__(self, precision: str, threads: int) -> None:
        self.half = precision == "bf16"
        self.threads = threads or processors()

    def stage(self, files: StageFiles, classes: int) -> "Stage":
        """The stage in a file, which must have these ends and classes; RunnerError for another one."""
        try:
            bound_for, found = self.load(files)
        except Exception as error:  # of a runtime's own types
            why = " ".join(str(error).split())[:200]
            raise RunnerError(f"{files.path} cannot be run: {why}") from None
        logits = Port(found[-1].name, (classes,), "float32")
        expected = [*files.inputs, *files.outputs, logits]
        for one, wanted in zip(found, expected, strict=False):
            plain = replace(one, dtype="float32") if one.dtype in BYTES else one
            if wanted not in (one, plain):
                raise RunnerError(f"{files.path} has {astuple(one)}, the manifest says {astuple(wanted)}")
        if len(found) != len(expected):
            raise RunnerError(f"{files.path} has {len(found)} ends, the manifest says {len(expected)}")
        first = len(files.inputs)
        held = files._replace(inputs=found[:first], outputs=found[first:-1])
        return Stage(held, partial(bound_for, held))

    def load(self, files: StageFiles) -> Loaded:
        """Reads the file."""
        raise NotImplementedError


class Stage:
    """A stage from named tensors [B, ...] to logits [B, C] and named tensors, which hold until the next call.

    Tensors that are the same objects as in the last call of that size are not bound again.
    """

    def __init__(self, files: StageFiles, bound_for: Callable[[int], Bound]) -> None:
        self.names = [one.name for one in files.inputs]
        self.bound_for = bound_for
        self.sizes: dict[int, Bound] = {}
        self.last: dict[int, list[Any]] = {}  # what is bound, by size

    def __call__(self, state: State) -> tuple[Array, State]:
        arrays = [state[name] for name in self.names]
        size = len(arrays[0])
        if size not in self.sizes:
            self.sizes[size] = self.bound_for(size)
            self.last[size] = [None] * len(arrays)
        bound = self.sizes[size]
        last = self.last[size]
        for i, array in enumerate(arrays):
            if last[i] is not array:
                bound.bind(i, array)
                last[i] = array
        bound.run()
        return bound.logits, bound.made


class Onnx(Runtime):
    """onnxruntime, on the processor."""

    def __init__(self, precision: str, threads: int) -> None:
        super().__init__(precision, threads)
        if self.half:
            raise RunnerError("onnxruntime has no bf16 on CPU; accepted: fp32, int8, or backend openvino")
        self.ort = importlib.import_module("onnxruntime")

    def load(self, files: StageFiles) -> Loaded:
        """As `Runtime.load`."""
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Waiting threads of a stage that is done would keep the processors from the next one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = self.ort.InferenceSession(files.path, options, providers=["CPUExecutionProvider"])
        logits, *made = session.get_outputs()
        ports = [*session.get_inputs(), *made, logits]
        types = {"float": "float32", "double": "float64"}

        def port(one: Any) -> Port:
            dtype = one.type.removeprefix("tensor(").removesuffix(")")
            return Port(one.name, tuple(one.shape[1:]), types.get(dtype, dtype))

        def bound_for(files: StageFiles, size: int) -> Bound:
            binding = session.io_binding()
            made = {one.name: np.empty((size, *one.shape), one.dtype) for one in files.outputs}
            answers = np.empty((size, *logits.shape[1:]), np.float32)
            for name, array in {logits.name: answers, **made}.items():
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            return Bound(
                lambda i, array: binding.bind_cpu_input(files.inputs[i].name, array),
                lambda: session.run_with_iobinding(binding),
                answers,
                made,
            )

        return bound_for, [port(one) for one in ports]


@cache
def openvino_core() -> Any:
    """The one OpenVINO core of this process, for good.

    Each core gives the thread a stack for signals and puts the one before back when it goes. So after two
    that go in the order in which they came, signals are sent to memory that is freed, and the next one, as of
    a child process that ends, kills the process (2026.4.1).
    """
    return importlib.import_module("openvino").Core()


class Openvino(Runtime):
    """OpenVINO, on the processor; a stage is compiled for every size of batch that comes."""

    def __init__(self, precision: str, threads: int) -> None:
        super().__init__(precision, threads)
        self.ov = importlib.import_module("openvino")
        self.core = openvino_core()
        self.config = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if self.half else "f32",
        }

    def load(self, files: StageFiles) -> Loaded:
        """As `Runtime.load`."""
        model = self.core.read_model(files.path)
        logits, *made = model.outputs
        wanted = [one.name for one in (*files.inputs, *files.outputs)]

        def port(end: Any) -> Port:
            name = next((name for name in wanted if name in end.names), end.any_name)  # it may have several
            shape = tuple(side.get_length() for side in list(end.partial_shape)[1:])
            return Port(name, shape, np.dtype(end.element_type.to_dtype()).name)

        ports = [port(end) for end in (*model.inputs, *made, logits)]
        return partial(self._bound, model), ports

    def _bound(self, model: Any, files: StageFiles, size: int) -> Bound:
        model = model.clone()
        model.reshape({i: [size, *one.shape] for i, one in enumerate(files.inputs)})
        steps = self.ov.preprocess.PrePostProcessor(model)
        for i, one in enumerate(files.inputs):
            self._hold(steps.input(i), one, size)
        made = {one.name: self._hold(steps.output(i), one, size) for i, one in enumerate(files.outputs, 1)}
        compiled = self.core.compile_model(steps.build(), "CPU", self.config)
        logits = np.empty(tuple(compiled.output(0).shape), np.float32)
        request = compiled.create_infer_request()
        for i, array in enumerate((logits, *made.values())):
            request.set_output_tensor(i, self._tensor(array))
        return Bound(
            lambda i, array: request.set_input_tensor(i, self._tensor(array)),
            lambda: request.infer(share_outputs=True),  # else it would copy them
            logits,
            made,
        )

    def _hold(self, end: Any, one: Port, size: int) -> Array:
        """Sets how an end of the stage holds a tensor; returns an array that does."""
        dtype = one.dtype
        if self.half and dtype == "float32" and one.name != IMAGES:
            end.tensor().set_element_type(self.ov.Type.bf16)
            dtype = "uint16"  # NumPy has no bf16
        return np.empty((size, *one.shape), dtype)

    def _tensor(self, array: Array) -> Any:
        if array.dtype == np.uint16:
            return self.ov.Tensor(array, array.shape, self.ov.Type.bf16)
        return self.ov.Tensor(array, shared_memory=True)


BACKENDS: dict[str, type[Runtime]] = {"openvino": Openvino, "onnxruntime": Onnx}


def runtime(backend: str, precision: str, threads: int) -> Runtime:
    """The backend of this name, for "auto" the first that is installed; RunnerError where there is none."""
    names = list(BACKENDS) if backend == "auto" else [backend]
    if not set(names) <= set(BACKENDS):
        raise RunnerError(f"backend {backend!r}; accepted: auto, {', '.join(BACKENDS)}")
    for name in names:
        if find_spec(name):
            return BACKENDS[name](precision, threads)
    raise RunnerError(f"{' or '.join(names)} is needed: pip install {names[-1]}")
