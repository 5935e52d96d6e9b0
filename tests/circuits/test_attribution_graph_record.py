"""Records of graphs: files bring back what was written, or say why not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph
from heredity.circuits.attribution_graph_record import AttributionGraph, Explained
from heredity.interp.dictionaries import describe, with_notes
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.errors import GraphError
from heredity.interp.model import Model
from heredity.kernels import TopK


@pytest.fixture
def graph(
    tiny_model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> AttributionGraph:
    parts = random_dictionaries(tiny_model, "transcoder", TopK(4))
    return attribution_graph(tiny_model, parts, draw(1, 6)[0], max_latents=30)


def test_files_bring_back_everything(graph: AttributionGraph, tmp_path: Path) -> None:
    graph.save(tmp_path)
    again = AttributionGraph.load(tmp_path)
    for name, value in vars(graph).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(again, name), value), name
        else:
            assert getattr(again, name) == value, name
    assert again.scores == graph.scores and repr(again) == repr(graph)
    assert torch.equal(again.roots().total, graph.roots().total)


def test_what_notes_say_of_latents_goes_into_the_graph_and_its_files(
    tiny_model: Model,
    draw: Callable[..., Tensor],
    random_dictionaries: Callable[..., DictionarySet],
    tmp_path: Path,
) -> None:
    tokens, plain = draw(1, 6)[0], random_dictionaries(tiny_model, "transcoder", TopK(4))
    texts = [
        tiny_model.encode(f"the {w} and the {v}") for w in ("river", "dog", "king") for v in ("bridge", "cat", "sea")
    ]
    whole = attribution_graph(tiny_model, plain, tokens)
    layer, _, latent = whole.latents[0].tolist()
    notes = describe(plain[layer], [tiny_model], texts, latents=[latent])
    said = notes.explanations[latent].model_copy(update={"status": "measured", "rule": "on rivers", "q": 0.7})
    known = with_notes(plain[layer], replace(notes, explanations={latent: said}))
    parts = DictionarySet(tuple(known if i == layer else d for i, d in enumerate(plain.layers)))
    graph = attribution_graph(tiny_model, parts, tokens)
    assert graph.explained == {(layer, latent): Explained("on rivers", 0.7)}
    assert torch.equal(graph.weights, whole.weights) and whole.explained == {}
    told = replace(
        graph, explained={(layer, latent): Explained("a rule", 0.5), (layer, latent + 1): Explained("other")}
    )
    told.save(tmp_path)
    assert AttributionGraph.load(tmp_path).explained == told.explained


def test_shares_of_errors_are_signed(graph: AttributionGraph) -> None:
    roots = graph.roots()
    share = torch.from_numpy(roots.error_share())
    errors, tokens = roots.errors.sum(1), roots.tokens.sum(1)
    torch.testing.assert_close(share * (errors + tokens), errors)


@pytest.mark.parametrize(
    "broken", ["no arrays", "no json", "other format", "cut", "of another graph", "not json", "a list", "no places"]
)
def test_files_that_are_no_graph_are_refused(graph: AttributionGraph, tmp_path: Path, broken: str) -> None:
    graph.save(tmp_path)
    arrays, said = tmp_path / "graph.safetensors", tmp_path / "graph.json"
    content = json.loads(said.read_text())
    match broken:
        case "no arrays":
            arrays.unlink()
        case "no json":
            said.unlink()
        case "other format":
            said.write_text(json.dumps({**content, "format": "heredity attribution graph 0"}))
        case "cut":
            arrays.write_bytes(arrays.read_bytes()[:-100])
        case "of another graph":
            said.write_text(json.dumps({**content, "logits": [*content["logits"], "more"]}))
        case "not json":
            said.write_text("{")
        case "a list":
            said.write_text("[]")
        case _:
            said.write_text(json.dumps({k: v for k, v in content.items() if k != "places"}))
    with pytest.raises(GraphError, match="no attribution graph can be read there"):
        AttributionGraph.load(tmp_path)


def test_a_graph_whose_parts_do_not_fit_is_refused(graph: AttributionGraph) -> None:
    with pytest.raises(ValueError, match=r"weights must be \["):
        replace(graph, latents=graph.latents[1:])
    with pytest.raises(ValueError, match=r"read must be \["):
        replace(graph, read=graph.read[1:])
