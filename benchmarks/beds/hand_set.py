"""Two layers of attention set by hand to copy what followed the current token before: an induction circuit.

The residual stream has a place for each thing the heads write, so that the circuit is what the weights say and nothing
else: tokens, positions, the token before (written by head 0.0), and the answer (written by head 1.0). The other heads
attend at random and write a little of everything everywhere, so that edges outside the circuit have small effects
rather than none. ``sharpness`` multiplies queries: at 30 the softmax is saturated, and its gradient is 0.
"""

import torch
from torch import Tensor

from heredity.interp.model import Model

from .model import BedConfig, bed

D_VOCAB, LENGTH = 8, 8
LITTLE = 0.01
"""Standard deviation of what the other heads write, where the circuit writes 1."""


def induction(sharpness: float) -> Model:
    """The model; token 0 only ever stands first, and is looked at where nothing matches."""
    d_head = D_VOCAB + 1
    width = 3 * D_VOCAB + LENGTH
    model = bed(BedConfig(2, 2, width, d_head, 1, D_VOCAB, D_VOCAB, LENGTH, activation="relu"))
    token, position = slice(0, D_VOCAB), slice(D_VOCAB, D_VOCAB + LENGTH)
    before, answer = (slice(position.stop + i * D_VOCAB, position.stop + (i + 1) * D_VOCAB) for i in range(2))
    inner = model.bridge
    eye = torch.eye(D_VOCAB)
    inner.embed.original_component.weight[:, token] = eye
    inner.position[:, position] = torch.eye(LENGTH)
    root = d_head**0.5
    shift = torch.eye(LENGTH).roll(-1, 0)  # at position p, look for p − 1
    shift[-1] = 0
    for layer in range(2):
        attention = inner.blocks[layer].attn
        q, k, v = (getattr(attention, kind).original_component for kind in "qkv")
        o = attention.o.original_component
        if layer == 0:
            q.weight[:LENGTH, position] = sharpness * root * shift
            k.weight[:LENGTH, position] = torch.eye(LENGTH)
        else:
            q.weight[:D_VOCAB, token] = sharpness * root * eye
            k.weight[:D_VOCAB, before] = eye
            # The first token is half as good as a match, and is no answer.
            q.bias[D_VOCAB] = sharpness * root / 2
            k.weight[D_VOCAB, token.start] = 1
        v.weight[:D_VOCAB, token] = eye
        o.weight[answer if layer else before, :D_VOCAB] = eye
        # The other head: random patterns, values of tokens, written everywhere.
        generator = torch.Generator().manual_seed(layer)
        for linear in (q, k):
            linear.weight[d_head:, token] = torch.randn(d_head, D_VOCAB, generator=generator)
        v.weight[d_head : d_head + D_VOCAB, token] = eye
        o.weight[:, d_head:] = LITTLE * torch.randn(width, d_head, generator=generator)
    inner.unembed.weight[:, answer] = 10 * eye
    inner.unembed.weight[0] = 0
    return model


EDGES = {
    ("embed", "attn_v@0.0"),
    ("embed", "attn_q@1.0"),
    ("embed", "attn_v@1.0"),
    ("attn_head@0.0", "attn_k@1.0"),
    ("attn_head@1.0", "logits"),
}
"""What depends on the tokens; positions are the same in both prompts of a pair."""


def prompts(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clean prompts, whose last token came before at the third or the fifth place, and others with another answer.

    In a third of them another token is last; in a third the last token came at the other of the two places; in a third
    the tokens after the two places are exchanged. So queries, keys and values all have their turn.
    """
    order = torch.rand(n, D_VOCAB - 1, generator=generator).argsort(1) + 1
    clean = torch.cat([torch.zeros(n, 1, dtype=torch.int64), order[:, : LENGTH - 2], order[:, :1]], 1)
    rows = torch.arange(n)
    place = 2 + 2 * torch.randint(2, (n,), generator=generator)
    other = 6 - place
    clean[rows, place], clean[rows, 1] = clean[rows, 1].clone(), clean[rows, place].clone()
    corrupt = clean.clone()
    kind = torch.randint(3, (n,), generator=generator)
    corrupt[:, -1] = torch.where(kind == 0, clean[rows, other], clean[:, -1])
    for which, step in ((1, 0), (2, 1)):
        chosen = rows[kind == which]
        a, b = (place + step)[chosen], (other + step)[chosen]
        corrupt[chosen, a], corrupt[chosen, b] = clean[chosen, b], clean[chosen, a]
    return clean, corrupt
