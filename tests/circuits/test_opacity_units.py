"""Units shared by behaviours: explained when asked for, once, and the same as when explained by themselves."""

from collections.abc import Callable

import pytest
import torch
from opaque import dictionary, random_texts
from torch import Tensor

from heredity.circuits.opacity_dictionaries import packed, site_sae, unpacked
from heredity.circuits.opacity_labels import explained_heads, explained_neurons, values_at
from heredity.circuits.opacity_parts import HeadsPart, NeuronsPart
from heredity.circuits.opacity_sizes import Ranking
from heredity.circuits.opacity_units import carried, latent_pool, node_pool, strongest
from heredity.interp.dictionaries.record import Port
from heredity.interp.explain.contexts import Contexts
from heredity.interp.explain.measure import explain
from heredity.interp.model import Encoded, Model


@pytest.fixture(scope="module")
def texts(parent: Model, draw: Callable[..., Tensor]) -> tuple[Encoded, ...]:
    return random_texts(parent, draw)


def test_nodes_are_those_of_the_labels(parent: Model, texts: tuple[Encoded, ...]) -> None:
    pool = node_pool(parent, Contexts(texts), [1], seed=3)
    assert len(pool.explain([(1, 5), (0, 2), (1, 40)])) == 3
    heads, neurons = pool.parts()
    assert isinstance(heads, HeadsPart) and isinstance(neurons, NeuronsPart)
    want_heads, said_heads = explained_heads(parent, texts, 1, seed=3)
    want, said = explained_neurons(parent, texts, 1, [5, 40], seed=3)
    assert pool.of_part(1) == said and pool.of_part(0) == [said_heads[2]]
    assert torch.equal(neurons.q, want.q) and torch.equal(neurons.thresholds[[5, 40]], want.thresholds[[5, 40]])
    assert torch.equal(heads.thresholds, want_heads.thresholds) and heads.q[[0, 1, 3]].abs().sum() == 0
    assert torch.allclose(heads.directions, want_heads.directions)  # pyright: ignore[reportArgumentType]
    # What is known is not made again.
    assert pool.explain([(1, 5), (0, 2)]) == {} and len(pool.explain([(1, 5), (1, 6)])) == 1


def test_latents_are_explained_where_they_are_active(parent: Model, texts: tuple[Encoded, ...]) -> None:
    d = dictionary("transcoder", [Port("mlp_in@1")], [Port("mlp_out@1")], 7)
    values = values_at(parent, texts, ["mlp_in@1"])["mlp_in@1"]
    pool = latent_pool([d], lambda _, port: {"mlp_in@1": values}[port.site], Contexts(texts), seed=0)
    found = pool.explain([(0, 3), (0, 9)])
    want = explain(d.encode(values), Contexts(texts), [3, 9], seed=0)
    assert [found[0, 3], found[0, 9]] == want and pool.parts()[0].q[[3, 9]].tolist() == pytest.approx(
        [e.q or 0.0 for e in want]
    )


def test_the_strongest_units_and_what_they_carry() -> None:
    ranking = Ranking((torch.tensor([0.0, -3.0, 1.0]), torch.tensor([2.0, 0.0])), {})
    assert strongest(ranking, 2) == [(0, 1), (1, 0)] and len(strongest(ranking, 9)) == 3
    assert carried(ranking, [(0, 1), (1, 0)]) == pytest.approx(5 / 6) and carried(Ranking((), {}), []) == 0


def test_a_dictionary_for_an_audit_reconstructs_both_models_and_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 16, generator=generator)
    chosen = torch.randint(24, (2, 4000), generator=generator)
    values = [rows[each] * 2 + 0.05 * torch.randn(4000, 16, generator=generator) for each in chosen]
    d = site_sae(values, "mlp_out@1", latents=48, steps=150, seed=1)
    for each in values:
        missed = (d.reconstruct(each)[0] - each).square().sum() / (each - each.mean(0)).square().sum()
        assert missed < 0.2
    again = unpacked(packed(d), "mlp_out@1")
    assert torch.equal(again.reconstruct(values[0])[0], d.reconstruct(values[0])[0])
    same, other = (site_sae(values, "mlp_out@1", latents=48, steps=5, seed=k) for k in (1, 2))
    twice = site_sae(values, "mlp_out@1", latents=48, steps=5, seed=1)
    assert torch.equal(same.W_enc[0], twice.W_enc[0]) and not torch.equal(same.W_enc[0], other.W_enc[0])
