"""A dictionary of what differs read as a crosscoder: against regressions one by one, and on concepts that are known."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port
from heredity.interp.dictionaries.exclusive import delta_norm, exclusives, paired, reconciled
from heredity.kernels import BatchTopK, JumpReLU

PORTS = (Port("resid_post@1"),)
WIDTH, CONCEPTS = 64, 48
NEW, LOST, WEAKER, TURNED = range(4)


def in_batches(arrays: tuple[Tensor, Tensor], size: int = 700) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(arrays[0]), size):
        yield arrays[0][start : start + size], arrays[1][start : start + size]


def random_sae(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Dictionary:
    draws = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)

    rows, rule = random(n, width), JumpReLU(1.0)
    return Dictionary("sae", PORTS, PORTS, (random(width, n),), random(n), (rows,), (random(width),), rule)


@pytest.mark.parametrize(("tokens", "n", "width"), [(63, 17, 5), (1000, 40, 12)])
def test_rows_are_slopes_and_nothing_else_changes(tokens: int, n: int, width: int) -> None:
    draws = torch.Generator().manual_seed(tokens)
    parent, successor = (torch.randn(tokens, width, generator=draws, dtype=torch.float64) + 3 for _ in range(2))
    difference = random_sae(n, width, seed=n)
    found = paired(difference, in_batches((parent, successor), 50))
    f = difference.encode(successor - parent).to_dense()
    assert torch.allclose(found.encode(parent, successor).to_dense(), f)
    for m, x in enumerate((parent, successor)):
        for j in (f.std(0) > 0).nonzero()[:, 0].tolist():
            slope = np.polyfit(f[:, j].numpy(), x.numpy(), 1)[0]
            assert found.W_dec[m][j].numpy() == pytest.approx(slope, abs=1e-9)
    # What the models hold on average is what is reconstructed on average.
    for x, out in zip((parent, successor), found.reconstruct(parent, successor), strict=True):
        assert torch.allclose(out.mean(0), x.mean(0))


def test_batches_do_not_matter() -> None:
    x = (torch.randn(333, 8), torch.randn(333, 8))
    difference = random_sae(20, 8, seed=1, dtype=torch.float32)
    whole, parts = paired(difference, [x]), paired(difference, in_batches(x, 50))
    assert whole.W_dec[0].dtype == torch.float32
    for a, b in zip((*whole.W_dec, *whole.b_dec), (*parts.W_dec, *parts.b_dec), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_latent_that_is_never_active_writes_nothing() -> None:
    difference = random_sae(20, 8, seed=1)
    difference.b_enc[3] = -1e6
    found = paired(difference, [(torch.randn(99, 8).double(), torch.randn(99, 8).double())])
    assert all(bool((rows[3] == 0).all()) for rows in found.W_dec)
    assert all(bool(rows.isfinite().all()) for rows in found.W_dec)


def models(seed: int = 0, tokens: int = 6000) -> tuple[tuple[Tensor, Tensor], Dictionary]:
    """Activations with one new, one lost, one weaker and one turned concept, and an SAE of what differs.

    The other concepts are shared. A turned concept leaves two directions in the difference; the SAE has both in one.
    """
    draws = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draws)).Q
    sizes = torch.ones(2, CONCEPTS)
    sizes[0, NEW] = sizes[1, LOST] = 0
    sizes[1, WEAKER] = 0.4
    z = (torch.rand(tokens, CONCEPTS, generator=draws) < 0.08) * (0.5 + torch.rand(tokens, CONCEPTS, generator=draws))
    rows = [basis[:CONCEPTS], basis[:CONCEPTS].clone()]
    rows[1][TURNED] = basis[CONCEPTS]
    x = [
        (z * size) @ row + 0.01 * torch.randn(tokens, WIDTH, generator=draws)
        for size, row in zip(sizes, rows, strict=True)
    ]
    change = sizes[1, :4, None] * rows[1][:4] - sizes[0, :4, None] * rows[0][:4]
    return (x[0], x[1]), Dictionary(
        kind="sae",
        reads=PORTS,
        writes=PORTS,
        W_enc=((change / change.square().sum(1, keepdim=True)).T.contiguous(),),
        b_enc=torch.zeros(4),
        W_dec=(change,),
        b_dec=(torch.zeros(WIDTH),),
        activation=JumpReLU(0.3),
    )


def test_only_what_is_new_is_the_successors_and_only_what_is_lost_the_parents() -> None:
    x, difference = models()
    found = exclusives(paired(difference, in_batches(x)), in_batches(x))
    verdicts = [v.verdict for v in found.latents]
    assert verdicts[NEW] == "successor-only"
    assert verdicts[LOST] == "parent-only"
    assert "only" not in verdicts[WEAKER]
    assert "only" not in verdicts[TURNED]


def test_what_grew_is_told_from_what_is_new_by_the_norm() -> None:
    x, difference = models(seed=4)
    delta = delta_norm(paired(difference, in_batches(x)))
    assert delta[NEW] == pytest.approx(1, abs=0.06)
    assert delta[LOST] == pytest.approx(0, abs=0.06)
    assert delta[WEAKER] == pytest.approx((0.4 - 1) / 2 + 0.5, abs=0.06)
    assert delta[TURNED] == pytest.approx(0.5, abs=0.06)


def test_a_crosscoder_that_found_it_in_both_overrules_a_difference() -> None:
    x, difference = models()
    pair = paired(difference, in_batches(x))
    found = exclusives(pair, in_batches(x))
    # As a crosscoder: one with the direction of NEW in both models, and of LOST in the parent alone.
    crosscoder = replace(pair, W_dec=tuple(rows.clone() for rows in pair.W_dec))
    crosscoder.W_dec[0][NEW] = crosscoder.W_dec[1][NEW] = pair.W_dec[1][NEW]
    verdicts = [replace(v, verdict="shared" if v.latent == NEW else v.verdict) for v in found.latents]
    known = replace(found, latents=tuple(verdicts))
    new, lost, *others = reconciled(pair, found, crosscoder, known).latents
    assert (new.verdict, new.reason) == ("shared", f"latent {NEW} of the crosscoder is it, and is shared")
    assert lost == found.latents[LOST]
    assert tuple(others) == found.latents[2:]
    # The same direction, of a concept that is not shared, says nothing.
    assert reconciled(pair, found, crosscoder, found) == found
    narrow = random_sae(4, 8, seed=0)
    with pytest.raises(ValueError, match="different widths"):
        reconciled(paired(narrow, [(torch.randn(9, 8).double(),) * 2]), found, crosscoder, known)


def test_exchanging_the_models_exchanges_the_rows() -> None:
    (parent, successor), difference = models()
    mirrored = replace(difference, W_enc=(-difference.W_enc[0],), W_dec=(-difference.W_dec[0],))
    one, other = paired(difference, [(parent, successor)]), paired(mirrored, [(successor, parent)])
    assert torch.allclose(one.W_dec[0], other.W_dec[1], atol=1e-6)
    assert torch.allclose(one.W_dec[1], other.W_dec[0], atol=1e-6)


def test_a_threshold_over_the_batch_is_kept() -> None:
    x, difference = models()
    by_threshold = replace(difference, activation=BatchTopK(threshold=0.4), norm=difference.W_dec[0].norm(dim=1))
    found = paired(by_threshold, in_batches(x))
    assert torch.equal(
        found.encode(*x).to_dense() > 0,
        by_threshold.encode(x[1] - x[0]).to_dense() > 0,
    )


def test_refusals() -> None:
    x, difference = models()
    with pytest.raises(ValueError, match="no tokens"):
        paired(difference, [])
    with pytest.raises(ValueError, match="only an SAE"):
        paired(replace(difference, scaling="layer_norm"), [x])
    with pytest.raises(ValueError, match="only an SAE"):
        paired(replace(difference, kind="transcoder"), [x])
