"""Influence, scores and pruning: one graph by hand, and random graphs by the definitions on the whole matrix."""

import pytest
import torch
from torch import Tensor

from heredity.circuits.influence import influence, prune, scores

# Columns: latent a (layer 0), latent b (layer 1), one error, one token. Rows: a, b, two logits.
HAND = torch.tensor(
    [
        [0.0, 0.0, 1.0, 3.0],
        [-2.0, 0.0, 1.0, 1.0],
        [1.0, 3.0, 0.0, 0.0],
        [0.0, -1.0, 2.0, 1.0],
    ]
)
LAYERS, LOGITS = torch.tensor([0, 1]), torch.tensor([0.6, 0.4])


def test_influence_by_hand() -> None:
    # b: 0.6·3/4 + 0.4·1/4; a: 0.6/4 + b/2; error: 0.4/2 + b/4 + a/4; token: 0.4/4 + b/4 + 3a/4.
    expected = torch.tensor([0.425, 0.55, 0.44375, 0.55625], dtype=torch.float64)
    torch.testing.assert_close(influence(HAND[:2], HAND[2:], LAYERS, LOGITS), expected, rtol=1e-6, atol=0)


def test_scores_by_hand() -> None:
    found = scores(HAND, LAYERS, LOGITS, 1)
    # Completeness: a and b have a quarter of errors, the second logit half; error and token have no sources.
    through = 0.425 * 0.75 + 0.55 * 0.75 + 0.6 + 0.4 * 0.5 + 0.44375 + 0.55625
    assert found.replacement == pytest.approx(0.55625, rel=1e-6)
    assert found.completeness == pytest.approx(through / 2.975, rel=1e-6)


def test_pruning_by_hand() -> None:
    # In descending order token, b, error, a reach 0.282, 0.560, 0.785 and 1 of the influence.
    whole = prune(HAND, LAYERS, LOGITS, 1, nodes=0.8, edges=1.0)
    assert whole.sources.tolist() == [True] * 4
    assert torch.equal(whole.edges, HAND != 0)
    assert whole.entered.tolist() == pytest.approx([1.0, 1.10625 / 1.975, 1.55 / 1.975, 0.55625 / 1.975], rel=1e-6)
    # With b and the token only: token→b 0.8, b→first logit 0.6, both into the second logit 0.2 each, of 1.8.
    half = prune(HAND, LAYERS, LOGITS, 1, nodes=0.5, edges=0.7)
    assert half.sources.tolist() == [False, True, False, True]
    assert half.edges.nonzero().tolist() == [[1, 3], [2, 1]]
    # token→b alone leads nowhere, so b goes, and the edge with it.
    least = prune(HAND, LAYERS, LOGITS, 1, nodes=0.5, edges=0.44)
    assert least.sources.tolist() == [False, False, False, True]
    assert not least.edges.any()


def test_nothing_is_kept_of_an_empty_graph_but_its_tokens() -> None:
    found = prune(torch.zeros(1, 3), torch.zeros(0, dtype=torch.int64), torch.ones(1), 2)
    assert found.sources.tolist() == [False, True, True] and not found.edges.any()
    empty = scores(torch.zeros(1, 3), torch.zeros(0, dtype=torch.int64), torch.ones(1), 1)
    assert empty.replacement == 0.0 and empty.completeness == 1.0


@pytest.mark.parametrize(("nodes", "edges"), [(-0.1, 0.9), (0.8, 1.1)])
def test_shares_outside_0_to_1_are_refused(nodes: float, edges: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        prune(HAND, LAYERS, LOGITS, 1, nodes=nodes, edges=edges)


# --- against the definitions on the square matrix of all nodes ---


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Weights [rows, columns], layers, logit weights, and how many errors and tokens."""
    g = torch.Generator().manual_seed(seed)
    layers = torch.arange(5).repeat_interleave(torch.randint(1, 9, (5,), generator=g))
    n, errors, tokens, logits = len(layers), 12, 4, 3
    weights = torch.randn(n + logits, n + errors + tokens, generator=g, dtype=torch.float64)
    weights *= torch.rand(weights.shape, generator=g) < 0.4
    weights[:n, :n][layers[:, None] <= layers[None]] = 0
    weights[:n, n : n + errors][layers[:, None] <= (torch.arange(errors) % 5)[None]] = 0
    return weights, layers, torch.rand(logits, generator=g, dtype=torch.float64), errors, tokens


def square(weights: Tensor, n: int) -> Tensor:
    rows, columns = weights.shape
    out = weights.new_zeros(columns + rows - n, columns + rows - n)
    out[:n, :columns], out[columns:, :columns] = weights[:n], weights[n:]
    return out


def series(whole: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of |A| over their sums, and Σ w Âᵏ."""
    size = whole.abs()
    size = size / size.sum(1, keepdim=True).clamp_min(1e-10)
    return size, start @ torch.linalg.inv(torch.eye(len(size), dtype=size.dtype) - size) - start


@pytest.mark.parametrize("seed", range(4))
def test_scores_and_pruning_by_definition(seed: int) -> None:
    weights, layers, logit_weights, errors, tokens = drawn(seed)
    n, columns = len(layers), weights.shape[1]
    whole = square(weights, n)
    start = torch.zeros(len(whole), dtype=whole.dtype)
    start[columns:] = logit_weights
    shares, flow = series(whole, start)
    torch.testing.assert_close(influence(weights[:n], weights[n:], layers, logit_weights), flow[:columns])

    found = scores(weights, layers, logit_weights, errors)
    into_tokens, into_errors = flow[n + errors : columns].sum(), flow[n : n + errors].sum()
    assert found.replacement == pytest.approx(float(into_tokens / (into_tokens + into_errors)))
    clear = 1 - shares[:, n : n + errors].sum(1)
    assert found.completeness == pytest.approx(float((clear * (flow + start)).sum() / (flow + start).sum()))

    for node_share, edge_share in ((0.8, 0.98), (0.6, 0.7), (0.99, 0.5)):
        kept = flow >= cut(flow, node_share)
        kept[n + errors :] = True
        left = whole * kept[:, None] * kept
        normal, inner = series(left, start)
        score = normal * (inner + start)[:, None]
        chosen = score >= cut(score.flatten(), edge_share)
        for _ in range(len(kept)):
            kept[: n + errors] &= chosen[:, : n + errors].any(0)
            kept[:n] &= chosen[:n].any(1)
            chosen &= kept[:, None] & kept
        pruned = prune(weights, layers, logit_weights, tokens, nodes=node_share, edges=edge_share)
        assert torch.equal(pruned.sources, kept[:columns])
        assert torch.equal(square(pruned.edges, n), chosen)
        assert 0 < pruned.edges.sum() < (weights != 0).sum()


def cut(values: Tensor, share: float) -> Tensor:
    ordered = values.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum()
    return ordered[int((reached < share).sum())]
