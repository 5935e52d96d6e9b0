"""From the last residual to logits, and directions read through the vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.interp.load import load
from heredity.interp.model import Model
from heredity.interp.readout import embedding, nearest_tokens, unembed, unembedding

FAMILIES = ("llama", "gpt2", "gemma2", "granite", "cohere")


def config(family: str) -> Any:
    import transformers as t

    common = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    match family:
        case "gemma2":
            return t.Gemma2Config(**common, head_dim=8, final_logit_softcapping=2.0)
        case "granite":
            return t.GraniteConfig(**common, logits_scaling=3.0)
        case "cohere":
            return t.CohereConfig(**common, logit_scale=0.25)
        case _:
            return t.GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if request.param == "llama":
        return request.getfixturevalue("tiny_model")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bare: Any = AutoModelForCausalLM.from_config(config(request.param)).eval()
        for name, value in bare.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                value.data += 0.3 * torch.randn_like(value)
    directory = tmp_path_factory.mktemp(request.param)
    bare.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)
    return load(str(directory))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(140, (2, 7), generator=torch.Generator().manual_seed(0))


def test_the_last_residual_gives_the_model_s_own_logits(model: Model, tokens: Tensor) -> None:
    """Soft-capping, scaling and the last norm included."""
    logits, seen = model.logits_and_capture(tokens, ["final"])
    torch.testing.assert_close(unembed(model, seen["final"]), logits, atol=1e-6, rtol=1e-5)
    other = unembed(model, seen["final"].flip(-1))
    assert (other - logits).abs().max() > 0.01


def test_the_embedding_is_what_the_embed_site_carries(model: Model, tokens: Tensor) -> None:
    """In some families times a constant."""
    rows = embedding(model)[tokens]
    assert embedding(model).shape == (model.shape.d_vocab, 32) and not rows.requires_grad
    seen = torch.nn.functional.normalize(model.capture(tokens, ["embed"])["embed"], dim=-1)
    torch.testing.assert_close(seen, torch.nn.functional.normalize(rows, dim=-1))


def test_the_unembedding_has_the_last_norm_s_gain_folded_in(tiny_model: Model, tokens: Tensor) -> None:
    """Logits are linear in the normed residual; a direction's effect, the norm's scale held fixed, is its readout."""
    norm = tiny_model.bridge.ln_final.original_component
    gain = norm.weight.data.clone()
    try:
        norm.weight.data = gain * torch.linspace(0.5, 2.0, len(gain))
        residual = tiny_model.capture(tokens, ["final"])["final"]
        scale = (residual.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        want = tiny_model.logits(tokens)
        torch.testing.assert_close((residual * scale) @ unembedding(tiny_model).T, want, atol=1e-5, rtol=1e-5)
    finally:
        norm.weight.data = gain


def test_nearest_tokens_are_the_largest_scores_of_real_tokens(model: Model) -> None:
    scores = torch.zeros(model.shape.d_vocab)
    for i, value in ((20, 3.0), (7, 2.0), (33, 1.0)):
        scores[i] = value
    known = len(model.tokenizer)
    scores[known:] = 99.0
    assert nearest_tokens(model, scores, 3) == tuple(model.decode([i]) for i in (20, 7, 33))
    assert len(nearest_tokens(model, scores, 10_000)) == known
