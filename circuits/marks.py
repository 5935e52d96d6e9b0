"""Which tokens of a context a divergence needs: replace them one by one and watch KL(S‖P) at the diverging position.

Occlusion (Zeiler & Fergus 2014; Li et al. 1612.08220), a real intervention on the input rather than a gradient.
"""

from collections.abc import Sequence

import torch

from heredity.interp.model import Model

from .behaviours import Context
from .divergence import compare, vocabulary

WINDOW = 64
"""Tokens before the diverging position that are tried."""

DRAWS = 2
"""Replacements per token, averaged."""


def token_weights(
    parent: Model, successor: Model, context: Context, pool: Sequence[int], *, seed: int, batch_tokens: int
) -> list[float] | None:
    """Per token of ``context.ids_successor``, the share of KL(S‖P) that vanishes when it is replaced by a token drawn
    from ``pool`` (ordinary text); 0 outside the window. None for models with different tokenizers."""
    vocab = vocabulary(parent, successor)
    if not vocab.same:
        return None
    ids = torch.tensor(context.ids_successor)
    tried = list(range(max(0, len(ids) - WINDOW), len(ids)))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(list(pool))[torch.randint(len(pool), (DRAWS, len(tried)), generator=generator)]
    rows = ids.repeat(DRAWS * len(tried), 1)
    for draw in range(DRAWS):
        for k, position in enumerate(tried):
            rows[draw * len(tried) + k, position] = drawn[draw, k]
    left: list[float] = []
    size = max(1, batch_tokens // len(ids))
    with torch.inference_mode():
        for chunk in rows.split(size):
            left += compare(parent.logits(chunk)[:, -1], successor.logits(chunk)[:, -1], vocab)[0].tolist()
    weights = [0.0] * len(ids)
    for k, position in enumerate(tried):
        kept = sum(left[draw * len(tried) + k] for draw in range(DRAWS)) / DRAWS
        weights[position] = max(0.0, 1 - kept / context.kl) if context.kl > 0 else 0.0
    return weights
