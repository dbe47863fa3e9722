"""How the exits' losses change along a direction of the weights, by one forward-mode pass.

The pass goes over the same images as the training pass before it, at the same weights and with the same
random draws. So the results of that pass's convolutions, which its backward pass keeps anyway, need not be
computed again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Recording:
    """A pass in training mode that can be repeated with tangents."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.draws = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.devices]
        self.results: list[tuple[Tensor, int]] = []

    def first(self) -> TorchFunctionMode:
        """The context of the pass itself."""
        return _Record(self.results)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The context of the repetition: the same random draws; generators are restored afterwards."""
        with torch.random.fork_rng(self.devices), _Replay(self.results):
            torch.set_rng_state(self.draws[0])
            for device, state in zip(self.devices, self.draws[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def tangent_of(
    function: Callable[[list[Tensor]], Tensor],
    network: nn.Module,
    directions: dict[str, Tensor],
    images: Tensor,
) -> Tensor:
    """Derivative of `function(logits of all exits)` as the network's named parameters move in `directions`.

    In training mode, without changing the buffers. Raises NotImplementedError (RuntimeError for Python
    functions) if an operator has no forward-mode derivative.
    """
    # Of the attention kernels, only MATH has such a derivative.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _BatchNorm():
        duals = {name: p.detach() for name, p in network.named_parameters()}
        duals |= {
            name: forward_ad.make_dual(duals[name], direction) for name, direction in directions.items()
        }
        return forward_ad.unpack_dual(
            function(functional_call(network, duals | buffers_of(network), images))
        ).tangent


def buffers_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, for a pass in training mode that does not change them."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


class _Record(TorchFunctionMode):
    def __init__(self, results: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.results = results

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            self.results.append((result.detach(), result._version))
        return result


class _Replay(TorchFunctionMode):
    def __init__(self, results: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.results = iter(results)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        if func is not torch.conv2d:
            return func(*args, **(kwargs or {}))
        result, version = next(self.results, (None, 0))
        if result is None or result._version != version:  # overwritten in place
            return func(*args, **(kwargs or {}))
        return _convolution(result, *args, **(kwargs or {}))


def _convolution(
    result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest, **options
) -> Tensor:
    """A convolution of dual numbers whose value is known."""
    (x, dx), (weight, dweight) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
    dbias = None if bias is None else forward_ad.unpack_dual(bias).tangent
    terms = [] if dbias is None else [dbias[:, None, None]]
    if dx is not None:
        terms.append(torch.conv2d(dx, weight, None, *rest, **options))
    if dweight is not None:
        terms.append(torch.conv2d(x, dweight, None, *rest, **options))
    return forward_ad.make_dual(result, sum(terms).expand_as(result).to(result.dtype)) if terms else result


class _BatchNorm(TorchFunctionMode):
    """In half precision by its own kernels: PyTorch's rule is a dozen passes, which convert there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        half = func is F.batch_norm and args and args[0].dtype.itemsize == 2
        dual = half and forward_ad.unpack_dual(args[0]).tangent is not None
        return (_batch_norm if dual else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Of dual numbers. The result's derivative by `x` is symmetric: forward it is what it is backward."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    options = None, None, True, momentum, eps
    (x, dx), (weight, dweight), (bias, dbias) = (
        (None, None) if one is None else forward_ad.unpack_dual(one) for one in (x, weight, bias)
    )
    y, mean, scale = torch.native_batch_norm(x, weight, bias, *options)
    backward = torch.ops.aten.native_batch_norm_backward
    dx = dx.to(x.dtype)  # PyTorch's own rules may have made it more precise
    dy = backward(dx, x, weight, None, None, mean, scale, True, eps, (True, False, False))[0]
    if dweight is not None:
        dy += torch.native_batch_norm(x, dweight, dbias, *options)[0]
    elif dbias is not None:
        dy += dbias.view(-1, *[1] * (x.dim() - 2))
    return forward_ad.make_dual(y, dy)
