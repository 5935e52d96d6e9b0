"""Dictionaries spliced into a model, against the bare transformers model with hooks written out by hand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
from heredity.interp.dictionaries.recovered import LossRecovered, loss_recovered, means
from heredity.interp.dictionaries.splicing import ablate, clamp, clean_errors, splice
from heredity.interp.errors import CorpusError, DictionaryError, SiteError
from heredity.interp.model import Encoded, Model
from heredity.interp.sampling import sample_corpus
from heredity.kernels import BatchTopK, FeatureCSR, JumpReLU, ReLU, TopK

D, F = 32, 48
Hooks = Mapping[str, Callable[[Tensor], Tensor]]


def random_dictionary(
    reads: list[Port], writes: list[Port], kind: Any, seed: int = 0, width: int = D, **more: Any
) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

    return Dictionary(
        kind=kind,
        reads=tuple(reads),
        writes=tuple(writes),
        W_enc=tuple(draw(width, F) for _ in reads),
        b_enc=draw(F),
        W_dec=tuple(draw(F, width) for _ in writes),
        b_dec=tuple(draw(width) for _ in writes),
        activation=more.pop("activation", ReLU()),
        **({"W_skip": draw(width, width)} if more.pop("skip", False) else {}),
        **more,
    )


def sae(site: str, **more: Any) -> Dictionary:
    return random_dictionary([Port(site)], [Port(site)], "sae", **more)


def transcoder(layer: int, **more: Any) -> Dictionary:
    return random_dictionary([Port(f"mlp_in@{layer}")], [Port(f"mlp_out@{layer}")], "transcoder", **more)


def cross_layer() -> DictionarySet:
    return DictionarySet(
        tuple(
            random_dictionary(
                [Port(f"mlp_in@{i}")],
                [Port(f"mlp_out@{j}") for j in range(i, 3)],
                "cross_layer_transcoder",
                seed=i,
                activation=JumpReLU(0.3),
            )
            for i in range(3)
        )
    )


def every_kind() -> dict[str, Dictionary | DictionarySet]:
    return {
        "sae of the stream": sae("resid_post@1", activation=TopK(8)),
        "sae in the middle of a block": sae("resid_mid@1"),
        "sae of attention": sae("attn_out@0"),
        "sae of head values": sae("attn_z@1"),
        "sae of one head": sae("attn_head@1.2"),
        "sae of an mlp": sae("mlp_out@2", activation=JumpReLU(0.2), scaling="layer_norm"),
        "scaled sae": sae("resid_pre@2", scaling="unit_norm", activation=BatchTopK(threshold=0.3)),
        "transcoder": transcoder(1),
        "skip transcoder": transcoder(1, skip=True),
        "transcoders of all layers": DictionarySet(tuple(transcoder(i, seed=i) for i in range(3))),
        "cross-layer transcoders": cross_layer(),
    }


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 90, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bare(tiny_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir).eval().requires_grad_(False)


def by_hand(bare: Any, tokens: Tensor, hooks: Hooks) -> Tensor:
    """Logits of the bare model with functions at ``resid_post@L``, ``mlp_in@L`` or ``mlp_out@L``."""
    handles = []
    for site, function in hooks.items():
        kind, layer = site.split("@")
        block = bare.model.layers[int(layer)]
        if kind == "mlp_in":
            handles.append(block.mlp.register_forward_pre_hook(lambda m, a, f=function: (f(a[0]),)))
        else:
            module = {"mlp_out": block.mlp, "resid_post": block}[kind]
            handles.append(module.register_forward_hook(lambda m, a, out, f=function: f(out)))
    try:
        return bare(tokens).logits
    finally:
        for handle in handles:
            handle.remove()


def dense(d: Dictionary, x: Tensor) -> Tensor:
    """Activations [batch, pos, F] of a ReLU or JumpReLU dictionary in float64."""
    pre = x.double() @ d.W_enc[0].double() + d.b_enc.double()
    level = d.activation.threshold if isinstance(d.activation, JumpReLU) else 0.0
    return pre * (pre > level)


@pytest.mark.parametrize("kind", every_kind())
def test_with_errors_kept_nothing_changes(tiny_model: Model, tokens: Tensor, kind: str) -> None:
    dictionary = every_kind()[kind]
    plain = tiny_model.logits(tokens)
    edits = splice(dictionary)
    for _ in range(2):  # the same edits serve another forward
        kept = tiny_model.logits(tokens, edits=edits)
        assert (kept - plain).abs().max() < 1e-4 * plain.abs().max()
    replaced = tiny_model.logits(tokens, edits=splice(dictionary, keep_error=False))
    assert (replaced - plain).abs().max() > 1e-2 * plain.abs().max()
    fixed = clean_errors(tiny_model, dictionary, tokens)
    held = tiny_model.logits(tokens, edits=splice(dictionary, errors=fixed))
    assert (held - plain).abs().max() < 1e-4 * plain.abs().max()


def test_without_errors_the_reconstruction_goes_on(tiny_model: Model, bare: Any, tokens: Tensor) -> None:
    d = sae("resid_post@1")

    def reconstruct(x: Tensor) -> Tensor:
        return (dense(d, x) @ d.W_dec[0].double() + d.b_dec[0].double()).float()

    want = by_hand(bare, tokens, {"resid_post@1": reconstruct})
    torch.testing.assert_close(tiny_model.logits(tokens, edits=splice(d, keep_error=False)), want, atol=2e-4, rtol=1e-4)


def test_ablating_a_latent_takes_off_what_it_writes(tiny_model: Model, bare: Any, tokens: Tensor) -> None:
    d = sae("resid_post@1")

    def without(x: Tensor) -> Tensor:
        active = dense(d, x)
        return (x.double() - active[..., [5, 17]] @ d.W_dec[0][[5, 17]].double()).float()

    want = by_hand(bare, tokens, {"resid_post@1": without})
    assert (want - bare(tokens).logits).abs().max() > 0.1
    got = tiny_model.logits(tokens, edits=splice(d, ablate(5, 17)))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_clamping_a_latent_holds_it_everywhere(tiny_model: Model, bare: Any, tokens: Tensor) -> None:
    d = transcoder(1, skip=True)
    read: list[Tensor] = []

    def held(out: Tensor) -> Tensor:
        change = 4.0 - dense(d, read[0])[..., 7]
        return (out.double() + change[..., None] * d.W_dec[0][7].double()).float()

    want = by_hand(bare, tokens, {"mlp_in@1": lambda x: (read.append(x), x)[1], "mlp_out@1": held})
    got = tiny_model.logits(tokens, edits=splice(d, clamp({7: 4.0})))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_cross_layer_edit_reaches_every_layer_written(
    tiny_model: Model, bare: Any, tokens: Tensor, frozen: bool
) -> None:
    """Layer 0's latents change layers 0 to 2; whether later layers see the change decides where errors come from."""
    layers = cross_layer()
    clean: dict[int, Tensor] = {}
    by_hand(bare, tokens, {f"mlp_in@{i}": lambda x, i=i: clean.setdefault(i, x) for i in range(3)})
    read: dict[int, Tensor] = {}
    out_clean: dict[int, Tensor] = {}
    by_hand(bare, tokens, {f"mlp_out@{j}": lambda x, j=j: out_clean.setdefault(j, x) for j in range(3)})

    def written(j: int, inputs: Mapping[int, Tensor], scale: float) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64)
        for i in range(j + 1):
            d = layers[i]
            active = dense(d, inputs[i]) * (scale if i == 0 else 1.0)
            total = total + active @ d.W_dec[j - i].double() + d.b_dec[j - i].double()
        return total

    def at(j: int) -> Callable[[Tensor], Tensor]:
        def changed(out: Tensor) -> Tensor:
            base = out_clean[j] - written(j, clean, 1.0) if frozen else out - written(j, read, 1.0)
            return (written(j, read, 3.0) + base).float()

        return changed

    hooks: dict[str, Any] = {f"mlp_in@{i}": lambda x, i=i: read.setdefault(i, x) for i in range(3)}
    want = by_hand(bare, tokens, hooks | {f"mlp_out@{j}": at(j) for j in range(3)})
    errors = clean_errors(tiny_model, layers, tokens) if frozen else None
    edit = {0: lambda features: features.with_values(3.0 * features.values)}
    got = tiny_model.logits(tokens, edits=splice(layers, edit, errors=errors))
    torch.testing.assert_close(got, want, atol=5e-4, rtol=5e-4)
    assert (got - tiny_model.logits(tokens)).abs().max() > 0.1


def crosscoder() -> Dictionary:
    ports = [Port("resid_post@0", 0), Port("resid_post@1", 1)]
    return random_dictionary(ports, ports, "crosscoder", activation=TopK(10), norm=torch.rand(F) + 0.5)


def test_one_side_of_a_crosscoder(tiny_model: Model, tokens: Tensor) -> None:
    d = crosscoder()
    other = {Port("resid_post@1", 1): tiny_model.capture(tokens.flip(0), ["resid_post@1"])["resid_post@1"]}
    plain = tiny_model.logits(tokens)
    kept = tiny_model.logits(tokens, edits=splice(d, given=other))
    assert (kept - plain).abs().max() < 1e-4 * plain.abs().max()
    own = tiny_model.capture(tokens, ["resid_post@0"])["resid_post@0"]
    want = d.reconstruct(own.flatten(0, 1), other[Port("resid_post@1", 1)].flatten(0, 1))[0].reshape(own.shape)
    sites = splice(d, keep_error=False, given=other)
    assert list(sites) == ["resid_post@0"]
    got = tiny_model.capture(tokens, ["resid_post@0"], edits=sites)["resid_post@0"]
    torch.testing.assert_close(got, want)
    with pytest.raises(DictionaryError, match=r"also reads resid_post@1 of model 1.*Give that model's"):
        splice(d)
    with pytest.raises(DictionaryError, match="writes nothing to model 2"):
        splice(d, side=2)
    with pytest.raises(ValueError, match="of \\[batch, pos\\] \\[2, 9\\], this forward \\[3, 9\\]"):
        tiny_model.logits(tokens, edits=splice(d, given={port: value[:2] for port, value in other.items()}))


def test_layers_of_one_model_need_activations_the_forward_has_not_come_to(tiny_model: Model, tokens: Tensor) -> None:
    ports = [Port("resid_post@0"), Port("resid_post@2")]
    d = random_dictionary(ports, ports, "crosscoder")
    with pytest.raises(DictionaryError, match=r"writes resid_post@0 before .* resid_post@2, which it reads"):
        splice(d)
    clean = tiny_model.capture(tokens, ["resid_post@2"])["resid_post@2"]
    plain = tiny_model.logits(tokens)
    kept = tiny_model.logits(tokens, edits=splice(d, given={ports[1]: clean}))
    assert (kept - plain).abs().max() < 1e-4 * plain.abs().max()
    both = tiny_model.capture(tokens, [port.site for port in ports])
    kept = tiny_model.logits(tokens, edits=splice(d, ablate(3), given={port: both[port.site] for port in ports}))
    assert (kept - plain).abs().max() > 1e-3


def test_padding_changes_no_real_token(tiny_model: Model) -> None:
    row, long = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 8, 60, 61, 0]])
    for dictionary in (sae("resid_post@1", activation=TopK(4)), cross_layer()):
        edit = ablate(1, 2, 3) if isinstance(dictionary, Dictionary) else {1: ablate(1, 2, 3)}
        edits = splice(dictionary, edit, keep_error=False)
        alone = tiny_model.logits(row, edits=edits)
        torch.testing.assert_close(tiny_model.logits(long, edits=edits)[:, :4], alone, atol=1e-5, rtol=1e-5)


def test_rows_of_the_features_are_positions(tiny_model: Model, tokens: Tensor) -> None:
    """An edit at one row changes that position's text from there on and nothing else."""
    d = sae("resid_post@1")

    def at_row(features: FeatureCSR) -> FeatureCSR:
        return features.with_values(features.values.where(features.tokens != 1 * 9 + 4, 0.0))

    change = (tiny_model.logits(tokens, edits=splice(d, at_row)) - tiny_model.logits(tokens)).abs().amax(-1)
    assert change[[0, 2]].max() < 1e-4 and change[1, :4].max() < 1e-4 < 1e-2 < change[1, 4]


def test_what_cannot_be_spliced_is_refused(tiny_model: Model, tokens: Tensor) -> None:
    with pytest.raises(DictionaryError, match=r"'blocks\.1\.hook_resid_pre' is a hook of other software"):
        splice(sae("blocks.1.hook_resid_pre"))
    with pytest.raises(DictionaryError, match=r"depends on the other tokens.*threshold="):
        splice(sae("resid_post@1", activation=BatchTopK(k=4)))
    with pytest.raises(DictionaryError, match=r"resid_post@1 of the model is 32 wide, the dictionary 24"):
        tiny_model.logits(tokens, edits=splice(sae("resid_post@1", width=24)))
    with pytest.raises(SiteError, match="resid_post@7"):
        tiny_model.logits(tokens, edits=splice(sae("resid_post@7")))
    with pytest.raises(ValueError, match="errors must be kept"):
        splice(sae("resid_post@1"), keep_error=False, errors={"resid_post@1": torch.zeros(3, 9, D)})
    with pytest.raises(ValueError, match="errors must be kept and be those of"):
        splice(sae("resid_post@1"), errors={"resid_post@0": torch.zeros(3, 9, D)})
    with pytest.raises(ValueError, match=r"errors at resid_post@1 are \[1, 9, 32\]"):
        tiny_model.logits(tokens, edits=splice(sae("resid_post@1"), errors={"resid_post@1": torch.zeros(1, 9, D)}))
    with pytest.raises(ValueError, match="must keep tokens and latents"):
        tiny_model.logits(tokens, edits=splice(sae("resid_post@1"), lambda features: features[:3]))
    with pytest.raises(ValueError, match="by number of the layer, 0 to 2"):
        splice(cross_layer(), {3: ablate(1)})


# --- loss recovered ---


@pytest.fixture(scope="module")
def texts(tiny_model: Model) -> list[Encoded]:
    """What the model writes itself, so that any ablation costs it something; one text predicts nothing."""
    written = sample_corpus(tiny_model, texts=24, length=16, seed=0)
    return [tiny_model.encode(text) for text in ("river", *(text.text for text in written.texts))]


def exact(site: str) -> Dictionary:
    """Latents for both signs of every coordinate: reconstructs anything."""
    eye = torch.eye(D)
    both = torch.cat([eye, -eye])
    return Dictionary(
        kind="sae", reads=(Port(site),), writes=(Port(site),), W_enc=(both.T.contiguous(),), b_enc=torch.zeros(2 * D),
        W_dec=(both,), b_dec=(torch.zeros(D),), activation=ReLU(),
    )  # fmt: skip


def test_loss_recovered_is_1_of_a_perfect_dictionary_and_0_of_the_mean(
    tiny_model: Model, bare: Any, texts: list[Encoded]
) -> None:
    site = "resid_post@1"
    long = [text for text in texts if len(text.ids) > 1]
    assert len(long) < len(texts)
    perfect = loss_recovered(tiny_model, exact(site), texts, batch_tokens=40)
    assert perfect.recovered == pytest.approx(1.0, abs=1e-4)
    assert perfect.recovered_from_zero == pytest.approx(1.0, abs=1e-4)
    stream = [bare(torch.tensor([t.ids]), output_hidden_states=True).hidden_states[2][0].double() for t in long]
    middle = torch.cat(stream).mean(0)
    torch.testing.assert_close(means(tiny_model, long, [site], batch_tokens=40)[site], middle, atol=1e-5, rtol=1e-5)
    constant = sae(site, activation=JumpReLU(1e9))
    constant = Dictionary(**{**constant.__dict__, "b_dec": (middle.float(),)})
    dead = loss_recovered(tiny_model, constant, texts, batch_tokens=40)
    assert dead.recovered == pytest.approx(0.0, abs=1e-4)

    def by_text(hooks: Hooks) -> float:
        sums = [
            torch.nn.functional.cross_entropy(
                by_hand(bare, torch.tensor([t.ids]), hooks)[0, :-1], torch.tensor(t.ids[1:]), reduction="sum"
            )
            for t in long
        ]
        return float(sum(sums)) / sum(len(t.ids) - 1 for t in long)

    assert dead.n_tokens == perfect.n_tokens == sum(len(t.ids) - 1 for t in long)
    assert perfect.original == pytest.approx(by_text({}), rel=1e-5)
    assert perfect.zero_ablated == pytest.approx(by_text({site: torch.zeros_like}), rel=1e-5)
    assert perfect.mean_ablated == pytest.approx(by_text({site: lambda x: middle.float().expand_as(x)}), rel=1e-5)
    assert "recovered over" in str(perfect)


def test_loss_recovered_of_a_crosscoder_reads_both_models(tiny_model: Model, texts: list[Encoded]) -> None:
    ports = [Port("resid_post@1", 0), Port("resid_post@1", 1)]
    one = exact("resid_post@1")
    half = Dictionary(
        kind="crosscoder",
        reads=tuple(ports),
        writes=tuple(ports),
        W_enc=(one.W_enc[0] / 2, one.W_enc[0] / 2),
        b_enc=one.b_enc,
        W_dec=one.W_dec * 2,
        b_dec=one.b_dec * 2,
        activation=ReLU(),
    )
    for side in (0, 1):
        assert loss_recovered([tiny_model, tiny_model], half, texts, side=side).recovered == pytest.approx(1, abs=1e-4)
    with pytest.raises(DictionaryError, match=r"reads model 1.*Give 2 models"):
        loss_recovered(tiny_model, half, texts)


def test_an_ablation_that_costs_nothing_measures_nothing() -> None:
    assert LossRecovered(2.0, 1.9, 1.95, 3.0, 10).recovered is None
    assert LossRecovered(2.0, 2.1, 1.95, 3.0, 10).recovered_from_zero == pytest.approx(0.9)


def test_texts_that_predict_nothing_are_refused(tiny_model: Model) -> None:
    with pytest.raises(CorpusError, match="no text of two tokens"):
        loss_recovered(tiny_model, sae("resid_post@1"), [tiny_model.encode("river")])
