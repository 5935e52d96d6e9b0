"""Halfway patching: how much of what the successor does differently runs through a set of latents.

The successor's upper layers run on the parent's activations at the dictionary's site, to which the chosen latents add
the difference of their two decoder rows (Minder et al. 2504.02922, §3.3):

    h = h_P + Σ_{j∈S} f_j (d_j^S − d_j^P)

With no latents that is the parent's lower half under the successor's upper half; its KL to the successor is the gap. A
set is worth what it closes of the gap beyond random sets of latents that are as often active.

F latents, D the width of both models, V tokens of the vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.kernels import FeatureCSR, decode

from ...errors import DictionaryError
from ...model import Encoded, Model, pad
from ..record import Dictionary
from .norms import check_pair

FIRST = 9
"""How many tokens at the start are scored on their own: there a chat model departs most (Minder et al., §3.3)."""
BOOTSTRAPS = 2000
WINDOW = 16
"""A control is drawn from this many latents of nearest activity."""


@dataclass(frozen=True)
class GapClosed:
    """Share of the KL gap that a set closes: 1 all, 0 none, below 0 it widens the gap; NaN without a gap.

    Attributes:
        share: over all texts.
        low, high: 95 % percentile bootstrap interval over texts.
        gap: KL(successor ‖ parent's lower half) per token, nats.
        left: KL(successor ‖ patched) per token, nats.
        controls: share closed by each random set.
    """

    share: float
    low: float
    high: float
    gap: float
    left: float
    controls: tuple[float, ...]


@dataclass(frozen=True)
class Halfway:
    """The score of a set of latents.

    Attributes:
        latents: the set.
        all_tokens: over all tokens.
        first_tokens: over the first :data:`FIRST` tokens of each text.
        n_texts, n_tokens: how many were scored.
    """

    latents: tuple[int, ...]
    all_tokens: GapClosed
    first_tokens: GapClosed
    n_texts: int
    n_tokens: int


@torch.no_grad()
def halfway(
    parent: Model,
    successor: Model,
    dictionary: Dictionary,
    texts: Sequence[Encoded],
    latents: Collection[int],
    *,
    seed: int,
    controls: int = 10,
    batch: int = 8,
) -> Halfway:
    """The share of the gap between parent and successor that ``latents`` close at the dictionary's site.

    Args:
        parent, successor: of one width and vocabulary.
        dictionary: a crosscoder of the two at one site.
        texts: as both models read them.
        latents: the set S.
        seed: of the controls and the bootstrap.
        controls: how many random sets of the same size, outside S and matched by how often they are active.
        batch: texts per forward.

    Raises:
        DictionaryError: the models or the dictionary do not fit one another.
        ValueError: no texts, or a latent that the dictionary does not have.
    """
    site = _site(parent, successor, dictionary)
    chosen = torch.tensor(sorted(set(latents)), dtype=torch.int64)
    if not texts:
        raise ValueError("no texts to score")
    if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < dictionary.n_latents:
        raise ValueError(f"latents must lie in [0, {dictionary.n_latents})")
    device = next(successor.bridge.original_model.parameters()).device
    groups = [pad([text.ids for text in texts[i : i + batch]]) for i in range(0, len(texts), batch)]
    groups = [(tokens.to(device), mask.to(device)) for tokens, mask in groups]
    count = torch.zeros(dictionary.n_latents, dtype=torch.int64)
    for tokens, mask in groups:
        features, _ = _features(parent, successor, dictionary, site, tokens)
        real = mask.flatten().to(features.values.device)[features.tokens]
        count += torch.bincount(features.indices.long()[real], minlength=dictionary.n_latents).cpu()
    generator = torch.Generator().manual_seed(seed)
    sets = [chosen[:0], chosen, *(matched(count, chosen, generator) for _ in range(controls))]
    sums = [_divergence(parent, successor, dictionary, site, *group, sets) for group in groups]
    kl, first = torch.cat([s[0] for s in sums]), torch.cat([s[1] for s in sums])
    n = torch.tensor([len(text.ids) for text in texts], dtype=torch.float64)
    return Halfway(
        latents=tuple(chosen.tolist()),
        all_tokens=_closed(kl, n, generator),
        first_tokens=_closed(first, n.clamp_max(FIRST), generator),
        n_texts=len(texts),
        n_tokens=int(n.sum()),
    )


def _site(parent: Model, successor: Model, dictionary: Dictionary) -> str:
    check_pair(dictionary)
    sites = {port.site for port in dictionary.reads}
    a, b = parent.shape, successor.shape
    if len(sites) > 1:
        problem = f"it reads {' and '.join(sorted(sites))}: one model's activations cannot stand in for the other's"
    elif (a.d_model, a.d_vocab) != (b.d_model, b.d_vocab):
        problem = f"widths or vocabularies differ: {a.d_model}, {a.d_vocab} and {b.d_model}, {b.d_vocab}"
    elif dictionary.widths[0] != dictionary.widths[1]:
        problem = f"it reads activations of widths {dictionary.widths[0]} and {dictionary.widths[1]}"
    else:
        return sites.pop()
    raise DictionaryError(
        problem, where=f"halfway patching of {dictionary!r}", remedy="Use models and a site of one width."
    )


def _features(
    parent: Model, successor: Model, dictionary: Dictionary, site: str, tokens: Tensor
) -> tuple[FeatureCSR, Tensor]:
    """Active latents of all positions, row by row, and the parent's activations [batch, pos, D]."""
    there = [model.capture(tokens, [site])[site] for model in (parent, successor)]
    return dictionary.encode(*[x.flatten(0, 1).to(dictionary.b_enc) for x in there]), there[0]


def _divergence(
    parent: Model, successor: Model, dictionary: Dictionary, site: str, tokens: Tensor, mask: Tensor, sets: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ KL(successor ‖ patched) of each text with each set, over all and over the first tokens: [batch, sets] each."""
    features, base = _features(parent, successor, dictionary, site, tokens)
    change = dictionary.W_dec[1] - dictionary.W_dec[0]
    truth = successor.logits(tokens).double().log_softmax(-1)
    early = mask & (torch.arange(mask.shape[1], device=mask.device) < FIRST)
    out, out_first = [], []
    for latents in sets:
        kept = torch.zeros(dictionary.n_latents, dtype=torch.bool, device=change.device)
        kept[latents.to(change.device)] = True
        values = features.values * kept[features.indices.long()]
        added = decode(features.with_values(values), change).view_as(base).to(base)
        patched = successor.logits(tokens, edits={site: lambda _, to=base + added: to}).double().log_softmax(-1)
        kl = (truth.exp() * (truth - patched)).sum(-1).clamp_min(0)
        out.append((kl * mask).sum(1))
        out_first.append((kl * early).sum(1))
    return torch.stack(out, 1).cpu(), torch.stack(out_first, 1).cpu()


def matched(count: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """A random set of the size of ``chosen`` outside it: for each latent one of those of nearest activity, once."""
    free = torch.ones(len(count), dtype=torch.bool)
    free[chosen] = False
    # Latents that are never active would be no control at all.
    free &= (count > 0) | (count[chosen].sum() == 0)
    picked = []
    for latent in chosen[torch.randperm(len(chosen), generator=generator)].tolist():
        left = free.nonzero()[:, 0]
        if not len(left):
            break
        near = (count[left] - count[latent]).abs().sort(stable=True).indices[:WINDOW]
        pick = int(left[near[torch.randint(len(near), (), generator=generator)]])
        free[pick] = False
        picked.append(pick)
    return torch.tensor(picked, dtype=torch.int64)


def _closed(kl: Tensor, n: Tensor, generator: torch.Generator) -> GapClosed:
    """From sums per text [texts, sets] (none, the set, controls) and tokens per text."""
    rows = torch.randint(len(kl), (BOOTSTRAPS, len(kl)), generator=generator)
    drawn = kl[:, :2][rows].sum(1)
    low, high = torch.quantile(1 - drawn[:, 1] / drawn[:, 0], torch.tensor([0.025, 0.975], dtype=kl.dtype)).tolist()
    total = kl.sum(0)
    share = (1 - total / total[0]).tolist()
    left = (total / n.sum()).tolist()
    return GapClosed(share[1], low, high, left[0], left[1], tuple(share[2:]))
