import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models import tune
from models.attention import Attention, CrossAttentionLayer, SelfAttentionLayer, attend_in_float32


def by_hand(layer, queries, values):
    """Softmax attention, head by head; channel index = head * (C / heads) + offset."""
    q, k, v = (
        x @ w.weight.T for x, w in ((queries, layer.q_proj), (values, layer.k_proj), (values, layer.v_proj))
    )
    if layer.embeds_keys:
        k = k + layer.relative_position_bias
    width = q.shape[-1] // layer.heads
    heads = []
    for h in range(layer.heads):
        part = slice(h * width, (h + 1) * width)
        shares = (q[..., part] @ k[..., part].mT / width**0.5).softmax(-1)
        heads.append(shares @ v[..., part])
    return torch.cat(heads, -1) @ layer.o_proj.weight.T + layer.o_proj.bias


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("num_keys", [0, 5])
@torch.no_grad()
def test_attention_by_hand(heads, num_keys):
    torch.manual_seed(0)
    layer = Attention(8, 10, 6, heads=heads, num_keys=num_keys).double()
    if num_keys:
        layer.relative_position_bias.normal_()
    queries, values = torch.randn(2, 4, 8).double(), torch.randn(2, 5, 10).double()
    assert_close(layer(queries, values), by_hand(layer, queries, values), rtol=1e-12, atol=1e-12)


def test_the_key_embedding_starts_at_zero_and_gets_a_gradient():
    layer = Attention(8, 8, 8, heads=1, num_keys=5)
    assert layer.relative_position_bias.shape == (1, 5, 8) and not layer.relative_position_bias.any()
    layer(torch.randn(2, 4, 8), torch.randn(2, 5, 8)).square().sum().backward()
    assert layer.relative_position_bias.grad.any()


def test_heads_must_share_the_channels():
    with pytest.raises(ValueError, match="10 attention channels cannot be shared by 4 heads"):
        Attention(8, 8, 10, heads=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_multiplies_in_float32_on_a_cpu(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 7, 4).to(dtype).requires_grad_() for _ in range(3))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.autocast("cpu", dtype=dtype):
        mixed = attend_in_float32(q, k, v, 0.0)
    assert mixed.dtype == dtype and torch.equal(mixed, exact.to(dtype))
    mixed.float().sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.isfinite().all() for t in (q, k, v))


@torch.no_grad()
def test_tuned_for_a_cpu_half_precision_is_multiplied_in_float32():
    torch.manual_seed(0)
    layer, tokens = SelfAttentionLayer(8, heads=2, factor=2), torch.randn(2, 4, 8)
    whole, attention = layer(tokens), layer.self_attn.attention
    tune(layer, "cpu")
    assert attention.in_float32 and torch.equal(layer(tokens), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(tokens).isfinite().all()
    tune(layer, "cuda")
    assert not attention.in_float32


@torch.no_grad()
def test_layers_add_normalised_attention_then_an_mlp():
    torch.manual_seed(0)
    layer = CrossAttentionLayer(8, 10, 4, factor=3).double()
    u, v = torch.randn(2, 4, 8).double(), torch.randn(2, 5, 10).double()
    cross, mlp = layer.cross_attn, layer.mlp
    y = u + by_hand(cross.attention, F.layer_norm(u, [8]), F.layer_norm(v, [10]))
    inner = F.gelu(F.layer_norm(y, [8]) @ mlp.fc1.weight.T + mlp.fc1.bias)
    assert inner.shape[-1] == 24
    assert_close(layer(u, v), y + inner @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=1e-12, atol=1e-12)

    layer = SelfAttentionLayer(8, heads=2, factor=2).double()
    y = u + by_hand(layer.self_attn.attention, F.layer_norm(u, [8]), F.layer_norm(u, [8]))
    assert_close(layer(u), y + layer.mlp(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [lambda p: SelfAttentionLayer(8, heads=2, factor=2, dropout=p)])
def test_dropout_acts_in_training_only(make):
    torch.manual_seed(0)
    layer, tokens = make(0.5), torch.randn(2, 4, 8)
    attention = layer.self_attn.attention
    assert not torch.equal(layer(tokens), layer(tokens))
    assert not torch.equal(attention(tokens, tokens), attention(tokens, tokens))
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))
    assert make(0.0).train().drop.p == 0
