"""Matching of nodes: hidden permutations are found, strangers stay alone, and the numbers are what definitions say."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits import matching
from heredity.circuits.matching import assign, by_latents, match_nodes
from heredity.interp.dictionaries.exclusive import Exclusives, LatentStability, LatentVerdict, Stability
from heredity.interp.model import Model


@pytest.fixture
def texts(parent: Model, draw: Callable[..., Tensor]) -> list[str]:
    return [parent.decode(row) for row in draw(16, 24, seed=5).tolist()]


def permute_heads(model: Model, layer: int, order: list[int]) -> None:
    """Exchange heads of ``layer`` so that head i computes what head ``order[i]`` did, within the groups of keys."""
    attention, width = model.bridge.blocks[layer].attn, model.shape.d_head
    rows = torch.cat([torch.arange(width) + width * head for head in order])
    groups = [order[2 * k] // 2 for k in range(2)]
    shared = torch.cat([torch.arange(width) + width * group for group in groups])
    with torch.no_grad():
        for part, index in ((attention.q, rows), (attention.k, shared), (attention.v, shared)):
            weight = part.original_component.weight
            weight.copy_(weight[index].clone())
        weight = attention.o.original_component.weight
        weight.copy_(weight[:, rows].clone())


def test_heads_in_another_order_are_found(parent: Model, twin: Model, texts: list[str]) -> None:
    permute_heads(twin, 1, [3, 2, 0, 1])
    found = match_nodes(parent, twin, texts, way="function")
    assert found.way == "function" and found.alone_in_parent == found.alone_in_successor == ()
    for i, head in enumerate([3, 2, 0, 1]):
        match = found.in_parent(f"attn_head@1.{i}")
        assert match is not None and match.parent == f"attn_head@1.{head}" and match.similarity > 0.999
        assert found.in_successor(match.parent) is match
    match = found.in_parent("mlp_out@2")
    assert match is not None and match.parent == "mlp_out@2" and match.similarity == pytest.approx(1, abs=1e-4)


def test_a_node_that_does_something_else_stays_alone(parent: Model, twin: Model, texts: list[str]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in twin.bridge.original_model.model.layers[2].mlp.parameters():
            value.copy_(value.square().mean().sqrt() * torch.randn(value.shape, generator=generator))
    found = match_nodes(parent, twin, texts, way="function")
    assert found.alone_in_parent == found.alone_in_successor == ("mlp_out@2",)
    assert found.in_parent("mlp_out@2") is None and found.in_successor("mlp_out@2") is None
    assert found.threshold is not None and all(match.similarity > found.threshold for match in found.matches)
    assert len(found.matches) == 14


def test_exchanging_the_models_exchanges_the_matches(pair_of: Callable[[str], Any], texts: list[str]) -> None:
    (llama, _), (gpt2, _) = pair_of("llama"), pair_of("gpt2")  # 3 layers of width 32, 2 of width 48
    there, back = match_nodes(llama, gpt2, texts), match_nodes(gpt2, llama, texts)
    assert there.way == back.way == "function"
    turned = back.exchanged()
    pairs = [{(m.parent, m.successor) for m in one.matches} for one in (there, turned)]
    assert pairs[0] == pairs[1]
    assert set(there.alone_in_parent) == set(turned.alone_in_parent)
    assert len(there.matches) + len(there.alone_in_successor) == 10
    assert len(there.matches) + len(there.alone_in_parent) == 15


def test_same_parameters_are_matched_by_identity(parent: Model, successor: Model, texts: list[str]) -> None:
    found = match_nodes(parent, successor, texts)
    assert (found.way, found.threshold) == ("identity", None) and len(found.matches) == 15
    assert all(match.parent == match.successor and match.similarity == 1 for match in found.matches)
    assert found.exchanged() == found


def test_refusals(pair_of: Callable[[str], Any], parent: Model) -> None:
    with pytest.raises(ValueError, match="cannot be matched by identity"):
        match_nodes(parent, pair_of("gpt2")[0], ["one two three"], way="identity")
    with pytest.raises(ValueError, match="at least 8 aligned tokens of text, not 2"):
        match_nodes(parent, parent, ["one two"], way="function")


@pytest.mark.parametrize("seed", range(5))
def test_the_assignment_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarity, threshold = rng.uniform(-1, 1, (3, 4)), float(rng.uniform(-0.5, 0.7))
    pairs, alone_p, alone_s = assign(similarity, threshold)

    def worth(chosen: Any) -> float:
        return sum(similarity[i, j] - threshold for i, j in chosen)

    every = [
        list(zip(rows, columns, strict=True))
        for size in range(4)
        for rows in itertools.combinations(range(3), size)
        for columns in itertools.permutations(range(4), size)
    ]
    assert worth(pairs) == pytest.approx(max(map(worth, every)))
    assert sorted([i for i, _ in pairs] + alone_p) == [0, 1, 2]
    assert sorted([j for _, j in pairs] + alone_s) == [0, 1, 2, 3]
    assert all(similarity[i, j] > threshold for i, j in pairs)


def test_similarity_is_what_it_is_said_to_be(pair_of: Callable[[str], Any], texts: list[str]) -> None:
    (llama, _), (gpt2, _) = pair_of("llama"), pair_of("gpt2")
    writes = [w.double() for w in matching.aligned_writes(llama, gpt2, texts)]
    assert [tuple(w.shape) for w in writes] == [(15, 256, 32), (10, 256, 48)]
    got = matching.Features.of(llama, gpt2, texts).similarity()
    reads = [m.bridge.original_model.get_output_embeddings().weight.double() for m in (llama, gpt2)]
    gains = [m.bridge.ln_final.original_component.weight.double() for m in (llama, gpt2)]
    size = min(len(r) for r in reads)
    for i, j in ((0, 0), (4, 9), (14, 4), (7, 3)):
        x, y = writes[0][i] - writes[0][i].mean(0), writes[1][j] - writes[1][j].mean(0)
        logits = [v @ (r * g)[:size].T for v, r, g in zip((x, y), reads, gains, strict=True)]
        a, b = (v - v.mean(1, keepdim=True) for v in logits)
        effect = (a * b).sum() / (a.norm() * b.norm())
        cka = hsic(x @ x.T, y @ y.T) / (hsic(x @ x.T, x @ x.T) * hsic(y @ y.T, y @ y.T)).sqrt()
        assert got[i, j] == pytest.approx(float(cka + effect) / 2, abs=1e-4)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """The unbiased estimator as Song et al. (2012) write it, equation 5."""
    n = len(k)
    k, m = k - torch.diag(k.diag()), m - torch.diag(m.diag())
    one = torch.ones(n, dtype=k.dtype)
    inside = torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (inside - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_shuffled_text_sets_a_bar_that_chance_seldom_passes(parent: Model, texts: list[str]) -> None:
    features = matching.Features.of(parent, parent, texts)
    bar = features.shuffled()
    assert 0 < bar < 0.3
    fresh = torch.randperm(256, generator=torch.Generator().manual_seed(99))
    assert (features.similarity(fresh).max(0) > bar).mean() <= 0.2
    assert features.within() < 1


def latent(number: int, verdict: str, delta: float, nu_error: float) -> LatentVerdict:
    return LatentVerdict(number, verdict, "", "successor", delta, nu_error, *[0.0] * 3, None, "own", None, None, 0.01)  # pyright: ignore


def test_latents_stay_alone_only_if_exclusive_and_stable() -> None:
    each = (
        latent(0, "shared", 0.5, 0.9),
        latent(1, "successor-only", 1.0, 0.01),
        latent(2, "successor-only", 1.0, float("nan")),
        latent(3, "parent-only", 0.0, 0.0),
        latent(4, "undecided", 0.75, 0.3),
    )
    stable = [LatentStability(j, 2, 2 * (j != 2), 0, (), (), j != 2) for j in (1, 2, 3)]
    found = by_latents(Exclusives(each, 0.2, 0.5, None, None), Stability(tuple(stable), ((), ()), ((), ())))
    assert (found.way, found.alone_in_successor, found.alone_in_parent) == ("latents", ("latent@1",), ("latent@3",))
    assert {m.successor: m.similarity for m in found.matches} == {"latent@0": 1.0, "latent@2": 0.0, "latent@4": 0.5}
