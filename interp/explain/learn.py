"""A short program for where something is active: rules chosen greedily, each for what it gains beyond its length.

The program is "A, or B, or C", at most ``MOST_TERMS`` terms, each one rule or two that must both hold. A term is the
best of the ``BEAM`` most promising rules, each alone or narrowed by the rule that helps it most, on the tokens that no
earlier term holds at (sequential covering, Clark & Niblett 1989).
"""

import numpy as np

from .candidates import RULE_COST, Candidate, Catalogue, Sample
from .rules import All, Any, Promoted, Rule

MOST_TERMS = 3
BEAM = 3
LEAST_GAIN = 0.02
SAMPLED = 4096
"""Active tokens, and inactive ones, that are looked at."""


def sampled(active: np.ndarray, weights: np.ndarray, text: np.ndarray, rng: np.random.Generator) -> Sample:
    """Tokens to learn from: where there are more than ``SAMPLED`` of a side, drawn in proportion to their weight.

    Args:
        active: bool [T].
        weights: [T], of :func:`heredity.interp.explain.score.weigh`.
        text: number of each token's text, int [T].
        rng: decides the draw.
    """
    parts = []
    for side, sign in ((active, 1), (~active, -1)):
        rows = np.flatnonzero(side & (weights > 0))
        share = weights[rows]
        if len(rows) > SAMPLED:
            # One draw from each of SAMPLED equal slices of the weight.
            slices = (np.arange(SAMPLED) + rng.random(SAMPLED)) / SAMPLED * share.sum()
            drawn, times = np.unique(np.searchsorted(np.cumsum(share), slices), return_counts=True)
            drawn = np.minimum(drawn, len(rows) - 1)
            rows, share = rows[drawn], times / SAMPLED
        parts.append((rows, sign * share))
    rows = np.concatenate([rows for rows, _ in parts])
    return Sample(rows, np.concatenate([share for _, share in parts]), text[rows])


def learn(sample: Sample, catalogue: Catalogue, promoted: Promoted | None = None) -> Rule:
    """The program with the largest gain less cost that the search finds; ``Any(rules=())`` where nothing is worth it.

    Args:
        sample: tokens to learn from.
        catalogue: of the same texts.
        promoted: a further rule to consider.
    """
    terms: list[Rule] = []
    left = sample
    for _ in range(MOST_TERMS):
        if not (left.weights > 0).any():
            break
        best = _best_term(left, catalogue, promoted)
        if best is None or best.net < LEAST_GAIN:
            break
        terms.append(best.rule)
        left = left.where(~best.mask)
    return terms[0] if len(terms) == 1 else Any(rules=tuple(terms))


def _best_term(sample: Sample, catalogue: Catalogue, promoted: Promoted | None) -> Candidate | None:
    found = catalogue.candidates(sample, promoted, refining=False)
    found = sorted(found, key=lambda candidate: -candidate.net)[:BEAM]
    best = found[0] if found else None
    for candidate in found:
        # A narrower rule can at best take every wrong token away, for the cost of one rule more.
        right = float(sample.weights[candidate.mask & (sample.weights > 0)].sum())
        if best is not None and right - candidate.cost - RULE_COST > max(best.net, LEAST_GAIN):
            best = max(best, _narrowed(candidate, sample, catalogue, promoted), key=lambda c: c.net)
    return best


def _narrowed(candidate: Candidate, sample: Sample, catalogue: Catalogue, promoted: Promoted | None) -> Candidate:
    """``candidate`` and the rule that together with it gains most."""
    part = sample.where(candidate.mask)
    best = max(catalogue.candidates(part, promoted, refining=True), key=lambda c: c.net)
    mask = np.zeros(len(sample.rows), dtype=bool)
    mask[np.flatnonzero(candidate.mask)[best.mask]] = True
    return Candidate(All(rules=(candidate.rule, best.rule)), mask, best.gain, candidate.cost + best.cost)
