"""Opacity along an episode: what is said behind one token may run through other parts than what is said behind another.

The 2×2 of :mod:`.opacity_runs` is run once, and what its runs reach of the divergence is kept for every token behind
which the models part. Ω of the whole episode is the mean of its steps' Ω, weighted by their shares of the effect.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model

from .opacity import reached_at
from .opacity_estimate import FEWEST, Opacity, estimate
from .opacity_prompts import Episodes
from .opacity_runs import Contrast, two_by_two
from .opacity_split import Split
from .pairs import Pairs

SAID = 4
"""Continuations named of each step."""


@dataclass(frozen=True)
class Step:
    """What the successor says behind one token.

    Attributes:
        token: id of the token read last.
        says: ids that the successor says most often there, the commonest first.
        share: of the episode's effect, which all steps share out.
        opacity: over the prompts that hold it.
    """

    token: int
    says: tuple[int, ...]
    share: float
    opacity: Opacity


def opacity_by_step(
    contrast: Contrast,
    parent: Model,
    successor: Model,
    episodes: Episodes,
    splits: Sequence[Split],
    *,
    most: int,
    fewest: int = FEWEST,
    seed: int = 0,
) -> tuple[Step, ...]:
    """The ``most`` tokens behind which most of the effect lies, each with its Ω; without those that too few prompts
    hold, or at which the effect is not told from 0.

    Args:
        contrast: of the models over the episodes (:func:`.opacity.contrast_of_models`).
        parent, successor: the models.
        episodes: prompts, and where in each the models part.
        splits: what is explained, and the same with q drawn from its uncertainty.
        most: steps at most.
        fewest: prompts below which a step is left out.
        seed: of the bootstrap.
    """
    rows = episodes.prompts.tokens.tolist()
    read = [[row[place] for place in places] for row, places in zip(rows, episodes.places, strict=True)]
    tokens = sorted({token for each in read for token in each})
    column = [torch.tensor([tokens.index(token) for token in each]) for each in read]
    pairs = Pairs(episodes.prompts.tokens, episodes.prompts.tokens, episodes.prompts.last)
    values = reached_at(parent, successor, pairs, episodes.places)

    def by_token(logits: Tensor, rows: Tensor) -> Tensor:
        out = torch.zeros(len(rows), len(tokens), dtype=torch.float64)
        for k, (row, found) in enumerate(zip(rows.tolist(), values(logits, rows), strict=True)):
            out[k].index_add_(0, column[row], found.double().cpu())
        return out

    outcomes = [two_by_two(replace(contrast, metric=by_token), split)[0] for split in splits]
    gap = (outcomes[0]["11"] - outcomes[0]["00"]).sum(0)
    out: list[Step] = []
    for number in np.argsort(-gap, kind="stable").tolist():
        at = np.array([bool((each == number).any()) for each in column])
        if len(out) == most or at.sum() < fewest:
            continue
        found = estimate(
            [{run: v[at, number] for run, v in each.items()} for each in outcomes], fewest=fewest, seed=seed
        )
        if isinstance(found, Opacity):
            said = Counter(
                word
                for each, words in zip(read, episodes.says, strict=True)
                for token, word in zip(each, words, strict=True)
                if token == tokens[number]
            )
            says = tuple(word for word, _ in said.most_common(SAID))
            out.append(Step(tokens[number], says, float(gap[number] / gap.sum()), found))
    return tuple(out)
