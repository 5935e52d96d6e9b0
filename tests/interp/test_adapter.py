"""Adapters against peft's own merge, and every way in which one may not fit."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heredity.interp.errors import AdapterError
from heredity.interp.load import load

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "attention": LORA,
    "rank-stabilised": LORA | {"use_rslora": True},
    "by pattern": LORA
    | {"target_modules": r".*layers\.[12]\.mlp\.(up|down)_proj"}
    | {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"layers.2.mlp.up_proj": 7}},
    "some layers": LORA | {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "all linear": LORA | {"target_modules": "all-linear"},
    "whole head": LORA | {"modules_to_save": ["lm_head"]},
    "embedding": LORA | {"target_modules": ["embed_tokens", "q_proj"]},
}  # fmt: skip


def make_adapter(base: Path, out: Path, **fields: Any) -> Any:
    """A PEFT directory with random factors, written by peft; returns peft's merged model."""
    import peft
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice about tied and saved embeddings
        torch.manual_seed(3)
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn_like(parameter)
        model.save_pretrained(str(out))
    return model.merge_and_unload().requires_grad_(False)


@pytest.fixture(scope="module")
def gpt2_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 stores its projections transposed and shares its embedding with the output."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("gpt2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        ).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_a_merged_adapter_is_peft_s_bit_for_bit(tiny_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    merged = make_adapter(tiny_dir, tmp_path / "lora", **fields)
    model, base = load(f"{tiny_dir}+{tmp_path / 'lora'}"), load(str(tiny_dir))
    ours = dict(load_merged(model))
    for name, value in merged.state_dict().items():
        assert torch.equal(ours[name], value), name
    tokens = torch.arange(12)[None]
    assert torch.equal(model.logits(tokens), merged_eager(merged, tokens))
    assert (model.logits(tokens) - base.logits(tokens)).abs().max() > 1e-2
    assert model.digest != base.digest


def load_merged(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters of the wrapped model under the names they have unwrapped."""
    hf = model.bridge.original_model
    return [
        (n.replace("._original_component", "").replace(".original_component", ""), v)
        for n, v in hf.state_dict().items()
    ]


def merged_eager(merged: Any, tokens: torch.Tensor) -> torch.Tensor:
    merged.set_attn_implementation("eager")
    return merged(tokens).logits


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["c_proj", "c_fc"]}, {"target_modules": ["c_attn"], "bias": "all"}],
    ids=["projections", "biases"],
)
def test_transposed_projections_and_biases(gpt2_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    merged = make_adapter(gpt2_dir, tmp_path / "lora", **(LORA | {"fan_in_fan_out": True} | fields))
    model = load(f"{gpt2_dir}+{tmp_path / 'lora'}")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(model.logits(tokens), merged_eager(merged, tokens), atol=1e-5, rtol=1e-5)


def test_a_half_precision_adapter_is_merged_in_float32(tiny_dir: Path, tmp_path: Path) -> None:
    make_adapter(tiny_dir, tmp_path / "lora", **LORA)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({n: v.half() for n, v in load_file(path).items()}, path)
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    merged: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).merge_and_unload()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        want = merged_eager(merged, tokens)
    assert torch.equal(load(f"{tiny_dir}+{tmp_path / 'lora'}").logits(tokens), want)


def test_the_digest_is_of_the_content(tiny_dir: Path, tmp_path: Path) -> None:
    make_adapter(tiny_dir, tmp_path / "one", **LORA)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    digest = load(f"{tiny_dir}+{tmp_path / 'one'}").digest
    edit(tmp_path / "two", base_model_name_or_path="org/elsewhere", lora_dropout=0.5)
    assert load(f"{tiny_dir}+{tmp_path / 'two'}").digest == digest
    edit(tmp_path / "two", lora_alpha=4)
    assert load(f"{tiny_dir}+{tmp_path / 'two'}").digest != digest


# --- refusals ---

A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda directory: edit(directory, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return rewrite


def also(name: str, like: str) -> Callable[[Path], object]:
    return tensors(lambda held: held.update({name: held[like].clone()}))


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda d: (d / "adapter_config.json").unlink(), r"no adapter_config\.json"),
    ("no weights", lambda d: (d / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    ("pickled", pickled, r"adapter_model\.bin: pickled weights"),
    ("config not JSON", lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    ("truncated", lambda d: (p := d / "adapter_model.safetensors").write_bytes(p.read_bytes()[:-8]), "truncated"),
    ("no tensors", tensors(lambda t: t.clear()), "holds no tensors"),
    ("other kind", config(peft_type="IA3"), "peft_type: 'IA3' is not LORA"),
    ("no kind", config(peft_type=None), "peft_type: 'None' is not LORA"),
    ("DoRA", config(use_dora=True), "use_dora: not supported"),
    ("code", config(auto_mapping={"base_model_class": "X", "parent_library": "evil"}), "auto_mapping: not supported"),
    ("megatron", config(megatron_config={"x": 1}), "megatron_config: not supported"),
    ("layers copied", config(layer_replication=[[0, 2]]), "layer_replication: not supported"),
    ("unknown field", config(nonesuch=3), "nonesuch: not supported"),
    ("changed base", config(init_lora_weights="pissa"), "init_lora_weights: this initialisation also changed"),
    ("rank in words", config(r="2"), "r: 2 is not a rank"),
    ("rank zero", config(r=0), "r: 0 is not a rank"),
    ("huge rank", config(r=10**9), "r: 1000000000 is not a rank"),
    ("other rank", config(r=4), r"A \[2, 32\] and B \[\d+, 2\] do not make a rank-4 change"),
    ("alpha in words", config(lora_alpha="much"), "lora_alpha: much is not a number"),
    ("alpha infinite", config(lora_alpha=float("inf")), "lora_alpha: inf is not a number"),
    ("bias", config(bias="some"), "bias: 'some' is not"),
    ("slow pattern", config(alpha_pattern={"(a+)+b": 1}), "alpha_pattern: pattern .* is not a plain module name"),
    ("broken pattern", config(rank_pattern={"(": 1}), "rank_pattern: pattern"),
    ("targets a number", config(target_modules=3), "target_modules: not a list"),
    ("more targets than tensors", config(target_modules=["q_proj", "o_proj"]), "o_proj: target_modules lists it"),
    ("unstored module", config(modules_to_save=["lm_head"]), "lm_head: modules_to_save lists it"),
    ("B missing", tensors(lambda t: t.pop(B)), "q_proj: lora_B is missing"),
    ("pair missing", tensors(lambda t: (t.pop(A), t.pop(B))), r"layers\.1\.self_attn\.q_proj: target_modules lists it"),
    ("A narrow", tensors(lambda t: t.update({A: torch.zeros(2, 31)})), r"A \[2, 31\] and B \[32, 2\] do not make"),
    ("A flat", tensors(lambda t: t.update({A: torch.zeros(64)})), r"A \[64\]"),
    ("NaN", tensors(lambda t: t[A].fill_(float("nan"))), rf"{A}: NaN"),
    ("integers", tensors(lambda t: t.update({A: t[A].to(torch.int32)})), f"{A}: dtype I32"),
    ("other module", also(A.replace("layers.1", "layers.9"), A), r"layers\.9\.self_attn\.q_proj: the base has no such"),
    ("a norm", also(A.replace("self_attn.q_proj", "input_layernorm"), A), "layernorm: the base has no such linear"),
    ("stray weight", also("base_model.model.lm_head.weight", A), "lm_head.weight: nothing in the base"),
    ("stray base layer", also("base_model.model.lm_head.base_layer.weight", A), "lm_head.weight: nothing in the base"),
    ("magnitudes", also(A.replace("lora_A.weight", "lora_magnitude_vector"), A), "vector: nothing in the base"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "lora"
    make_adapter(tiny_dir, directory, **LORA)
    return directory


@pytest.mark.parametrize(("fault", "why"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_adapter_is_refused(
    tiny_dir: Path, sound: Path, tmp_path: Path, fault: Callable[[Path], object], why: str
) -> None:
    adapter = Path(shutil.copytree(sound, tmp_path / "lora"))
    fault(adapter)
    with pytest.raises(AdapterError, match=why) as caught:
        load(f"{tiny_dir}+{adapter}")
    line = str(caught.value)
    assert "\n" not in line and str(adapter) in line and "docs/errors/adapter.md" in line


def test_an_adapter_of_another_base_is_refused(gpt2_dir: Path, sound: Path) -> None:
    with pytest.raises(AdapterError, match="the base has no such linear or embedding module"):
        load(f"{gpt2_dir}+{sound}")


def test_an_adapter_of_a_shared_embedding_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    make_adapter(gpt2_dir, tmp_path / "lora", **(LORA | {"target_modules": ["wte"]}))
    with pytest.raises(AdapterError, match=r"transformer\.wte\.weight: .*input and output share"):
        load(f"{gpt2_dir}+{tmp_path / 'lora'}")
