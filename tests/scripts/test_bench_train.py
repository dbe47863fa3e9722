"""What the benchmark of a training step compares is the same computation."""

import pytest
import torch
from torch.testing import assert_close

from models import attention
from models.attention import attend


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "width"), [(4, 32, 32, 26), (1, 128, 49, 32), (1, 60, 16, 5)]
)
def test_the_plain_attention_is_the_fused_one(script, heads, queries, keys, width):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, width, dtype=torch.float64) for n in (queries, keys, keys))
    assert_close(
        script("bench_train").plain_attend(q, k, v, 0.0), attend(q, k, v, 0.0), rtol=1e-12, atol=1e-12
    )


def test_a_row_for_every_variant(printed, script):
    words = "--model reg400m_perceiver_t32 --depth_factor 1 1 1 1 --batch_size 2 --input_size 32 --rounds 1"
    text = printed("bench_train", *words.split(), "--device", "cpu", "--product", 64)
    rows = [line[:10] for line in text.splitlines()[-7:-3]]
    assert rows == ["plain fp32", "plain bf16", "ours fp32 ", "ours bf16 "]
    assert "plain fp32 / ours bf16: " in text
    assert attention.attend is attend  # all is as it was


def test_another_network_differs_in_the_optimizer_only(printed):
    words = (
        "--model cifar_resnet --depth 8 --batch_size 2 --input_size 32 --rounds 1 --device cpu --product 64"
    )
    assert "in fp32, of the largest logit: 0.0e+00" in printed("bench_train", *words.split())
