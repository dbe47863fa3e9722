"""What the exits of a network cost, counted operator by operator, under named conventions."""

import copy
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import flop_registry

from adaptive.costs import StageCosts
from adaptive.operators import Operators
from models import MultiExitModel, create_model, model_options, tune
from utils import UserError

# Operators that do multiply-adds by their name; one of them without a counting formula is reported.
_LOOKS_COSTLY = re.compile(r"conv|mm$|matmul|bmm|dot|einsum|attention|bilinear$|lstm|gru|linear$|cdist|fft")
# What the published tools count as one operation per element that it reads.
_ONE_EACH = (nn.ReLU, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Costs:
    """Cumulative cost of the answers of exits 0..k for one image, k = 0..K-1.

    `macs` are multiply-adds, `papers` the count of the MSDNet, RANet and EBJR tools, `uncounted` the
    costly-looking operators that no formula covers. `stages` has the multiply-adds of every trunk and head.
    """

    macs: list[int]
    papers: list[int]
    uncounted: list[str]
    stages: StageCosts


def check_side(model: MultiExitModel, side: int, flag: str = "--input_size") -> None:
    """Raises ValueError, which names the least side accepted, unless the network reads images of `side`.

    `flag` is the one that asks for it.
    """
    reason = _failure(model, side)
    if not reason:
        return
    low, high = side, 2 * side
    while high < 1024 and _failure(model, high):
        low, high = high, 2 * high
    while high - low > 1:  # `low` is too small, `high` is not
        middle = (low + high) // 2
        low, high = (middle, high) if _failure(model, middle) else (low, middle)
    accepted = "" if _failure(model, high) else f"; the least side accepted is {high}"
    raise UserError(f"{flag} {side}: the network cannot read such images ({reason}){accepted}")


@torch.no_grad()
def _failure(model: MultiExitModel, side: int) -> str:
    """Why a network fails on images of this side, or ""; no arithmetic is done."""
    try:
        twin = _twin(model, "meta")
        with Operators():
            twin(torch.empty(2, 3, side, side, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""


def exit_costs(model: MultiExitModel, input_shape: tuple[int, int, int]) -> list[int]:
    """Multiply-adds to have the answers of exits 0..k for one image (C, H, W), for every k."""
    return count(model, input_shape).macs


def count(model: MultiExitModel, input_shape: tuple[int, int, int]) -> Costs:
    """Runs every exit once on the meta device and reads the counters after each."""
    twin, images = _twin(model, "meta"), torch.empty(1, *input_shape, device="meta")
    trunks, heads, papers = [], [], []
    total: Counter[str] = Counter()

    def add(*call: Any) -> None:
        total["papers"] += _papers_cost(*call)

    with Operators() as operators, register_module_forward_hook(add):
        state = twin.begin(images)
        for k in range(twin.num_exits):
            features, state = twin.trunk(k, state)
            trunks.append(operators.total)
            state = twin.carry(k, state, twin.head(k, features))
            heads.append(operators.total)
            papers.append(total["papers"])
    # torch counts two operations for one multiply-add
    starts, macs = [0, *(count // 2 for count in heads[:-1])], [count // 2 for count in heads]
    trunks = [count // 2 - start for count, start in zip(trunks, starts, strict=True)]
    heads = [total - start - trunk for total, start, trunk in zip(macs, starts, trunks, strict=True)]
    return Costs(macs, papers, _uncounted(operators.seen), StageCosts.of(model, trunks, heads))


def single_costs(model: MultiExitModel, input_shape: tuple[int, int, int]) -> list[float]:
    """Multiply-adds of each exit alone: the static network that ends there, without earlier heads."""
    return count(model, input_shape).stages.alone()


def fvcore_counts(model: MultiExitModel, input_shape: tuple[int, int, int]) -> list[dict[str, int]]:
    """fvcore's operator counts of the forward pass up to exit k, for every k: a cross-check of `count`.

    fvcore traces, so it drops what no exit up to k reads; it adds 2 per batch norm element, 5 per layer norm
    element. "conv", "linear", "matmul", "bmm" and "attention", for which it has no formula of its own, are
    plain multiply-adds.
    """
    # Tracing turns shapes into tensors, which meta convolutions refuse: the network really runs, once per
    # exit.
    twin: Any = _twin(model, "cpu")
    images = torch.zeros(1, *input_shape)
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates fvcore's tracing, which is exact
        from fvcore.nn import FlopCountAnalysis

        for k in range(model.num_exits):
            twin.forward = partial(_first_exits, twin, k)
            analysis = FlopCountAnalysis(twin, images)
            analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts.append({op: int(n) for op, n in analysis.by_operator().items()})
    return counts


def print_costs(model: MultiExitModel, arch: dict[str, Any], side: int) -> None:
    """Prints `cost_lines` of a network of architecture `arch` (name, options, num_classes) for a side."""
    print("\n".join(cost_lines(model, as_published(model, arch), (3, side, side))))


def as_published(model: MultiExitModel, arch: dict[str, Any]) -> MultiExitModel:
    """A network of this architecture (name, options, num_classes) that runs as its paper's does.

    Its weights are any; it is `model` itself where there is one way only.
    """
    if "lazy" not in model_options(arch["name"]):
        return model
    return create_model(arch["name"], arch["num_classes"], **{**arch["options"], "lazy": False})


def cost_lines(
    model: MultiExitModel, published: MultiExitModel, input_shape: tuple[int, int, int]
) -> list[str]:
    """Every exit's cost by each convention, and what the counters disagree on or cannot count.

    `published` is the same network built to execute as its paper does, for the columns that repeat published
    figures.
    """
    ours, whole = count(model, input_shape), count(published, input_shape)
    traced = fvcore_counts(model, input_shape)
    lines = [
        f"cost of one image {input_shape} in millions, heads of earlier exits included",
        "exit  multiply-adds  run as published  papers' counter  fvcore total",
    ]
    for k, operators in enumerate(traced):
        costs = [ours.macs[k], whole.macs[k], whole.papers[k], sum(operators.values())]
        cells = [f"{cost / 1e6:{width}.3f}" for cost, width in zip(costs, (15, 18, 17, 14), strict=True)]
        lines.append(f"{k:4}{''.join(cells)}")
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


def _first_exits(model: MultiExitModel, k: int, images: Tensor) -> list[Tensor]:
    return [logits for _, logits in islice(model.each_exit(images), k + 1)]


def _twin(model: MultiExitModel, device: str) -> MultiExitModel:
    """A copy to count on, in eval mode and float32, with kernels as published; on "meta" it needs no time."""
    twin = copy.deepcopy(model).to(device).eval().float().requires_grad_(False)
    tune(twin, device)
    return twin


def _uncounted(seen: set[Any]) -> list[str]:
    """Operators that look costly and have no formula in torch's registry."""
    unknown = (str(op) for op in seen if op not in flop_registry)
    return sorted(op for op in unknown if _LOOKS_COSTLY.search(op))


def _papers_cost(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """A module's cost as the published tools count it: a multiply-add is one operation.

    Convolutions without bias, linear layers with it, one per element of a ReLU, k * k per output element of a
    pooling, one per input element of a global pooling; batch norm, dropout and everything functional are
    free.
    """
    if isinstance(module, nn.Conv2d):
        return output[0].numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return sum(parameter.numel() for parameter in module.parameters())
    if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
        size = module.kernel_size
        return output.numel() * (size * size if isinstance(size, int) else size[0] ** 2)
    return inputs[0].numel() if isinstance(module, _ONE_EACH) else 0
