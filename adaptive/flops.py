"""What the exits of a network cost, counted operator by operator, under named conventions."""

import copy
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from adaptive.inference import run_single
from models import MultiExitModel

# Operators that do multiply-adds by their name; one of them without a counting formula is reported.
_LOOKS_COSTLY = re.compile(r"conv|mm$|matmul|bmm|dot|einsum|attention|bilinear$|lstm|gru|linear$|cdist|fft")


@dataclass(frozen=True)
class Costs:
    """Cumulative cost of the answers of exits 0..k for one image, k = 0..K-1.

    `macs` are multiply-adds, `by_operator` the same split by operator, `papers` the count of the MSDNet,
    RANet and EBJR tools, `uncounted` the costly-looking operators that no formula covers.
    """

    macs: list[int]
    by_operator: list[dict[str, int]]
    papers: list[int]
    uncounted: list[str]


def exit_costs(model: MultiExitModel, input_shape: tuple[int, int, int]) -> list[int]:
    """Multiply-adds to have the answers of exits 0..k for one image of `input_shape` (C, H, W), for every
    k."""
    return count(model, input_shape).macs


def count(model: MultiExitModel, input_shape: tuple[int, int, int]) -> Costs:
    """Runs `begin` and every `step` once on the meta device and reads the counters after each step."""
    twin, state = _meta_twin(model), torch.empty(1, *input_shape, device="meta")
    macs, by_operator, papers = [], [], []
    seen = _SeenOperators()
    with (
        torch.no_grad(),
        seen,
        FlopCounterMode(display=False) as counter,
        _PapersCounter(twin) as papers_counter,
    ):
        state = twin.begin(state)
        for k in range(twin.num_exits):
            _, state = twin.step(k, state)
            # torch counts two operations for one multiply-add.
            by_operator.append({str(op): n // 2 for op, n in counter.get_flop_counts()["Global"].items()})
            macs.append(counter.get_total_flops() // 2)
            papers.append(papers_counter.total)
    return Costs(macs, by_operator, papers, seen.uncounted())


def single_costs(model: MultiExitModel, input_shape: tuple[int, int, int]) -> list[int]:
    """Multiply-adds of each exit alone: the static network that ends there, without the earlier heads it can
    spare."""
    twin, images, costs = _meta_twin(model), torch.empty(1, *input_shape, device="meta"), []
    for k in range(twin.num_exits):
        with FlopCounterMode(display=False) as counter:
            run_single(twin, images, k)
        costs.append(counter.get_total_flops() // 2)
    return costs


def fvcore_counts(model: MultiExitModel, input_shape: tuple[int, int, int]) -> list[dict[str, int]]:
    """fvcore's operator counts of the forward pass cut after exit k, for every k, as a cross-check of
    `count`.

    fvcore traces, so it drops what no exit up to k reads; it adds 2 per batch norm element, 5 per layer norm
    element. "conv", "linear", "matmul", "bmm" and "attention", for which it has no formula of its own, are
    plain multiply-adds.
    """
    # Tracing turns shapes into tensors, which meta convolutions refuse: the network really runs, once per
    # exit.
    twin, images = copy.deepcopy(model).cpu().eval().float(), torch.zeros(1, *input_shape)
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # fvcore's tracing is deprecated in torch, and still exact
        from fvcore.nn import FlopCountAnalysis

        for k in range(model.num_exits):
            analysis = FlopCountAnalysis(_CutAfter(twin, k), images)
            analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts.append({op: int(n) for op, n in analysis.by_operator().items()})
    return counts


def cost_table(
    model: MultiExitModel, published: MultiExitModel, input_shape: tuple[int, int, int]
) -> list[str]:
    """Lines that show every exit's cost by each convention, and what the counters disagree on or cannot
    count.

    `published` is the same network built to execute as its paper does, for the columns that repeat published
    figures.
    """
    ours, whole, traced = (
        count(model, input_shape),
        count(published, input_shape),
        fvcore_counts(model, input_shape),
    )
    lines = [
        f"cost of one image {input_shape} in millions, heads of earlier exits included",
        "exit  multiply-adds  run as published  papers' counter  fvcore total",
    ]
    for k, row in enumerate(
        zip(ours.macs, whole.macs, whole.papers, (sum(t.values()) for t in traced), strict=True)
    ):
        lines.append(
            f"{k:4}"
            + "".join(f"{n / 1e6:{width}.3f}" for n, width in zip(row, (15, 18, 17, 14), strict=True))
        )
    for k, (macs, operators) in enumerate(zip(ours.macs, traced, strict=True)):
        products = sum(operators.get(name, 0) for name in ("conv", "linear", "matmul", "bmm", "attention"))
        if products != macs:
            lines.append(f"counters disagree at exit {k}: torch has {macs} multiply-adds, fvcore {products}")
    if ours.uncounted:
        lines.append(f"not counted for want of a formula: {', '.join(ours.uncounted)}")
    return lines


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Both products of attention, q k^T and that times v, from the traced shapes [..., tokens, channels]."""
    (*batch, queries, width), (*_, keys, _), (*_, out_width) = (value.type().sizes() for value in inputs[:3])
    return Counter(attention=math.prod(batch) * queries * keys * (width + out_width))


class _CutAfter(nn.Module):
    """The forward pass up to exit k."""

    def __init__(self, model: MultiExitModel, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def forward(self, images: Tensor) -> list[Tensor]:
        state, exits = self.model.begin(images), []
        for k in range(self.k + 1):
            logits, state = self.model.step(k, state)
            exits.append(logits)
        return exits


def _meta_twin(model: MultiExitModel) -> MultiExitModel:
    """A copy in eval mode that shares the structure but holds no weights."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = tensor.detach().to("meta")
        memo[id(tensor)] = (
            nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
        )
    return copy.deepcopy(model, memo).eval().float()


class _SeenOperators(TorchDispatchMode):
    """Remembers the names of all operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._overloadpacket)
        return func(*args, **(kwargs or {}))

    def uncounted(self) -> list[str]:
        """Operators that look costly and have no formula in torch's registry."""
        unknown = (str(op) for op in self.seen if op not in flop_registry)
        return sorted(op for op in unknown if _LOOKS_COSTLY.search(op))


class _PapersCounter:
    """The counter of the published tools: leaf modules only, a multiply-add is one operation.

    Convolutions without bias, linear layers with it, one per element of a ReLU, k * k per output element of a
    pooling, one per input element of a global pooling; batch norm, dropout and everything functional are
    free.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.total, self.handles = model, 0, []

    def __enter__(self) -> "_PapersCounter":
        leaves = (m for m in self.model.modules() if not any(m.children()))
        self.handles = [leaf.register_forward_hook(self._add) for leaf in leaves]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            self.total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            self.total += module.weight.numel() + (0 if module.bias is None else module.bias.numel())
        elif isinstance(module, nn.ReLU):
            self.total += inputs[0].numel()
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            side = module.kernel_size if isinstance(module.kernel_size, int) else module.kernel_size[0]
            self.total += output.numel() * side * side
        elif isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            self.total += inputs[0].numel()
