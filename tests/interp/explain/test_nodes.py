"""Heads and neurons as latents."""

import numpy as np
import pytest
import torch

from heredity.interp.explain import Contexts, explain, head_features, neuron_features
from heredity.interp.model import Model


def test_neurons_keep_their_largest_values_with_sign() -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(203, 7, generator=generator)
    found = neuron_features(activations, share=0.1).validate().to_dense()
    for n in range(7):
        order = np.argsort(-np.abs(activations[:, n].numpy()), kind="stable")[:20]
        expected = np.zeros(203, dtype=np.float32)
        expected[order] = activations[order, n]
        assert np.array_equal(found[:, n].numpy(), expected)


def test_zeros_are_never_kept_and_ties_go_to_the_first() -> None:
    activations = torch.zeros(40, 2)
    activations[[5, 9, 30], 0] = 1.0
    found = neuron_features(activations, share=0.05)
    assert found.to_coo()[0].tolist() == [5, 9] and found.nnz == 2


def test_heads_by_norm_and_by_direction() -> None:
    generator = torch.Generator().manual_seed(2)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    size = torch.randn(200, generator=generator) * 5
    size[17] = 40.0
    writes = torch.stack([size[:, None] * direction + 3.0, torch.randn(200, 16, generator=generator)], dim=1)
    by_direction = head_features(writes, along="direction", share=0.1).to_dense()[:, 0]
    # Up to the mean, the projection is the planted size, the largest positive.
    kept = by_direction != 0
    assert kept.sum() == 20 and by_direction.argmax() == 17
    assert torch.allclose(by_direction[kept], (size - size.mean())[kept], atol=1e-3)
    by_norm = head_features(writes, share=0.1).to_dense()
    assert torch.allclose(by_norm[by_norm != 0], writes.norm(dim=-1)[by_norm != 0])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        neuron_features(torch.ones(3, 1), share=0.0)
    with pytest.raises(ValueError, match="NaN"):
        neuron_features(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match="along"):
        head_features(torch.ones(3, 1, 2), along="mean")


def test_a_head_of_a_model_is_explained_like_a_latent(tiny_model: Model) -> None:
    """Random weights: a head's write is a function of the tokens, above all of this one."""
    rng = np.random.default_rng(5)
    words = "the river old road king bread dog red walked before , .".split()
    texts = [tiny_model.encode(" ".join(rng.choice(words, 24))) for _ in range(80)]
    sites = ["attn_head@0.0", "attn_head@0.1"]
    with torch.no_grad():
        seen = [tiny_model.capture(torch.tensor([text.ids]), sites) for text in texts]
    writes = torch.stack([torch.cat([each[site][0] for each in seen]) for site in sites], dim=1)
    contexts = Contexts(tuple(texts))
    for each in explain(head_features(writes, share=0.1), contexts, [0, 1], seed=0):
        assert each.status == "measured" and each.program is not None
        assert each.n_active == round(0.1 * len(contexts))
        assert each.q is not None and each.q > 0.1, each.rule
