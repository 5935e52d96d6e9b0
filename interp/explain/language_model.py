"""Explanations written and judged by a language model, scored by the same held-out test as rules.

The model reads examples of the learning half and writes a sentence; then it is shown contexts of the other half, half
of them active, and says from the sentence alone which are (detection scoring: Paulo et al. 2024, arXiv:2410.13928).
Its answers get the same weights, bound and q as a rule's; the null is the mean over permutations of the labels among
the contexts shown.
"""

import zlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from heredity.kernels import FeatureCSR

from ..errors import one_line
from .contexts import Contexts
from .halves import halves
from .measure import SHUFFLES, enough, examples
from .record import Example, Explanation
from .score import score, weigh

SHOWN = 40
"""Active contexts, and inactive ones, that the judge sees."""


@runtime_checkable
class Explainer(Protocol):
    """Whatever can say in words what examples have in common."""

    def propose(self, examples: Sequence[Example]) -> str:
        """An explanation of where it is active, given some such places."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Whatever can apply an explanation."""

    def active(self, explanation: str, contexts: Sequence[Example]) -> list[bool]:
        """Whether ``explanation`` says that it is active at each of ``contexts`` (their activations are all 0)."""
        ...


def explain_by_model(
    features: FeatureCSR,
    contexts: Contexts,
    latents: Sequence[int],
    *,
    explainer: Explainer,
    judge: Judge,
    seed: int,
) -> list[Explanation]:
    """Explanations of ``latents`` by a language model; ``program`` is None in all of them.

    Args:
        features: T tokens by F latents.
        contexts: the same T tokens.
        latents: which.
        explainer: sees examples of the learning half only.
        judge: sees contexts of the other half only.
        seed: decides the halves and the contexts shown.

    Raises:
        ValueError: ``features`` are not of these tokens, or the judge does not answer for each context.
        HeredityError: what ``explainer`` or ``judge`` raise.
    """
    if features.n_tokens != len(contexts):
        raise ValueError(f"features of {features.n_tokens} tokens do not belong to contexts of {len(contexts)}")
    sides, view = halves(contexts, seed), features.by_latent
    out = []
    for latent in latents:
        part = slice(int(view.indptr[latent]), int(view.indptr[latent + 1]))
        activation = np.zeros(len(contexts), dtype=np.float32)
        activation[view.tokens[part].cpu().numpy()] = features.values[view.order[part]].detach().float().cpu().numpy()
        out.append(_explain(latent, activation, contexts, sides, explainer, judge, seed))
    return out


def _explain(
    latent: int,
    activation: np.ndarray,
    contexts: Contexts,
    sides: tuple[np.ndarray, np.ndarray],
    explainer: Explainer,
    judge: Judge,
    seed: int,
) -> Explanation:
    active, (first, second) = activation != 0, sides
    base = {
        "latent": latent,
        "n_active": int(active.sum()),
        "n_texts": len(np.unique(contexts.text[active])),
        "examples": examples(activation, contexts),
        "program": None,
    }
    if not all(enough(active, side, contexts) for side in sides):
        unmeasured = dict.fromkeys(("q", "balanced_accuracy", "low", "null"))
        return Explanation(status="too few contexts", rule="", **unmeasured, **base)
    rng = np.random.default_rng([seed % 2**32, zlib.crc32(activation.tobytes())])
    words = one_line(explainer.propose(examples(np.where(first, activation, 0), contexts)).strip())
    rows = _shown(active, weigh(active, second, contexts), rng)
    blank = [contexts.around(int(row)) for row in rows]
    said = judge.active(words, [Example(before=b, token=t, after=a, activation=0.0) for b, t, a in blank])
    if len(said) != len(rows):
        raise ValueError(f"the judge gave {len(said)} answers about {len(rows)} contexts")
    # Drawn in proportion to their weight, so each counts the same.
    predicted, labels, equal = np.array(said, dtype=bool), active[rows], np.full(len(rows), 2 / len(rows))
    real = score(predicted, labels, equal, contexts.text[rows])
    permuted = [score(predicted, rng.permutation(labels), equal, contexts.text[rows]) for _ in range(SHUFFLES)]
    null = float(np.mean([max(0.0, 2 * each.balanced_accuracy - 1) for each in permuted]))
    return Explanation(
        status="measured",
        rule=words,
        q=max(0.0, 2 * real.low - 1 - null),
        balanced_accuracy=real.balanced_accuracy,
        low=real.low,
        null=null,
        **base,
    )


def _shown(active: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows drawn by weight without repetition, at most ``SHOWN`` active ones and as many inactive, in random order."""
    sides = [np.flatnonzero(side & (weights > 0)) for side in (active, ~active)]
    count = min(SHOWN, *map(len, sides))
    drawn = [rng.choice(rows, count, replace=False, p=weights[rows] / weights[rows].sum()) for rows in sides]
    return rng.permutation(np.concatenate(drawn))
