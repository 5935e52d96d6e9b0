"""A head's score as a sum over pairs of nodes: against the bare model's attention and node by node."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import sources_at
from heredity.circuits.attribution_graph_nodes import Sources
from heredity.circuits.attribution_graph_qk import KINDS, AttentionScore, attention_score
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.errors import ModelError
from heredity.interp.model import Model
from heredity.kernels import TopK

PLACES = ((1, 3, 6, 2), (0, 1, 5, 5), (1, 0, 7, 0))  # layer, head, query, key


@pytest.fixture
def nodes_of(
    pair_of: Callable[[str], tuple[Model, Model]],
    draw: Callable[..., Tensor],
    random_dictionaries: Callable[..., DictionarySet],
) -> Callable[..., Sources]:
    def make(family: str, kind: str = "transcoder") -> Sources:
        model = pair_of(family)[0]
        return sources_at(model, random_dictionaries(model, kind, TopK(3)), draw(1, 8, seed=6)[0])

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_differences_of_scores_are_the_bare_models_log_odds(family: str, nodes_of: Callable[..., Sources]) -> None:
    from transformers import AutoModelForCausalLM

    if family == "olmo2":  # norms of queries and keys: their score is no sum over what the head reads
        with pytest.raises(ModelError, match="not what plain queries and keys give"):
            attention_score(nodes_of("olmo2"), 1, 0, 5, 2)
        return
    nodes = nodes_of(family)
    model = nodes.frozen.model
    bare = AutoModelForCausalLM.from_pretrained(model.spec, attn_implementation="eager").eval()
    with torch.no_grad():
        patterns = bare(nodes.frozen.tokens[None], output_attentions=True).attentions
    cap = getattr(bare.config, "attn_logit_softcapping", None)
    for layer, head, query, key in PLACES:
        found = [attention_score(nodes, layer, head, query, k) for k in {0, key, query}]
        for each in found:
            assert each.total == pytest.approx(each.score, rel=1e-4, abs=1e-4)
            parts = torch.stack([each.by_query.sum(), each.by_key.sum()])
            torch.testing.assert_close(parts, torch.full_like(parts, each.total))
        seen = [cap * math.tanh(each.score / cap) if cap else each.score for each in found]
        logs = [float(patterns[layer][0, head, query, each.key].log()) for each in found]
        for score, log in zip(seen, logs, strict=True):
            assert score - seen[0] == pytest.approx(log - logs[0], abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["transcoder", "cross_layer_transcoder"])
def test_every_pair_is_what_the_two_nodes_alone_give(family: str, kind: str, nodes_of: Callable[..., Sources]) -> None:
    """Each node pushed alone through the frozen forward, then through the bare model's own projections."""
    nodes = nodes_of(family, kind)
    layer, head, query, key = PLACES[0]
    found = attention_score(nodes, layer, head, query, key, top=60)
    assert found.nodes.shape == (nodes.n_columns + 1, 4) and len(found.pairs) == 60
    values = [abs(value) for *_, value in found.pairs]
    assert values == sorted(values, reverse=True)
    row_of = {tuple(row): i for i, row in enumerate(found.nodes.tolist())}
    seen_kinds = set()
    for at_query, at_key, value in found.pairs:
        rows = [row_of[KINDS.index(c.kind), c.layer, c.position, c.index] for c in (at_query, at_key)]
        q, k = (alone(nodes, layer, row, position) for row, position in zip(rows, (query, key), strict=True))
        product = score_of(nodes.frozen.model, layer, head, q, k, query, key)
        assert value == pytest.approx(product, rel=1e-3, abs=1e-4)
        seen_kinds |= {at_query.kind, at_key.kind}
    assert {"latent", "error"} <= seen_kinds
    # And sums over one side are the other side's node with everything.
    whole = alone(nodes, layer, None, key)
    for row in (0, nodes.n_latents, nodes.n_columns - 1):
        product = score_of(nodes.frozen.model, layer, head, alone(nodes, layer, row, query), whole, query, key)
        assert float(found.by_query[row]) == pytest.approx(product, rel=1e-3, abs=1e-4)


def alone(nodes: Sources, layer: int, row: int | None, position: int) -> tuple[Tensor, bool]:
    """What the attention of ``layer`` reads at a position if only one node (all if None) writes, and whether biases
    are part of it."""
    frozen, n = nodes.frozen, nodes.n_latents
    n_layers, n_positions, _ = nodes.errors.shape
    entry, written = torch.zeros_like(frozen.embedded), [torch.zeros_like(e) for e in nodes.errors]
    biases = row is None or row == nodes.n_columns
    if row is None:
        entry, written = frozen.embedded, list(frozen.mlp_out)
    elif biases:
        written = list(nodes.constant)
    elif row < n:
        at, place, latent = nodes.latents[row].tolist()
        a = nodes.part(at)
        for j, to in enumerate(a.writes):
            written[to][place] = nodes.activations[row] * a.dictionary.W_dec[j][latent]
    elif row < n + n_layers * n_positions:
        at, place = divmod(row - n, n_positions)
        written[at][place] = nodes.errors[at, place]
    else:
        place = row - n - n_layers * n_positions
        entry[place] = frozen.embedded[place]
    run = frozen.run(entry, written.__getitem__, {}, biases=biases)
    stream = next(at.value for at in run if (at.where, at.layer) == ("attention", layer))
    return frozen.layers[layer].attention_norm.forward(stream, biases)[position], biases


def score_of(
    model: Model, layer: int, head: int, q: tuple[Tensor, bool], k: tuple[Tensor, bool], query: int, key: int
) -> float:
    """Product of a query and a key by the weights of the bare model, rotated here."""
    weights = model.bridge.original_model.state_dict()
    width = model.shape.d_head
    llama = any("q_proj" in name for name in weights)
    turned = []
    for (x, biased), part, at, place in ((q, "q", head, query), (k, "k", head, key)):
        if llama:
            if part == "k":
                at = head * model.shape.n_kv_heads // model.shape.n_heads
            name = next(n for n in weights if f"layers.{layer}." in n and f"{part}_proj" in n and n.endswith("weight"))
            out = (weights[name] @ x)[at * width : (at + 1) * width]
            angle = place / 10000 ** (torch.arange(0, width, 2).float() / width)
            cos, sin = (f(torch.cat([angle, angle])) for f in (torch.cos, torch.sin))
            out = out * cos + torch.cat([-out[width // 2 :], out[: width // 2]]) * sin
        else:
            name = next(n for n in weights if f"h.{layer}." in n and "c_attn" in n and n.endswith("weight"))
            first = ("q", "k").index(part) * len(x) + at * width
            out = x @ weights[name][:, first : first + width]
            if biased:
                out = out + weights[name.removesuffix("weight") + "bias"][first : first + width]
        turned.append(out)
    return float(turned[0] @ turned[1]) / width**0.5


def test_heads_and_positions_that_are_not_there_are_refused(nodes_of: Callable[..., Sources]) -> None:
    nodes = nodes_of("llama")
    for place, fault in (
        ((3, 0, 4, 1), "no head 3.0"),
        ((0, 9, 4, 1), "no head 0.9"),
        ((0, 0, 2, 3), "from position 2"),
    ):
        with pytest.raises(ValueError, match=fault):
            attention_score(nodes, *place)
    assert isinstance(attention_score(nodes, 0, 0, 0, 0, top=1), AttentionScore)
