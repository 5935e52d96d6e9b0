"""The zoo's Llama, written out: a plain forward over a dictionary of arrays, several times quicker to train at this
size than the transformers module it is saved as.

Shapes: L layers, V words, D width, H heads, K key-value heads, E head width, M hidden width of the MLP; b rows, t
positions. Weights of all layers are stacked along a first dimension L.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import CONTEXT, WORDS

Weights = dict[str, Tensor]
EPSILON = 1e-5
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Size:
    """Dimensions of a network."""

    layers: int = 3
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 128
    theta: float = 10000.0

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


def initial(size: Size, seed: int) -> Weights:
    """Fresh weights, drawn from ``seed``: normal with standard deviation 1/sqrt(fan-in), norms one."""
    draw = torch.Generator().manual_seed(seed)
    n, d, m, kv = size.layers, size.width, size.hidden, size.kv_heads * size.head

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * (scale / shape[-1] ** 0.5)

    depth = (2 * n) ** -0.5
    return {
        "embed": normal(len(WORDS), d, scale=d**0.5 * 0.5),
        "unembed": normal(len(WORDS), d, scale=0.5),
        "q": normal(n, d, d),
        "k": normal(n, kv, d),
        "v": normal(n, kv, d),
        "o": normal(n, d, d, scale=depth),
        "gate": normal(n, m, d),
        "up": normal(n, m, d),
        "down": normal(n, d, m, scale=depth),
    }


class _Normed(torch.autograd.Function):
    """RMS normalisation (Zhang and Sennrich 2019) without a gain: autograd's own takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + EPSILON).rsqrt_()
        out = x * scale
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        out, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, out).unsqueeze(-1) / -out.shape[-1]
        return torch.addcmul(grad, out, along).mul_(scale)


def normed(x: Tensor) -> Tensor:
    """``x`` [..., D] over its root mean square."""
    return _Normed.apply(x)  # type: ignore[return-value]


def rotations(size: Size) -> Tensor:
    """Unit complex numbers [t, E/2] of the rotary embedding (Su et al. 2021)."""
    frequency = 1.0 / size.theta ** (torch.arange(0, size.head, 2).float() / size.head)
    angle = torch.outer(torch.arange(CONTEXT).float(), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def forward(weights: Weights, size: Size, ids: Tensor) -> Tensor:
    """Logits [b, t, V] for token ids [b, t]; position ``i`` predicts token ``i + 1``."""
    turn = rotations(size)[: ids.shape[1]]
    x = F.embedding(ids, weights["embed"])
    for q, k, v, o, gate, up, down in zip(*(weights[name].unbind(0) for name in MATRICES), strict=True):
        x = x + F.linear(_attention(torch.cat([q, k, v]), size, normed(x), turn), o)
        gated, carried = F.linear(normed(x), torch.cat([gate, up])).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gated) * carried, down)
    return F.linear(normed(x), weights["unembed"])


def _attention(weight: Tensor, size: Size, x: Tensor, turn: Tensor) -> Tensor:
    rows, length, _ = x.shape
    mixed = F.linear(x, weight).view(rows, length, -1, size.head).transpose(1, 2)
    turned, values = mixed.split([size.heads + size.kv_heads, size.kv_heads], dim=1)
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))
    query, key = torch.view_as_real(pairs * turn).flatten(-2).split([size.heads, size.kv_heads], dim=1)
    out = F.scaled_dot_product_attention(query, key, values, is_causal=True, enable_gqa=size.kv_heads < size.heads)
    return out.transpose(1, 2).reshape(rows, length, -1)
