"""What a crosscoder's latents do for a behaviour: the running successor writes of each what the parent writes.

A latent that only the successor has is found by both models' reading of a text, and the successor's decoder row says
what it writes then. Taken back (f·(d_S − d_P) off at the site, everything after it live), a latent that carries a
behaviour takes the behaviour with it, and one that happens to be there does not. This is the causal half of a claim
that decoder norms make (halfway patching, Minder et al. 2504.02922 §3.3, asks the same from the parent's side).

One letter means one dimension: n contexts, T tokens, F latents, D the width of the successor's site.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.dictionaries.exclusive.halfway import matched
from heredity.interp.dictionaries.record import Dictionary
from heredity.interp.model import Model
from heredity.kernels import FeatureCSR, decode

from .attribution import Prompts
from .intervals import Interval, ratio
from .opacity import GROUP_TOKENS, reached
from .pairs import Pairs


@dataclass(frozen=True)
class TakenBack:
    """Share of KL(S‖P) that goes with latents: each set's, and those of random sets of as many latents as the last,
    of like activity."""

    shares: tuple[Interval, ...]
    controls: tuple[float, ...]


@torch.no_grad()
def taken_back(
    parent: Model,
    successor: Model,
    crosscoder: Dictionary,
    prompts: Prompts,
    places: Sequence[Sequence[int]],
    sets: Sequence[Sequence[int]],
    *,
    controls: int,
    seed: int,
) -> TakenBack:
    """Share of KL(S‖P), summed over ``places``, that goes when the successor writes of latents what the parent does.

    Between models of different widths the parent's rows have no place in the successor; there the latents' parts are
    taken off, which is the same for those that the parent does not write.

    Args:
        parent, successor: models that read the same tokens.
        crosscoder: of the two, model 0 the parent.
        prompts: contexts.
        places: positions of each at which the behaviour shows.
        sets: latents that are taken back together, one set after the other.
        controls: random sets beside the last of ``sets``, none of its latents among them.
        seed: of those and of the bootstrap over prompts.
    """
    pairs = Pairs(prompts.tokens, prompts.tokens, prompts.last)
    metric = reached(parent, successor, pairs, places)
    site = next(port.site for port in crosscoder.writes if port.model == 1)
    groups = [(rows, pairs.of(rows).clean) for rows in pairs.groups(GROUP_TOKENS)]
    features = [encoded(parent, successor, crosscoder, tokens) for _, tokens in groups]
    count = torch.stack([torch.bincount(f.indices.long(), minlength=crosscoder.n_latents) for f in features]).sum(0)
    generator = torch.Generator().manual_seed(seed)
    last = torch.tensor(sorted(set(sets[-1])), dtype=torch.int64)
    drawn = [matched(count, last, generator) for _ in range(controls)]
    tried = [*(torch.tensor(list(each), dtype=torch.int64) for each in sets), *drawn]

    change = crosscoder.W_dec[1]
    if crosscoder.W_dec[0].shape == change.shape:
        change = change - crosscoder.W_dec[0]
    whole, left = np.zeros(len(pairs)), np.zeros((len(tried), len(pairs)))
    for (rows, tokens), active in zip(groups, features, strict=True):
        at = rows.numpy()
        whole[at] = metric(successor.logits(tokens), rows).double().numpy()
        for k, latents in enumerate(tried):
            off = _written(active, latents, change)

            def back(value: Tensor, off: Tensor = off) -> Tensor:
                return value - off.view_as(value).to(value)

            left[k, at] = metric(successor.logits(tokens, edits={site: back}), rows).double().numpy()
    found = [ratio(whole - each, whole, seed) for each in left]
    return TakenBack(tuple(found[: len(sets)]), tuple(each.estimate for each in found[len(sets) :]))


def encoded(parent: Model, successor: Model, crosscoder: Dictionary, tokens: Tensor) -> FeatureCSR:
    """Active latents of all positions of ``tokens`` [batch, pos], row by row."""
    values = []
    for port in crosscoder.reads:
        model = successor if port.model else parent
        values.append(model.capture(tokens, [port.site])[port.site].flatten(2).flatten(0, 1).to(crosscoder.b_enc))
    return crosscoder.encode(*values)


def _written(features: FeatureCSR, latents: Tensor, rows: Tensor) -> Tensor:
    """What some latents write with decoder ``rows`` [F, D], [T, D]."""
    kept = torch.zeros(len(rows), dtype=torch.bool)
    kept[latents] = True
    return decode(features.with_values(features.values * kept[features.indices.long()]), rows)
