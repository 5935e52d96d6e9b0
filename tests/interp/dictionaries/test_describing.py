"""Statistics and effects of latents against the bare transformers model, text by text; explanations end to end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.interp.capture import capture
from heredity.interp.corpus import corpus_of
from heredity.interp.dictionaries import Dictionary, Port, describe, logit_effects, with_notes
from heredity.interp.errors import CorpusError, DictionaryError, StoreError
from heredity.interp.model import Encoded, Model
from heredity.kernels import BatchTopK, JumpReLU

D, F = 32, 20


def dictionary(reads: Sequence[Port], writes: Sequence[Port], kind: Any, width: int = D) -> Dictionary:
    draws = torch.Generator().manual_seed(len(reads) + 7 * len(writes))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws) / shape[0] ** 0.5

    return Dictionary(
        kind=kind,
        reads=tuple(reads),
        writes=tuple(writes),
        W_enc=tuple(random(width, F) for _ in reads),
        b_enc=random(F),
        W_dec=tuple(random(F, width) for _ in writes),
        b_dec=tuple(random(width) for _ in writes),
        activation=JumpReLU(0.6),
    )


def sae(site: str, width: int = D) -> Dictionary:
    return dictionary([Port(site)], [Port(site)], "sae", width)


@pytest.fixture(scope="module")
def texts(tiny_model: Model) -> list[Encoded]:
    words = "the river and old bridge by a sea king told one story more then left at night".split()
    draws = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 30, (90,), generator=draws).tolist()
    return [
        tiny_model.encode(" ".join(words[i] for i in torch.randint(len(words), (n,), generator=draws).tolist()))
        for n in lengths
    ]


@dataclass(frozen=True)
class Bare:
    """The same weights without hooks."""

    hf: Any

    def hidden(self, ids: Sequence[int], after: int) -> Tensor:
        """What block ``after`` leaves in the stream, [pos, D]."""
        with torch.no_grad():
            return self.hf(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[after + 1][0]


@pytest.fixture(scope="module")
def bare(tiny_dir: Path) -> Bare:
    from transformers import AutoModelForCausalLM

    return Bare(AutoModelForCausalLM.from_pretrained(tiny_dir).eval())


def test_statistics_are_those_of_each_text_alone(tiny_model: Model, bare: Bare, texts: list[Encoded]) -> None:
    d = sae("resid_post@1")
    found = describe(d, tiny_model, texts, latents=[3, 0, 7], batch_tokens=100)
    dense = []
    for text in found.contexts.texts:
        pre = bare.hidden(text.ids, after=1) @ d.W_enc[0] + d.b_enc
        dense.append(torch.where(pre > 0.6, pre, 0))
    assert sorted(text.ids for text in found.contexts.texts) == sorted(text.ids for text in texts)
    expected = torch.cat(dense)
    seen = found.statistics
    assert seen.n_tokens == len(expected)
    assert torch.equal(seen.count, (expected > 0).sum(0))
    assert torch.allclose(seen.sum, expected.double().sum(0), rtol=1e-4)
    assert torch.allclose(seen.max, expected.amax(0).where(seen.count > 0, torch.tensor(-torch.inf)), rtol=1e-4)
    assert torch.equal(found.features.to_dense()[:, [0, 3, 7]] > 0, expected[:, [0, 3, 7]] > 0)
    assert bool((found.features.to_dense()[:, [1, 2, 4, 5, 6]] == 0).all()), "only those explained are kept"
    top = seen.top_tokens[int(seen.count.argmax())]
    assert torch.allclose(expected[top, int(seen.count.argmax())], seen.top_values[int(seen.count.argmax())], rtol=1e-4)


def test_batches_do_not_matter(tiny_model: Model, texts: list[Encoded]) -> None:
    d = sae("mlp_out@1")
    small, large = (describe(d, tiny_model, texts, latents=4, batch_tokens=n) for n in (60, 4000))
    assert torch.equal(small.statistics.count, large.statistics.count)
    assert small.kept == large.kept
    assert torch.equal(small.effects[0].raised, large.effects[0].raised)


def test_a_latent_of_known_rule_is_explained(tiny_model: Model, texts: list[Encoded]) -> None:
    # Reads the embedding's direction of one word, less what it shares with the others.
    table = tiny_model.bridge.original_model.get_input_embeddings().weight.detach()
    word = tiny_model.encode("river").ids[0]
    others = table[sorted({i for text in texts for i in text.ids} - {word})]
    direction = torch.linalg.lstsq(torch.cat([table[[word]], others]), torch.eye(1 + len(others))[:, :1]).solution
    d = sae("resid_pre@0")
    d.W_enc[0][:, 5] = direction[:, 0]
    d.b_enc[5] = 0
    found = describe(d, tiny_model, texts, latents=[5])
    name = found.contexts.names[word]
    assert found.explanations[5].rule == f"this token is “{name}”"
    assert found.explanations[5].q > 0.6
    latent = with_notes(d, found).latents[5]
    assert {example.token for example in latent.examples} == {name}
    assert with_notes(d, found).latents.search(name).numbers[0] == 5


def test_the_same_seed_says_the_same(tiny_model: Model, texts: list[Encoded]) -> None:
    d = sae("resid_post@1")
    one, other, third = (describe(d, tiny_model, texts, latents=5, seed=s) for s in (1, 1, 2))
    assert one.explanations == other.explanations
    assert one.kept == other.kept != third.kept
    assert all(int(one.statistics.count[latent]) > 0 for latent in one.kept)


def test_a_store_says_the_same_as_the_model(tiny_model: Model, texts: list[Encoded], tmp_path: Path) -> None:
    d = sae("resid_post@1")
    different = list({text.ids: text for text in texts}.values())
    corpus = corpus_of([text.text for text in different], "made up")
    store = capture(tiny_model, corpus, ["resid_post@1"], tmp_path, batch_tokens=100, shard_tokens=200)
    assert store.n_shards > 2
    stored, run = (describe(d, tiny_model, different, latents=[0, 3], store=s) for s in (store, None))
    assert sorted(text.ids for text in run.contexts.texts) == sorted(text.ids for text in stored.contexts.texts)
    assert torch.equal(stored.statistics.count, run.statistics.count)
    assert torch.allclose(stored.statistics.sum, run.statistics.sum, rtol=1e-5)
    with pytest.raises(StoreError, match="not among those given"):
        describe(d, tiny_model, different[:3], latents=[0], store=store)


@pytest.mark.parametrize("site", ["resid_post@2", "mlp_out@1", "attn_out@0", "attn_head@1.2", "embed", "final"])
def test_effects_on_logits_are_rows_times_the_unembedding(tiny_model: Model, bare: Bare, site: str) -> None:
    d = sae(site)
    found = logit_effects(d, tiny_model, count=6)
    assert found is not None
    scores = (d.W_dec[0] * bare.hf.model.norm.weight) @ bare.hf.lm_head.weight.T
    check(found, scores)


def check(found: Any, scores: Tensor) -> None:
    scores = scores.detach() - scores.detach().mean(1, keepdim=True)
    for ids, by, sign in ((found.raised, found.raised_by, 1), (found.lowered, found.lowered_by, -1)):
        best = (sign * scores).sort(dim=1, descending=True)
        n = ids.shape[1]
        assert torch.allclose(by, sign * best.values[:, :n], atol=1e-5)
        assert torch.allclose(scores.gather(1, ids), by, atol=1e-5)


def test_effects_of_head_values_go_through_the_output_weights(tiny_model: Model, bare: Bare) -> None:
    d = sae("attn_z@1")
    found = logit_effects(d, tiny_model)
    assert found is not None
    written = d.W_dec[0] @ bare.hf.model.layers[1].self_attn.o_proj.weight.T
    check(found, (written * bare.hf.model.norm.weight) @ bare.hf.lm_head.weight.T)


def test_effects_are_what_a_nudge_of_the_last_residual_does(tiny_model: Model, bare: Bare) -> None:
    # By a real forward: with the last norm's scale held, logits move by the row per unit of activation.
    d = sae("resid_post@2")
    tokens = torch.tensor([[5, 6, 7]])
    # A direction orthogonal to the residual leaves its norm as it is, to first order.
    residual = tiny_model.capture(tokens, ["resid_post@2"])["resid_post@2"][0, -1]
    scale = residual.square().mean().sqrt()
    row = d.W_dec[0][4] - residual * (d.W_dec[0][4] @ residual) / residual.square().sum()
    flat = replace(d, W_dec=(d.W_dec[0].clone(),))
    flat.W_dec[0][4] = row
    step = 1e-2
    with torch.no_grad():
        base, moved = (
            tiny_model.logits(tokens, edits={"resid_post@2": nudge})[0, -1].double()
            for nudge in (lambda x: x, lambda x: x + step * row)
        )
    change = (moved - base) / step
    expected = logit_effects(flat, tiny_model, count=len(tiny_model.tokenizer))
    assert expected is not None
    by_token = torch.zeros(len(tiny_model.tokenizer), dtype=torch.float64)
    by_token[expected.raised[4]] = expected.raised_by[4].double()
    assert (change - change.mean()).tolist() == pytest.approx((by_token / scale.double()).tolist(), abs=2e-2)


def test_several_places_of_one_model_are_summed(tiny_model: Model, bare: Bare) -> None:
    d = dictionary([Port("mlp_in@0")], [Port(f"mlp_out@{i}") for i in range(3)], "cross_layer_transcoder")
    found = logit_effects(d, tiny_model)
    assert found is not None
    check(found, (sum(d.W_dec) * bare.hf.model.norm.weight) @ bare.hf.lm_head.weight.T)


def test_each_model_of_a_pair_has_its_own(tiny_model: Model, bare: Bare, texts: list[Encoded]) -> None:
    ports = [Port("resid_post@1", 0), Port("resid_post@1", 1)]
    d = dictionary(ports, ports, "crosscoder")
    found = describe(d, [tiny_model, tiny_model], texts[:40], latents=2)
    assert found.models == (tiny_model.digest,) * 2
    for m, effects in enumerate(found.effects):
        check(effects, (d.W_dec[m] * bare.hf.model.norm.weight) @ bare.hf.lm_head.weight.T)
    hidden = [bare.hidden(text.ids, after=1) for text in found.contexts.texts]
    pre = torch.cat(hidden) @ (d.W_enc[0] + d.W_enc[1]) + d.b_enc
    assert torch.equal(found.statistics.count, (pre > 0.6).sum(0))


def test_what_does_not_reach_the_logits_has_no_effect_on_them(tiny_model: Model) -> None:
    assert logit_effects(sae("mlp_in@1"), tiny_model) is None
    assert logit_effects(sae("attn_q@1"), tiny_model) is None


REFUSALS: dict[str, tuple[Callable[[Model, list[Encoded]], Any], type[Exception], str]] = {
    "no text": (lambda m, t: describe(sae("embed"), m, []), CorpusError, "no text"),
    "a latent too many": (lambda m, t: describe(sae("embed"), m, t, latents=[F]), ValueError, "must lie in"),
    "too wide": (lambda m, t: describe(sae("embed", 16), m, t), DictionaryError, "32 wide, the dictionary 16"),
    "effects too wide": (lambda m, t: logit_effects(sae("embed", 16), m), DictionaryError, "32 wide"),
    "a batch decides": (
        lambda m, t: describe(replace(sae("embed"), activation=BatchTopK(k=2)), m, t),
        DictionaryError,
        "depends on the other tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tiny_model: Model, texts: list[Encoded], case: str) -> None:
    act, error, match = REFUSALS[case]
    with pytest.raises(error, match=match):
        act(tiny_model, texts)
