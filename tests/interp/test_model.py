"""The hooked model against the bare one, on small random models of four families."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.interp.errors import SiteError
from heredity.interp.load import load
from heredity.interp.model import Model, pad
from heredity.interp.sites import parse_site

FAMILIES = ("llama", "gpt2", "neox", "gemma2")
LAYERS, HEADS, WIDTH = 3, 4, 32


def config(family: str) -> Any:
    import transformers as t

    common = {
        "vocab_size": 200,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    match family:
        case "llama":
            return t.LlamaConfig(**common, num_key_value_heads=2)
        case "neox":
            return t.GPTNeoXConfig(**common, bos_token_id=None, eos_token_id=None)
        case "gemma2":
            return t.Gemma2Config(**common, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8)
        case _:
            return t.GPT2Config(
                vocab_size=200, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, initializer_range=0.2,
                bos_token_id=0, eos_token_id=0,
            )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A model loaded from its directory, and the same model bare."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(1)
        bare = AutoModelForCausalLM.from_config(config(request.param)).eval()
        for name, value in bare.named_parameters():  # biases and norms start as constants, which would hide mistakes
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                value.data += 0.1 * torch.randn_like(value)
    directory = tmp_path_factory.mktemp(request.param)
    bare.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)
    return load(str(directory)), bare.requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(200, (2, 11), generator=torch.Generator().manual_seed(0))


def test_logits_and_hidden_states_are_the_bare_model_s(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, bare = both
    out = bare(tokens, output_hidden_states=True)
    logits = model.logits(tokens)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, out.logits, atol=2e-5, rtol=1e-5)
    stream = model.capture(tokens, [f"resid_pre@{layer}" for layer in range(LAYERS)])
    for layer in range(LAYERS):
        torch.testing.assert_close(stream[f"resid_pre@{layer}"], out.hidden_states[layer], atol=2e-5, rtol=1e-5)
    after = model.capture(tokens, ["resid_post@0", f"resid_post@{LAYERS - 1}", "final"])
    torch.testing.assert_close(after["resid_post@0"], out.hidden_states[1], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(after[f"resid_post@{LAYERS - 1}"], after["final"])
    torch.testing.assert_close(model.bridge.ln_final(after["final"]), out.hidden_states[-1], atol=2e-5, rtol=1e-5)


def test_module_outputs_are_the_bare_model_s(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, bare = both
    core = getattr(bare, bare.base_model_prefix)
    block = (getattr(core, "layers", None) or core.h)[1]
    attention = next(getattr(block, n) for n in ("self_attn", "attn", "attention") if hasattr(block, n))
    want: dict[str, Tensor] = {}
    handles = [
        attention.register_forward_hook(lambda m, a, out: want.__setitem__("attn_out@1", out[0])),
        block.mlp.register_forward_hook(lambda m, a, out: want.__setitem__("mlp_out@1", out)),
        block.mlp.register_forward_pre_hook(lambda m, a: want.__setitem__("mlp_in@1", a[0])),
        core.get_input_embeddings().register_forward_hook(lambda m, a, out: want.__setitem__("embed", out)),
    ]
    before_mlp = next(
        getattr(block, n)
        for n in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
        if hasattr(block, n)
    )
    if "NeoX" not in model.shape.architecture:
        handles.append(before_mlp.register_forward_pre_hook(lambda m, a: want.__setitem__("resid_mid@1", a[0])))
    bare(tokens)
    for handle in handles:
        handle.remove()
    got = model.capture(tokens, list(want))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_head_writes_sum_to_the_attention_output(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    heads = [f"attn_head@1.{h}" for h in range(HEADS)]
    seen = model.capture(tokens, ["attn_out@1", "attn_z@1", *heads])
    assert seen["attn_z@1"].shape == (*tokens.shape, HEADS, model.shape.d_head)
    torch.testing.assert_close(sum(seen[h] for h in heads), seen["attn_out@1"], atol=2e-5, rtol=1e-5)
    weight, bias = model.head_weights(1)
    assert bool(bias.abs().sum() > 0) == (model.shape.architecture in ("GPT2LMHeadModel", "GPTNeoXForCausalLM"))
    by_hand = torch.einsum("bphd,hdm->bpm", seen["attn_z@1"], weight) + bias
    torch.testing.assert_close(by_hand, seen["attn_out@1"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "site",
    ["embed", "final", "resid_pre@1", "resid_post@1", "attn_out@1", "attn_z@1", "mlp_in@1", "mlp_post@1", "mlp_out@1"],
)
def test_an_edit_changes_its_site_and_what_follows(both: tuple[Model, Any], tokens: Tensor, site: str) -> None:
    model, _ = both
    noise = torch.randn(model.capture(tokens, [site])[site].shape, generator=torch.Generator().manual_seed(2))
    earlier = "resid_pre@1" if site not in ("embed", "resid_pre@1") else None
    plain, clean = model.logits_and_capture(tokens, [site, "final", *([earlier] if earlier else [])])
    edited, changed = model.logits_and_capture(tokens, list(clean), edits={site: lambda value: value + noise})
    torch.testing.assert_close(changed[site], clean[site] + noise)
    assert (changed["final"] - clean["final"]).abs().max() > 1e-2
    assert (edited - plain).abs().max() > 1e-2
    if earlier:
        assert torch.equal(changed[earlier], clean[earlier])
    assert torch.equal(model.logits(tokens), plain), "an edit outlived its forward"


def test_logits_of_some_positions_only(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    whole, seen = model.logits_and_capture(tokens, ["final"])
    last, same = model.logits_and_capture(tokens, ["final"], positions=torch.tensor([tokens.shape[1] - 1]))
    torch.testing.assert_close(last, whole[:, -1:])
    assert torch.equal(seen["final"], same["final"])


def test_an_edit_at_one_position_leaves_earlier_positions_alone(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both

    def at_five(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[:, 5] += 3.0 * torch.arange(value.shape[-1])
        return changed

    difference = (model.logits(tokens, edits={"resid_post@0": at_five}) - model.logits(tokens)).abs()
    assert difference[:, :5].max() < 1e-5 < 1e-2 < difference[:, 5:].max()


def test_editing_one_head_changes_the_attention_output_by_as_much(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    heads = [f"attn_head@1.{h}" for h in range(HEADS)]
    clean = model.capture(tokens, ["attn_out@1", *heads])
    edits = {"attn_head@1.2": torch.zeros_like, "attn_head@1.3": lambda write: 2 * write}
    changed = model.capture(tokens, ["attn_out@1", *heads], edits=edits)
    assert torch.equal(changed["attn_head@1.0"], clean["attn_head@1.0"])
    torch.testing.assert_close(changed["attn_head@1.2"], torch.zeros_like(clean["attn_out@1"]), atol=1e-6, rtol=0)
    want = clean["attn_out@1"] - clean["attn_head@1.2"] + clean["attn_head@1.3"]
    torch.testing.assert_close(changed["attn_out@1"], want, atol=2e-5, rtol=1e-5)


def test_editing_the_middle_of_a_block_reaches_the_stream_and_the_mlp(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    if "NeoX" in model.shape.architecture:
        with pytest.raises(SiteError, match="resid_mid@1"):
            model.capture(tokens, ["resid_mid@1"])
        return
    sites = ["resid_mid@1", "mlp_in@1", "resid_post@1"]
    clean = model.capture(tokens, sites)

    def mix(value: Tensor) -> Tensor:
        return 0.5 * value + value.roll(1, -1)

    # The same change made at the MLP's input alone leaves the skip connection as it was.
    changed = model.capture(tokens, sites, edits={"resid_mid@1": mix})
    branch = model.capture(tokens, sites, edits={"mlp_in@1": lambda value: changed["mlp_in@1"]})
    assert (changed["mlp_in@1"] - clean["mlp_in@1"]).abs().max() > 1e-2
    want = branch["resid_post@1"] - clean["resid_mid@1"] + mix(clean["resid_mid@1"])
    torch.testing.assert_close(changed["resid_post@1"], want, atol=2e-5, rtol=1e-5)


def test_capture_stops_where_it_has_seen_enough(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    fired: list[str] = []

    def note(name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: fired.append(name) or value

    names = ["embed", "resid_post@0", "resid_pre@1", "mlp_out@1", "resid_post@2", "final"]
    model.capture(tokens, ["resid_post@0", "embed"], edits={name: note(name) for name in names})
    assert fired == ["embed", "resid_post@0"]
    fired.clear()
    model.logits(tokens, edits={name: note(name) for name in names})
    assert fired == names


def test_a_forward_inside_an_edit_leaves_the_outer_edits_alone(tiny_model: Model, tokens: Tensor) -> None:
    ids = tokens % tiny_model.shape.d_vocab
    alone = tiny_model.logits(ids, edits={"resid_post@1": torch.zeros_like})
    inner: list[Tensor] = []

    def nested(value: Tensor) -> Tensor:
        if not inner:
            inner.append(value)
            tiny_model.capture(ids, ["resid_post@1"])
        return value

    torch.testing.assert_close(
        tiny_model.logits(ids, edits={"resid_post@0": nested, "resid_post@1": torch.zeros_like}), alone
    )


def test_hooks_are_removed_after_an_error(tiny_model: Model, tokens: Tensor) -> None:
    ids = tokens % tiny_model.shape.d_vocab
    plain = tiny_model.logits(ids)

    def fail(value: Tensor) -> Tensor:
        raise RuntimeError("from an edit")

    with pytest.raises(RuntimeError, match="from an edit"):
        tiny_model.logits(ids, edits={"embed": torch.zeros_like, "mlp_out@1": fail})
    assert torch.equal(tiny_model.logits(ids), plain)


def test_gradients_reach_an_edit(tiny_model: Model, tokens: Tensor) -> None:
    ids = tokens % tiny_model.shape.d_vocab
    scale = torch.ones((), requires_grad=True)
    with torch.enable_grad():
        tiny_model.logits(ids, edits={"attn_head@1.2": lambda write: write * scale})[:, -1, 7].sum().backward()
    with torch.no_grad():
        step = 1e-2
        up, down = (
            tiny_model.logits(ids, edits={"attn_head@1.2": lambda write, s=s: write * s})[:, -1, 7].sum()
            for s in (1 + step, 1 - step)
        )
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (up - down) / (2 * step), rtol=2e-2, atol=1e-4)


def test_steps_with_a_cache_equal_one_forward(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    want = model.logits(tokens)
    past = None
    for position in range(tokens.shape[1]):
        last, past = model.step(tokens[:, position : position + 1], past)
        torch.testing.assert_close(last, want[:, position], atol=5e-5, rtol=1e-4)


def test_padding_on_the_right_changes_no_real_token(tiny_model: Model) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    batch, real = pad(rows, fill=3)
    assert batch.tolist() == [rows[0], [*rows[1], 3, 3, 3]]
    assert real.sum(1).tolist() == [6, 3]
    torch.testing.assert_close(
        tiny_model.logits(batch)[1, :3], tiny_model.logits(torch.tensor([rows[1]]))[0], atol=1e-5, rtol=1e-5
    )


def test_the_shape_says_what_decides_comparability(both: tuple[Model, Any]) -> None:
    model, bare = both
    shape = model.shape
    assert (shape.architecture, shape.n_layers, shape.n_heads) == (type(bare).__name__, LAYERS, HEADS)
    assert (shape.d_model, shape.d_head, shape.d_vocab, shape.n_ctx) == (WIDTH, 8, 200, 64)
    assert shape.n_kv_heads == (2 if shape.architecture in ("LlamaForCausalLM", "Gemma2ForCausalLM") else HEADS)
    assert model.n_params == bare.num_parameters()


@pytest.mark.parametrize(
    "name",
    ["", "embed@0", "resid_pre", "resid_pre@3", "resid_pre@-1", "resid_pre@01", "attn_head@0", "attn_head@0.4",
     "attn_z@0.1", "mlp_out@0 ", "unembed", "resid_pre@99999999999999999999", "embed\n"],
)  # fmt: skip
def test_a_name_the_model_does_not_have_is_refused(tiny_model: Model, tokens: Tensor, name: str) -> None:
    with pytest.raises(SiteError, match=r"no site .* L < 3, H < 4.*docs/errors/site\.md"):
        tiny_model.capture(tokens, [name])
    with pytest.raises(SiteError):
        tiny_model.logits(tokens, edits={name: copy.copy})


@pytest.mark.parametrize("name", ["embed", "final", "resid_mid@12", "attn_head@3.0"])
def test_a_site_s_name_reads_back(name: str) -> None:
    assert str(parse_site(name)) == name


def test_spans_are_the_words_of_the_text(tiny_model: Model) -> None:
    text = "the old bridge , the new road"
    encoded = tiny_model.encode(text)
    assert [text[a:b] for a, b in encoded.spans] == text.split()
    assert tiny_model.decode(encoded.ids) == text


def test_neurons_make_what_the_mlp_returns(both: tuple[Model, Any], tokens: Tensor) -> None:
    model, _ = both
    seen = model.capture(tokens, ["mlp_post@1", "mlp_out@1"])
    weight, bias = model.neuron_weights(1)
    torch.testing.assert_close(seen["mlp_post@1"] @ weight + bias, seen["mlp_out@1"], atol=2e-5, rtol=1e-5)
