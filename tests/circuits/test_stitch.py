"""What a fitted map foretells: against a least-squares reference, and on models that are one another in disguise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits import stitch as stitching
from heredity.circuits.attribution import Prompts
from heredity.circuits.components import Node, nodes_of
from heredity.circuits.stitch import emergence_across, fit, ordinary, solved
from heredity.interp.model import Model


def text(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in tokens.split(16)]


def inner(model: Model) -> list[Node]:
    return [node for node in nodes_of(model) if node.kind in ("head", "mlp")]


@pytest.mark.parametrize(("rows", "penalty"), [(40, 1.0), (7, 0.1), (200, 30.0)])
def test_ridge_is_least_squares_on_augmented_rows(rows: int, penalty: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    above = torch.cat([x, penalty**0.5 * torch.eye(12, dtype=torch.float64)])
    want = torch.linalg.lstsq(above, torch.cat([y, torch.zeros(12, 5, dtype=torch.float64)])).solution
    assert torch.allclose(solved(x.T @ x, x.T @ y, penalty), want, atol=1e-10)


def test_a_model_foretells_its_own_mlps_better_than_noise_does(parent: Model, draw: Callable[..., Tensor]) -> None:
    """Writes of MLPs are in the stream; the share reported is of text that neither fit nor penalty saw."""
    tokens = draw(48, 16)
    nodes = [Node(0, "mlp"), Node(2, "mlp")]
    found = fit(parent, parent, text(tokens), nodes)
    assert found.sites == ("resid_pre@0", "resid_post@0", "resid_post@1", "resid_post@2")
    assert set(found.r2_of) == set(nodes) and 0.3 < found.r2 < 1
    unseen = int(0.8 * 48 * 16)
    missed = whole = 0.0
    for node in nodes:
        own = stitching.run_donor(parent, tokens).write(node).double() - found.means[node]
        foretold = found.features(parent, tokens) @ found.weights[node]
        left, there = (value.flatten(0, 1)[unseen:].square().sum() for value in (own - foretold, own))
        assert found.r2_of[node] == pytest.approx(float(1 - left / there), abs=1e-4)
        missed, whole = missed + float(left), whole + float(there)
    assert found.r2 == pytest.approx(1 - missed / whole, abs=1e-4)
    with pytest.raises(ValueError, match="at least 50 tokens of text, not 12"):
        fit(parent, parent, text(draw(2, 6)), nodes)


def test_a_planted_node_is_new_across_architectures_too(
    parent: Model, twin: Model, draw: Callable[..., Tensor]
) -> None:
    """The parent foretells what its twin's nodes write; not what one of them writes after one token only it heeds."""
    tokens = draw(64, 16)
    tokens = torch.where(tokens == 17, 18, tokens)  # the trigger is in no ordinary text
    found = fit(twin, parent, text(tokens), inner(twin))
    at = ordinary(twin, text(tokens[-16:]), 0)
    kept = emergence_across(twin, parent, at, found, 0)
    assert kept.share is not None and kept.share.estimate < 0.1
    triggered = draw(12, 9, seed=3)
    triggered[:, -1] = 17
    says = 40
    wanted = twin.bridge.original_model.get_output_embeddings().weight[says].detach()

    def plant(value: Tensor) -> Tensor:
        return torch.where((heard == 17)[..., None], value + 30 * wanted / wanted.norm(), value)

    with twin.edited({"mlp_out@2": plant}):
        heard = triggered
        logits = twin.logits(triggered)[:, -1]
        assert (logits.argmax(-1) == says).all()
        other = parent.logits(triggered)[:, -1].argmax(-1)
        prompts = Prompts(triggered, torch.full((12,), 8), torch.full((12,), says), other)
        new = emergence_across(twin, parent, prompts, found, 0)
    assert new.carriers(0.8) == [Node(2, "mlp")]
    (planted,) = [each for each in new.nodes if each.node == Node(2, "mlp")]
    assert planted.inherited is not None and planted.inherited.high < 0.3


def test_other_widths_and_depths_answer_in_both_directions(
    pair_of: Callable[[str], Any], draw: Callable[..., Tensor]
) -> None:
    (llama, _), (gpt2, _) = pair_of("llama"), pair_of("gpt2")
    tokens = draw(48, 12)
    for model, other in ((llama, gpt2), (gpt2, llama)):
        found = fit(model, other, text(tokens), inner(model))
        common = min(model.shape.d_vocab, other.shape.d_vocab)
        says = [m.logits(tokens[:10])[:, -1, :common].argmax(-1) for m in (model, other)]
        prompts = Prompts(tokens[:10], torch.full((10,), 11), *says)
        measured = emergence_across(model, other, prompts, found, 0)
        # Random models of other embeddings have nothing in common that is linear, and say so.
        assert len(measured.nodes) == len(inner(model)) and found.r2 < 0.2
        assert all(0 <= each.inherited.estimate <= 1 for each in measured.nodes if each.inherited is not None)


def test_ordinary_prompts_end_in_real_tokens(parent: Model, draw: Callable[..., Tensor]) -> None:
    tokens = draw(6, 10)
    mask = torch.arange(10)[None] < torch.tensor([[10], [4], [7], [10], [5], [9]])
    found = ordinary(parent, [(tokens, mask), (draw(2, 5), torch.ones(2, 5, dtype=torch.bool))], 0)
    assert found.tokens.shape == (8, 10)
    lengths = torch.cat([mask.sum(1), torch.tensor([5, 5])])
    assert (found.last < lengths).all() and (found.last >= lengths // 2).all()
    at = parent.logits(found.tokens)[torch.arange(8), found.last]
    assert torch.equal(at.argmax(-1), found.says_successor) and (found.says_parent != found.says_successor).all()
