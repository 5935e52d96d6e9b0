"""How well a rule predicts activity: balanced accuracy against negatives that are hard to tell, and its lower bound.

**Balanced accuracy** is the mean of the share of active tokens that the rule finds and the share of inactive tokens
that it leaves out. Against ordinary text the second share is near 1 for any rule that rarely holds, so "a noun" would
pass for the explanation of a latent that is active on one noun in five. Inactive tokens are therefore weighted. For
each active token there is, as far as there are any, (1) one inactive occurrence of the same token id, (2) one inactive
token after the same token id, (3) one inactive token at most ``NEAR`` places away; each of these kinds makes up at
most ``HARD_SHARE`` of the weight, and the rest is spread evenly over all inactive tokens. A latent that is active on
all occurrences of a token has none of the first kind and loses nothing by that; one that misses 5 % of them has 5 % of
the weight there.

**The bound** treats texts, not tokens, as independent: a linearised (delta-method) standard error of the two ratios
over texts, after adding one text of average size of which the rule gets half right. The added text keeps a rule without
error on few texts from being certain: on n texts it costs 0.5/n of balanced accuracy and 0.5/n of standard error, which
together is near the exact bound for n successes.
"""

from dataclasses import dataclass

import numpy as np

from .contexts import Contexts

NEAR = 2
HARD_SHARE = 0.3
ONE_SIDED_95 = 1.6449


@dataclass(frozen=True)
class Score:
    """Balanced accuracy and its one-sided lower 95 % bound."""

    balanced_accuracy: float
    low: float


def weigh(active: np.ndarray, within: np.ndarray, contexts: Contexts) -> np.ndarray:
    """Weight of each token, float64 [T]: those active sum to 1, those inactive too; 0 outside ``within``.

    Args:
        active: bool [T].
        within: bool [T], the tokens that count.
        contexts: the texts.
    """
    on, off = active & within, ~active & within
    n = int(on.sum())
    near = (_spread(on, contexts) & off).astype(np.float64)
    weights, left = np.zeros(len(active)), 1.0
    for hard in (_matched(contexts.ids, on, off), _matched(contexts.shifted(-1), on, off), near):
        if total := hard.sum():
            share = min(HARD_SHARE, total / n)
            weights += hard * (share / total)
            left -= share
    weights[off] += left / max(int(off.sum()), 1)
    weights[on] = 1 / n
    return weights


def score(predicted: np.ndarray, active: np.ndarray, weights: np.ndarray, text: np.ndarray) -> Score:
    """Score of a prediction.

    Args:
        predicted, active: bool [T].
        weights: [T], of :func:`weigh`.
        text: number of the text each token belongs to, int [T].
    """
    found, actives = (np.bincount(text, weights * rows) for rows in (predicted & active, active))
    rejected, inactives = (np.bincount(text, weights * rows) for rows in (~predicted & ~active, ~active))
    balanced = (found.sum() / actives.sum() + rejected.sum() / inactives.sum()) / 2
    # The added text: the mean active and inactive weight of the texts that have any active token.
    n = int((actives > 0).sum())
    parts = []
    for right, total in ((found, actives), (rejected, inactives)):
        right, total = np.append(right, total.sum() / n / 2), np.append(total, total.sum() / n)
        share = right.sum() / total.sum()
        parts.append((share, (right - share * total) / total.sum()))
    (hits, hit_error), (passes, pass_error) = parts
    error = np.sqrt((((hit_error + pass_error) / 2) ** 2).sum() * (n + 1) / n)
    return Score(float(balanced), float((hits + passes) / 2 - ONE_SIDED_95 * error))


def _matched(values: np.ndarray, on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """Weight of each token of ``off`` when each of ``on`` is paired with one of the same value: float64 [T]."""
    codes = values - values.min(initial=0)
    on_by_value, off_by_value = (
        np.bincount(codes[rows], minlength=int(codes.max(initial=0)) + 1) for rows in (on, off)
    )
    return np.where(off, (np.minimum(on_by_value, off_by_value) / np.maximum(off_by_value, 1))[codes], 0.0)


def _spread(rows: np.ndarray, contexts: Contexts) -> np.ndarray:
    """Tokens at most ``NEAR`` places from one of ``rows`` in the same text: bool [T]."""
    out = np.zeros(len(rows), dtype=bool)
    at = np.flatnonzero(rows)
    for offset in (o for o in range(-NEAR, NEAR + 1) if o):
        to = at + offset
        inside = (to >= contexts.starts[contexts.text[at]]) & (to < contexts.starts[contexts.text[at] + 1])
        out[to[inside]] = True
    return out
