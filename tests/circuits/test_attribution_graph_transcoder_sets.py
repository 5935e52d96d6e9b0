"""Graphs over transcoder sets that circuit-tracer saved, on a model of their width."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph
from heredity.interp.dictionaries.formats import load_dictionary
from heredity.interp.errors import DictionaryError
from heredity.interp.load import load
from heredity.interp.model import Model

FOREIGN = Path(__file__).parents[1] / "interp" / "dictionaries" / "foreign" / "circuit_tracer"
SETS = ["plt_relu", "plt_jumprelu_skip", "plt_topk", "clt_relu", "clt_jumprelu", "gemma_scope_2"]


@pytest.fixture(scope="module")
def narrow(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama of 2 layers, as wide as the sets: 12."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    directory = tmp_path_factory.mktemp("narrow")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load(str(directory))


def path_of(case: str) -> Path:
    (path,) = {file.parent for file in (FOREIGN / case).rglob("config.yaml")}
    return path


@pytest.mark.parametrize("case", SETS)
def test_a_set_of_theirs_gives_an_exact_graph(case: str, narrow: Model, draw: Callable[..., Tensor]) -> None:
    tokens = draw(1, 9, seed=3)[0]
    graph = attribution_graph(narrow, load_dictionary(path_of(case)), tokens, constant_positions=1)
    assert graph.residuals().max() < 1e-5 and graph.latents[:, 0].unique().tolist() == [0, 1]
    logits = graph.read[graph.n_latents :].double()
    assert (graph.roots().total - logits).abs().max() < 1e-5 * logits.abs().max()
    assert (graph.latents[:, 1] > 0).all()  # their convention: nothing at the first position


def test_active_latents_are_those_of_the_stored_arrays(narrow: Model, draw: Callable[..., Tensor]) -> None:
    tokens = draw(1, 9, seed=3)[0]
    graph = attribution_graph(narrow, load_dictionary(path_of("plt_relu")), tokens)
    seen = narrow.capture(tokens[None], ["mlp_in@0", "mlp_in@1"])
    dense = torch.zeros(2, 9, 32)
    dense[tuple(graph.latents.T)] = graph.activations
    for layer in range(2):
        w = load_file(path_of("plt_relu") / f"layer_{layer}.safetensors")
        expected = torch.relu(seen[f"mlp_in@{layer}"][0] @ w["W_enc"].T + w["b_enc"])
        torch.testing.assert_close(dense[layer], expected, rtol=1e-4, atol=1e-5)


def test_a_set_that_reads_where_there_is_no_site_is_refused(narrow: Model, draw: Callable[..., Tensor]) -> None:
    with pytest.raises(DictionaryError, match="needs dictionaries that read mlp_in"):
        attribution_graph(narrow, load_dictionary(path_of("gemma_scope")), draw(1, 5)[0])
