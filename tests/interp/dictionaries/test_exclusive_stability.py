"""Latents that come back over seeds, on copies and mixtures of one dictionary."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port
from heredity.interp.dictionaries.exclusive import stability
from heredity.interp.dictionaries.exclusive.stability import match, principal_overlap
from heredity.kernels import ReLU

PORTS = (Port("resid_post@1", 0), Port("resid_post@1", 1))
SCALES = (1.0, 1.0)
PARENT_ONLY, SUCCESSOR_ONLY = (0, 1, 2), (3, 4, 5, 6)


def crosscoder(parent: Tensor, successor: Tensor) -> Dictionary:
    return Dictionary(
        "crosscoder",
        PORTS,
        PORTS,
        (parent.T.contiguous(), successor.T.contiguous()),
        torch.zeros(len(parent), dtype=torch.float64),
        (parent, successor),
        (torch.zeros(parent.shape[1], dtype=torch.float64), torch.zeros(successor.shape[1], dtype=torch.float64)),
        ReLU(),
    )


def drawn(seed: int, n: int = 30, widths: tuple[int, int] = (24, 40)) -> Dictionary:
    """Latents 0–2 are the parent's alone, 3–6 the successor's."""
    draws = torch.Generator().manual_seed(seed)
    parent, successor = (torch.randn(n, width, generator=draws, dtype=torch.float64) for width in widths)
    successor[list(PARENT_ONLY)] = 0
    parent[list(SUCCESSOR_ONLY)] = 0
    return crosscoder(parent, successor)


def permuted(dictionary: Dictionary, seed: int) -> tuple[Dictionary, tuple[list[int], list[int]]]:
    order = torch.randperm(dictionary.n_latents, generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order).tolist()
    copy = crosscoder(dictionary.W_dec[0][order], dictionary.W_dec[1][order])
    return copy, ([place[j] for j in PARENT_ONLY], [place[j] for j in SUCCESSOR_ONLY])


def test_permuted_copies_are_stable() -> None:
    one = drawn(0)
    copies = [permuted(one, seed) for seed in (1, 2)]
    found = stability(
        [one, *(d for d, _ in copies)],
        [(PARENT_ONLY, SUCCESSOR_ONLY), *(lists for _, lists in copies)],
        scales=SCALES,
        at_least=2,
    )
    assert [each.latent for each in found.latents] == [*PARENT_ONLY, *SUCCESSOR_ONLY]
    for each in found.latents:
        assert (each.seeds, each.matched, each.in_subspace, each.stable) == (2, 2, 2, True)
        assert each.cosines == pytest.approx((1, 1))
    for model in found.overlap:
        assert model == pytest.approx((1, 1))


def test_unrelated_dictionaries_are_not() -> None:
    lists = (PARENT_ONLY, SUCCESSOR_ONLY)
    overlaps, chances = [], []
    for seed in range(40):
        found = stability([drawn(2 * seed), drawn(2 * seed + 1)], [lists, lists], scales=SCALES, at_least=1)
        assert not any(each.stable for each in found.latents)
        overlaps.append([found.overlap[m][0] for m in range(2)])
        chances.append([found.chance[m][0] for m in range(2)])
    # What is called chance is what unrelated dictionaries show on average: 3 of 24 and 4 of 40 dimensions.
    assert chances[0] == pytest.approx([3 / 24, 4 / 40])
    assert torch.tensor(overlaps).mean(0).tolist() == pytest.approx(chances[0], rel=0.15)


def test_mixed_latents_come_back_as_a_subspace() -> None:
    one = drawn(0)
    mixing = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    mixed = one.W_dec[1].clone()
    mixed[list(SUCCESSOR_ONLY)] = mixing @ torch.linalg.qr(one.W_dec[1][list(SUCCESSOR_ONLY)].T).Q.T
    lists = (PARENT_ONLY, SUCCESSOR_ONLY)
    found = stability([one, crosscoder(one.W_dec[0], mixed)], [lists, lists], scales=SCALES, at_least=1)
    of_successor = found.latents[len(PARENT_ONLY) :]
    assert sum(each.matched for each in of_successor) < 4
    assert all(each.in_subspace == 1 and each.stable for each in of_successor)
    assert found.overlap[1] == pytest.approx((1,))


def test_a_span_of_most_of_the_space_holds_nothing_in_particular() -> None:
    one, other = drawn(0), drawn(1)
    few, many = ((), tuple(range(3, 10))), ((), tuple(range(3, 30)))
    crowded = stability([one, other], [few, many], scales=SCALES, at_least=1)
    assert crowded.chance[1][0] > 0.5
    assert all(each.inside == (0.0,) and not each.stable for each in crowded.latents)


def test_only_the_latents_asked_about_are_matched() -> None:
    # One to one among themselves: two that look for one partner do not both get it.
    one = drawn(0)
    doubled = crosscoder(one.W_dec[0].clone(), one.W_dec[1].clone())
    for rows in doubled.W_dec:
        rows[4] = rows[3]
    found = stability([doubled, one], [((), (3, 4)), ((), (3,))], scales=SCALES, at_least=1)
    assert sorted(each.matched for each in found.latents) == [0, 1]
    assert all(each.in_subspace == 1 for each in found.latents), "both lie along it"


def test_at_least_counts_other_seeds() -> None:
    one, lists = drawn(0), (PARENT_ONLY, SUCCESSOR_ONLY)
    several = [one, permuted(one, 1)[0], drawn(7), drawn(8)]
    exclusive = [lists, permuted(one, 1)[1], lists, lists]
    for at_least, expected in ((1, True), (2, False)):
        found = stability(several, exclusive, scales=SCALES, at_least=at_least)
        assert {each.stable for each in found.latents} == {expected}
        assert all(each.matched == 1 and each.seeds == 3 for each in found.latents)


def test_no_exclusive_latents_elsewhere() -> None:
    one, lists = drawn(0), (PARENT_ONLY, SUCCESSOR_ONLY)
    found = stability([one, one], [lists, ((), ())], scales=SCALES, at_least=1)
    assert all(each.matched == 1 and each.in_subspace == 0 for each in found.latents)
    assert all(value != value for model in found.overlap for value in model)
    assert stability([one, one], [((), ()), lists], scales=SCALES, at_least=1).latents == ()


def test_units_weigh_the_models_alike() -> None:
    one = drawn(0)
    # The successor's activations are 1000 times larger; the parents of the two dictionaries have nothing in common.
    a = crosscoder(one.W_dec[0], one.W_dec[1] * 1000)
    b = crosscoder(drawn(9).W_dec[0], one.W_dec[1] * 1000)
    lists = ([], [20])
    raw = stability([a, b], [lists, lists], scales=SCALES, at_least=1).latents[0]
    fair = stability([a, b], [lists, lists], scales=(1.0, 1000.0), at_least=1).latents[0]
    assert raw.matched == 1
    assert fair.matched == 0


def test_matching_is_the_best_of_all() -> None:
    draws = torch.Generator().manual_seed(3)
    a, b = (torch.nn.functional.normalize(torch.randn(6, 5, generator=draws, dtype=torch.float64)) for _ in range(2))
    partner, cosine = match(a, b)
    best = max(sum(float(a[i] @ b[j]) for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    assert float(cosine.sum()) == pytest.approx(best)
    assert sorted(partner.tolist()) == list(range(6))
    partner, cosine = match(a, b[:4])
    assert (partner == -1).sum() == 2
    assert (cosine[partner == -1] == 0).all()


def test_overlap_of_known_angles() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    tilted = torch.stack([eye[0] * 0.6 + eye[2] * 0.8, eye[1]], 1)
    assert principal_overlap(eye[:, :2], tilted) == pytest.approx((0.36 + 1) / 2)
    assert principal_overlap(eye[:, :2], eye[:, 2:]) == 0
    assert principal_overlap(eye[:, :1], eye[:, :3]) == 1


def test_refusals() -> None:
    one, lists = drawn(0), (PARENT_ONLY, SUCCESSOR_ONLY)
    with pytest.raises(ValueError, match="two or more"):
        stability([one], [lists], scales=SCALES, at_least=1)
    with pytest.raises(ValueError, match="different widths"):
        stability([one, drawn(1, widths=(24, 41))], [lists, lists], scales=SCALES, at_least=1)
    with pytest.raises(ValueError, match="parent and a successor"):
        alone = replace(
            one, kind="sae", reads=PORTS[:1], writes=PORTS[:1], W_enc=one.W_enc[:1], W_dec=one.W_dec[:1],
            b_dec=one.b_dec[:1],
        )  # fmt: skip
        stability([one, alone], [lists, lists], scales=SCALES, at_least=1)
