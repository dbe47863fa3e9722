"""Pre-norm cross and self attention layers on tokens, as in Perceiver (https://arxiv.org/abs/2103.03206)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.tuning import Tunable


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with dropout on the softmax; q [B, heads, N, d], k, v [B, heads, L, d]."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def attend_in_float32(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`attend` whose half-precision inputs are multiplied in float32; the result is of their type.

    The backward pass of the CPU's kernel takes 2 to 10 times as long in half precision as in float32, with
    heads as narrow as here: there is little to multiply, and nothing that half precision would speed up.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        return attend(q, k, v, dropout)
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.float(), k.float(), v.float(), dropout).to(q.dtype)


class Attention(Tunable):
    """Multi-head attention with projections to `inner` channels, which the heads share evenly.

    `num_keys` > 0 adds a learned embedding to that many keys. Published weights call it
    relative_position_bias; it is an absolute position of the key, added before the heads are split.
    """

    def __init__(
        self,
        n_queries: int,
        n_values: int,
        inner: int,
        *,
        heads: int,
        num_keys: int = 0,
        dropout: float = 0.0,
    ) -> None:
        """`n_queries`, `n_values`: channels of the tokens that ask and of those that are read."""
        super().__init__()
        if inner % heads:
            raise UserError(f"{inner} attention channels cannot be shared by {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.in_float32 = False  # half precision, too
        self.embeds_keys = num_keys > 0
        if num_keys:
            self.relative_position_bias = nn.Parameter(torch.zeros(1, num_keys, inner))
        self.q_proj = nn.Linear(n_queries, inner, bias=False)
        self.k_proj = nn.Linear(n_values, inner, bias=False)
        self.v_proj = nn.Linear(n_values, inner, bias=False)
        self.o_proj = nn.Linear(inner, n_queries)

    def choose_kernels(self, *, on_cpu: bool, training: bool) -> None:
        """On a CPU, half precision is multiplied in float32."""
        self.in_float32 = on_cpu

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """Tokens [B, N, n_queries] and [B, L, n_values] to [B, N, n_queries]."""
        q = self.q_proj(queries)
        k = self.k_proj(values)
        v = self.v_proj(values)
        if self.embeds_keys:
            k = k + self.relative_position_bias
        # (B, heads, tokens, inner / heads)
        q, k, v = (tokens.unflatten(2, (self.heads, -1)).transpose(1, 2) for tokens in (q, k, v))
        multiply = attend_in_float32 if self.in_float32 else attend
        mixed = multiply(q, k, v, self.dropout if self.training else 0.0)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, N, inner) before the projection


class TokenMlp(nn.Module):
    """Layer norm, two linear layers, `factor` times as wide between, and a GELU: [B, N, C] to [B, N, C]."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, factor * width)
        self.fc2 = nn.Linear(factor * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(self.layernorm(tokens)))  # (B, N, factor * C)
        return self.fc2(hidden)


class _NormedCross(nn.Module):
    def __init__(self, n_queries: int, n_values: int, attention: Attention) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(n_queries)
        self.kv_norm = nn.LayerNorm(n_values)
        self.attention = attention

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        return self.attention(self.q_norm(queries), self.kv_norm(values))


class CrossAttentionLayer(nn.Module):
    """Tokens read other tokens through one head, then an MLP; both are added to what came in."""

    def __init__(
        self,
        n_queries: int,
        n_values: int,
        inner: int,
        *,
        factor: int = 1,
        num_keys: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        attention = Attention(n_queries, n_values, inner, heads=1, num_keys=num_keys, dropout=dropout)
        self.cross_attn = _NormedCross(n_queries, n_values, attention)
        self.mlp = TokenMlp(n_queries, factor)
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        """Tokens [B, N, n_queries] and [B, L, n_values] to [B, N, n_queries]."""
        queries = queries + self.drop(self.cross_attn(queries, values))
        return queries + self.drop(self.mlp(queries))


class _NormedSelf(nn.Module):
    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        return self.attention(tokens, tokens)


class SelfAttentionLayer(nn.Module):
    """Tokens [B, N, C] read each other, then an MLP `factor` times as wide inside; both are added."""

    def __init__(self, width: int, *, heads: int, factor: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn = _NormedSelf(width, Attention(width, width, width, heads=heads, dropout=dropout))
        self.mlp = TokenMlp(width, factor)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop(self.self_attn(tokens))
        return tokens + self.drop(self.mlp(tokens))
