import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from models.layers import pooled_residual


@pytest.mark.parametrize(("size", "kernel"), [((14, 14), 7), ((7, 7), 7), ((28, 14), 3), ((21, 35), 5)])
def test_pooled_residual_is_what_it_replaces(size, kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=4).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    asked = [x, *conv.parameters()]
    plain = F.adaptive_avg_pool2d(x + conv(x), 7)
    weights = torch.randn_like(plain)
    at_once = pooled_residual(x, conv, 7)
    assert_close(at_once, plain, rtol=1e-10, atol=1e-10)
    pairs = [torch.autograd.grad((y * weights).sum(), asked) for y in (at_once, plain)]
    for ours, theirs in zip(*pairs, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_pooled_residual_computes_in_the_weights_type_under_autocast():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 2, 7, padding=3, groups=2), torch.randn(2, 2, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pooled_residual(x, conv, 7)
    assert_close(pooled, pooled_residual(x, conv, 7), rtol=0, atol=0)
