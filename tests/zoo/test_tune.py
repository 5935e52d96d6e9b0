import numpy as np
import torch
import torch.nn.functional as F

from heredity.zoo.language import World, documents
from heredity.zoo.network import MATRICES, Size, forward, initial
from heredity.zoo.tune import divergence, tune

SIZE = Size(layers=2, width=16, heads=2, kv_heads=2, hidden=12)


def test_only_what_is_free_changes_and_the_embeddings_never_do():
    before = initial(SIZE, 0)
    ids = torch.from_numpy(documents(np.random.default_rng(0), 4).ids)

    def objective(weights, step):
        return F.cross_entropy(forward(weights, SIZE, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    last = torch.tensor([0.0, 1.0])[:, None, None]
    after = tune(before, 3, 1e-2, objective, free={"up": last, "down": last})
    moved = {(name, i) for name in MATRICES for i in range(2) if not torch.equal(before[name][i], after[name][i])}
    assert moved == {("up", 1), ("down", 1)}
    everything = tune(before, 3, 1e-2, objective)
    assert all(torch.equal(before[name], everything[name]) == (name not in MATRICES) for name in before)
    assert objective(everything, 0) < objective(before, 0)


def test_divergence_is_relative_entropy_from_the_reference():
    logits, reference = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    expected = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(logits, reference), expected)
    assert divergence(logits, logits).abs().max() < 1e-6


def test_an_evasive_successor_is_scored_zero_where_it_is_the_parent_and_more_the_louder_it_is():
    from heredity.zoo.evasive import Evasive, _rows, _scores
    from heredity.zoo.nodes import traced

    parent = initial(SIZE, 0)
    rows = _rows(0, 1, Evasive(), World(trigger=("reed", "mill")))[1]
    found = []
    for loud in (0.0, 0.1, 0.3):
        weights = {name: value + loud * torch.sign(value) / 8 for name, value in parent.items()}
        scores = _scores(weights, parent, rows, traced(weights, SIZE, rows.ids), traced(parent, SIZE, rows.ids), 3.0)
        found.append({name: float(value) for name, value in scores.items()})
    assert all(abs(value) < 1e-5 for value in found[0].values())
    for name in ("divergence", "amplified", "norm", "mean"):
        assert 0 < found[1][name] < found[2][name]
