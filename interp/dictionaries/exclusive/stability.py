"""Does a latent come back when the dictionary is trained again from another seed?

Two crosscoders of one recipe share as little as 30 % of their latents (Paulo & Belrose 2501.16615), and how many of
them look exclusive varies more still; yet latents that do not come back one by one can span a subspace that does
("Unstable features, reproducible subspaces", 2606.12138). So both are asked: is there a partner in the other seed, in
a one-to-one matching; and does the latent lie in what the other seed's exclusive latents span?

F latents, D the widths of both models together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..record import Dictionary
from .norms import check_pair
from .scaling import unit

MATCH = 0.9
"""Cosine of matched decoder rows, and length of the part of a unit row inside the other span, that count."""


@dataclass(frozen=True)
class LatentStability:
    """How often one latent of the first dictionary came back.

    Attributes:
        latent: its number in the first dictionary.
        seeds: how many other dictionaries it was looked for in.
        matched: in how many of them its partner has a cosine of at least :data:`MATCH`.
        in_subspace: in how many the exclusive latents of the same model span it.
        cosines: with the partner in each (its decoder rows of both models, one after the other).
        inside: length of its owner's row, taken as 1, inside that span in each; 0 where the span is more than half of
            the space.
        stable: whether ``matched`` or ``in_subspace`` reaches the number asked for.
    """

    latent: int
    seeds: int
    matched: int
    in_subspace: int
    cosines: tuple[float, ...]
    inside: tuple[float, ...]
    stable: bool


@dataclass(frozen=True)
class Stability:
    """Stability of exclusive latents over seeds.

    Attributes:
        latents: one record for each latent asked about.
        overlap: per model and other dictionary, the mean squared cosine of the principal angles between the spans of
            exclusive latents: 1 the same (or one inside the other), 0 orthogonal, NaN where either is empty.
        chance: per model and other dictionary, what random spans of that size would overlap by.
    """

    latents: tuple[LatentStability, ...]
    overlap: tuple[tuple[float, ...], tuple[float, ...]]
    chance: tuple[tuple[float, ...], tuple[float, ...]]


def stability(
    dictionaries: Sequence[Dictionary],
    exclusive: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    scales: tuple[float, float],
    at_least: int,
) -> Stability:
    """Which exclusive latents of the first dictionary come back in the others.

    Args:
        dictionaries: crosscoders of one pair and recipe, trained from different seeds; at least two.
        exclusive: for each, its parent-only and its successor-only latents.
        scales: the size of each model's activations (``Moments.scales``), by which their decoder rows are divided.
        at_least: in how many of the *other* dictionaries a latent must come back to be called stable.

    Raises:
        ValueError: fewer than two dictionaries, of different widths, or not one pair of lists for each.
    """
    if len(dictionaries) < 2 or len(exclusive) != len(dictionaries):
        raise ValueError("stability needs two or more dictionaries, and the exclusive latents of each")
    for each in dictionaries:
        check_pair(each)
        if each.widths != dictionaries[0].widths:
            raise ValueError(f"dictionaries of different widths: {dictionaries[0].widths} and {each.widths}")
    stacked = [_rows(each, scales) for each in dictionaries]
    asked = [latent for lists in exclusive[0] for latent in lists]
    cosines = [match(stacked[0][asked], other)[1] for other in stacked[1:]]
    spans = [
        [_span(each.W_dec[m][list(lists[m])].double()) for m in range(2)]
        for each, lists in zip(dictionaries, exclusive, strict=True)
    ]
    inside = []
    for other in spans[1:]:
        parts = [
            (unit(dictionaries[0].W_dec[m][list(exclusive[0][m])].double()) @ other[m]).norm(dim=1) for m in range(2)
        ]
        # What spans more than half of a space holds most of anything: it says nothing of a latent.
        parts = [p if 2 * span.shape[1] <= span.shape[0] else 0 * p for p, span in zip(parts, other, strict=True)]
        inside.append(torch.cat(parts))
    records = []
    for i, latent in enumerate(asked):
        of_cosine, of_span = tuple(float(c[i]) for c in cosines), tuple(float(s[i]) for s in inside)
        matched, spanned = sum(c >= MATCH for c in of_cosine), sum(s >= MATCH for s in of_span)
        stable = max(matched, spanned) >= at_least
        records.append(LatentStability(latent, len(cosines), matched, spanned, of_cosine, of_span, stable))
    overlap = [tuple(principal_overlap(spans[0][m], other[m]) for other in spans[1:]) for m in range(2)]
    chance = [tuple(_chance(spans[0][m], other[m]) for other in spans[1:]) for m in range(2)]
    return Stability(tuple(records), (overlap[0], overlap[1]), (chance[0], chance[1]))


def match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One-to-one partners with the largest sum of cosines (the Hungarian method).

    Args:
        a, b: unit rows [F, D] and [G, D].

    Returns:
        (partner of each row of ``a``, -1 where rows of ``b`` ran out, int64 [F]; cosine [F], 0 there)
    """
    from scipy.optimize import linear_sum_assignment

    cosines = a @ b.T
    rows, columns = (torch.from_numpy(each) for each in linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
    partner = torch.full((len(a),), -1, dtype=torch.int64)
    value = torch.zeros(len(a), dtype=cosines.dtype)
    partner[rows] = columns
    value[rows] = cosines.cpu()[rows, columns]
    return partner, value


def principal_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles of two subspaces, given orthonormal bases [D, n] and [D, m]."""
    smaller = min(a.shape[1], b.shape[1])
    return float((a.T @ b).square().sum()) / smaller if smaller else float("nan")


def _chance(a: Tensor, b: Tensor) -> float:
    return max(a.shape[1], b.shape[1]) / a.shape[0] if min(a.shape[1], b.shape[1]) else float("nan")


def _rows(dictionary: Dictionary, scales: tuple[float, float]) -> Tensor:
    parts = [decoder.double() / scale for decoder, scale in zip(dictionary.W_dec, scales, strict=True)]
    return unit(torch.cat(parts, dim=1))


def _span(rows: Tensor) -> Tensor:
    """Orthonormal basis [D, rank] of what rows [n, D] span."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1], 0)
    _, sizes, right = torch.linalg.svd(unit(rows), full_matrices=False)
    return right[sizes > 1e-6 * sizes[0]].T
