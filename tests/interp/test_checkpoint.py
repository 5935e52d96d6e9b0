"""Every refusal, with a directory that really has the fault."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heredity.interp.errors import HeredityError, ModelError, TokenizerError
from heredity.interp.load import load

Fault = Callable[[Path], object]


@pytest.fixture
def model_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def refused(directory: Path | str, why: str, kind: type[HeredityError] = ModelError) -> str:
    with pytest.raises(kind, match=why) as caught:
        load(str(directory))
    line = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in line and "\x1b" not in line and f"docs/errors/{kind.page}.md" in line
    assert len(line) <= 600 and caught.value.remedy
    return line


def config(**changes: Any) -> Fault:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        said = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in said.items() if v != "(gone)"}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return rewrite


def header(change: Callable[[dict[str, Any]], object]) -> Fault:
    """Rewrite the header alone; the tensors' bytes stay."""

    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        said = json.loads(raw[8 : 8 + length])
        change(said)
        text = json.dumps(said).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return rewrite


def weights(change: Callable[[bytes], bytes]) -> Fault:
    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def index(**shards: str) -> Fault:
    """Split the weights in two real shards, then let the index say what ``shards`` says of some tensors."""

    def rewrite(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        names = sorted(held)
        weight_map = {}
        for shard, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
            save_file({n: held[n] for n in part}, directory / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        (directory / "model.safetensors").unlink()
        weight_map |= {name.replace("__", "."): shard for name, shard in shards.items()}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return rewrite


class Bomb:
    """Leaves a mark where it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path / "BOOM",)


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(directory)))


Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"

FAULTS: list[tuple[str, Fault, str]] = [
    # files
    ("no weights", lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    ("pickles only", only_pickles, r"pytorch_model\.bin: pickled weights can run code .* safe_serialization"),
    ("no config", lambda d: (d / "config.json").unlink(), r"no config\.json\. Give"),
    ("an adapter", lambda d: (d / "config.json").rename(d / "adapter_config.json"), r"is an adapter.*BASE\+ADAPTER"),
    ("code", lambda d: (d / "modeling_evil.py").write_text("raise SystemExit"), r"modeling_evil\.py: .*holds code"),
    # configuration
    ("config not JSON", lambda d: (d / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    ("config a list", lambda d: (d / "config.json").write_text("[]"), "JSON object was expected, not list"),
    ("config nested", lambda d: (d / "config.json").write_text("[" * 200_000), "not valid JSON"),
    ("config binary", lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "not valid JSON"),
    ("key twice", lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), "a key appears twice"),
    ("remote code", config(auto_map={"AutoModel": "evil.Model"}), r"config\.json: auto_map: .*code of its own"),
    ("quantised", config(quantization_config={"quant_method": "gptq"}), r"quantization_config: .*Dequantise .*\.gguf"),
    ("other weights", config(transformers_weights="../x.safetensors"), "transformers_weights: it names another"),
    ("hub kernel", config(_attn_implementation="evil/kernel"), "attention 'evil/kernel' is not built in"),
    ("two parts", config(vision_config={"hidden_size": 8}), "vision_config: a model of several parts"),
    ("unknown type", config(model_type="nonesuch"), "cannot be loaded .*nonesuch"),
    ("no type", config(model_type="(gone)"), "model"),
    ("not causal", config(model_type="t5"), "cannot be loaded|cannot be in|missing|unexpected"),
    ("negative layers", config(num_hidden_layers=-1), "num_hidden_layers: -1 is not a whole number from 1"),
    ("no layers", config(num_hidden_layers=0), "num_hidden_layers: 0 is not"),
    ("a billion layers", config(num_hidden_layers=10**9), "num_hidden_layers: 1000000000 is not"),
    ("too many layers", config(num_hidden_layers=4000), "4000 layers .* cannot be in"),
    ("layers in words", config(num_hidden_layers="3"), "num_hidden_layers: 3 is not a whole number"),
    ("layers true", config(num_hidden_layers=True), "num_hidden_layers: True is not"),
    ("fractional width", config(hidden_size=32.5), "hidden_size: 32.5 is not"),
    ("huge width", config(hidden_size=10**12), "hidden_size: 1000000000000 is not"),
    ("null width", config(hidden_size=None), "hidden_size: None is not"),
    ("huge vocabulary", config(vocab_size=2**40), "vocab_size: .* is not"),
    ("boastful vocabulary", config(vocab_size=2**23), "8388608 tokens cannot be in"),
    ("boastful MLP", config(intermediate_size=2**20), r"shape|describes \d+ parameters"),
    ("heads do not divide", config(num_attention_heads=5, head_dim=None), "5 heads do not divide a width of 32"),
    ("kv heads do not divide", config(num_key_value_heads=3), "3 key-value heads do not divide 4 heads"),
    ("other heads", config(num_key_value_heads=1), r"k_proj.weight: shape \[16, 32\], expected \[8, 32\]"),
    ("one layer more", config(num_hidden_layers=4), r"model\.layers\.3\..*: missing tensor"),
    ("one layer fewer", config(num_hidden_layers=2), r"model\.layers\.2\..*: unexpected tensor"),
    # tensors
    ("missing", tensors(lambda t: t.pop(Q)), rf"{Q}: missing tensor"),
    ("head missing though untied", tensors(lambda t: t.pop("lm_head.weight")), r"lm_head\.weight: missing tensor"),
    ("unexpected", tensors(lambda t: t.update(extra=torch.zeros(2))), "extra: unexpected tensor"),
    ("renamed", tensors(lambda t: t.update(other=t.pop(Q))), rf"{Q}: missing tensor"),
    ("shape", tensors(lambda t: t.update({Q: torch.zeros(32, 31)})), rf"{Q}: shape \[32, 31\], expected \[32, 32\]"),
    ("flat", tensors(lambda t: t.update({Q: t[Q].flatten()})), rf"{Q}: shape \[1024\]"),
    ("integers", tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), f"{Q}: dtype I8"),
    ("NaN", tensors(lambda t: t[Q][3].fill_(float("nan"))), f"{Q}: NaN or infinite values"),
    ("Inf", tensors(lambda t: t[Q][0, 0].fill_(float("-inf"))), f"{Q}: NaN or infinite values"),
    ("beyond float32", tensors(lambda t: t.update({Q: torch.ones(32, 32).double() * 1e300})), f"{Q}: NaN"),
    # headers
    ("truncated", weights(lambda raw: raw[:-100]), r"model\.safetensors: header: tensors end at byte .*truncated"),
    ("trailing bytes", weights(lambda raw: raw + b"x"), "bytes after the last tensor"),
    ("empty file", weights(lambda raw: b""), "header of 0 bytes does not fit a file of 0 bytes"),
    ("four bytes", weights(lambda raw: raw[:4]), "does not fit a file of 4 bytes"),
    ("huge header", weights(lambda raw: struct.pack("<Q", 2**63) + raw[8:]), "does not fit a file"),
    ("header past the end", weights(lambda raw: struct.pack("<Q", len(raw)) + raw[8:]), "does not fit a file"),
    ("header not JSON", weights(lambda raw: raw[:8] + b"!" + raw[9:]), "header: not valid JSON"),
    ("offset past the end", header(lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 4096])), "leave a gap"),
    ("overlap", header(lambda h: h[Q].update(data_offsets=[0, 4096])), "overlap another"),
    ("end before start", header(lambda h: h[Q].update(data_offsets=[4096, 0])), r"is not \[start, end\]"),
    ("negative offset", header(lambda h: h[Q].update(data_offsets=[-4096, 0])), r"is not \[start, end\]"),
    ("size lies", header(lambda h: h[Q].update(shape=[32, 64])), r"F32 \[32, 64\] does not take 4096 bytes"),
    ("shape overflows", header(lambda h: h[Q].update(shape=[2**40, 2**40])), "does not take 4096 bytes"),
    ("negative shape", header(lambda h: h[Q].update(shape=[-32, -32])), "is not a list of sizes"),
    ("shape of text", header(lambda h: h[Q].update(shape="32")), "is not a list of sizes"),
    ("unknown dtype", header(lambda h: h[Q].update(dtype="F13")), "unknown dtype 'F13'"),
    ("entry incomplete", header(lambda h: h[Q].pop("shape")), "needs dtype, shape and data_offsets"),
    ("control characters", header(lambda h: h.update({"\x1b[31m\n": {}})), r"\\x1b\[31m\\n: an entry needs"),
    # shards
    ("outside", index(**{Q.replace(".", "__"): "../b.safetensors"}), "'../b.safetensors' is not a safetensors file in"),
    ("absolute", index(**{Q.replace(".", "__"): "/etc/passwd"}), "'/etc/passwd' is not a safetensors file in"),
    ("pickled shard", index(**{Q.replace(".", "__"): "b.bin"}), "'b.bin' is not a safetensors file"),
    ("missing shard", index(**{Q.replace(".", "__"): "c.safetensors"}), r"c\.safetensors: the shard is missing"),
    ("wrong shard", index(**{Q.replace(".", "__"): "a.safetensors"}), f"tensor '{Q}' is not in a.safetensors"),
    ("not in any shard", index(ghost="a.safetensors"), "tensor 'ghost' is not in a.safetensors"),
    ("no weight map", lambda d: (index()(d), (d / "model.safetensors.index.json").write_text("{}")), "no weight_map"),
    ("tensor twice", lambda d: (index()(d), shutil.copy(d / "a.safetensors", d / "b.safetensors")), "also in a.safe"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "why"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_model_is_refused(model_dir: Path, fault: Fault, why: str) -> None:
    fault(model_dir)
    line = refused(model_dir, why)
    assert str(model_dir) in line
    assert not (model_dir / "BOOM").exists()


def tokenizer_config(**changes: Any) -> Fault:
    def change(directory: Path) -> None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def wider_vocabulary(directory: Path) -> None:
    path = directory / "tokenizer.json"
    said = json.loads(path.read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["onemore"] = len(vocabulary)
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
        (
            lambda d: (d / "tokenizer.json").write_text('{"version": "1.0", "model": {}}'),
            "the tokenizer cannot be read",
        ),
        (lambda d: (d / "tokenizer_config.json").write_text("nope"), "tokenizer_config.json: not valid JSON"),
        (tokenizer_config(unk_token=""), "the tokenizer cannot be read"),
        (tokenizer_config(auto_map={"AutoTokenizer": ["evil.Tok", None]}), "auto_map: it asks for code of its own"),
        (wider_vocabulary, r"the tokenizer has (\d+) tokens, the embedding \d+ rows"),
    ],
    ids=[
        "absent",
        "not JSON",
        "no model",
        "config not JSON",
        "nameless token",
        "remote code",
        "wider than the embedding",
    ],
)
def test_a_faulty_tokenizer_is_refused(model_dir: Path, fault: Fault, why: str) -> None:
    fault(model_dir)
    assert str(model_dir) in refused(model_dir, why, TokenizerError)


def test_a_file_name_in_the_tokenizer_s_configuration_is_not_followed(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    before = load(str(model_dir)).encode("the old bridge").ids
    tokenizer_config(tokenizer_file=str(other), vocab_file=str(other), trust_remote_code=True)(model_dir)
    assert load(str(model_dir)).encode("the old bridge").ids == before


def test_an_empty_or_unreadable_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "the directory is empty")
    if os.geteuid():
        tmp_path.chmod(0)
        refused(tmp_path, "cannot be read")
        tmp_path.chmod(0o700)


def test_a_directory_where_a_file_should_be_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    (model_dir / "config.json").mkdir()
    refused(model_dir, r"config\.json: cannot be read")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "tensors and .* fields do not fit 24 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**40) + b"general.name", "cannot be loaded"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(64), "cannot be loaded"),
    ],
    ids=["empty", "other magic", "other version", "counts lie", "string past the end", "zeros"],
)
def test_a_faulty_gguf_file_is_refused(tmp_path: Path, raw: bytes, why: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert str(path) in refused(path, why)


# --- what must not be refused ---


def test_shards_load_like_one_file(model_dir: Path, tiny_dir: Path) -> None:
    index()(model_dir)
    (model_dir / "optimizer.pt").write_bytes(b"not read")
    (model_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    one, many = load(str(tiny_dir)), load(str(model_dir))
    tokens = torch.arange(10)[None]
    assert torch.equal(one.logits(tokens), many.logits(tokens))
    assert one.digest == many.digest


def test_a_tied_weight_may_be_stored_once(model_dir: Path) -> None:
    config(tie_word_embeddings=True)(model_dir)
    tensors(lambda t: t.pop("lm_head.weight"))(model_dir)
    hf: Any = load(str(model_dir)).bridge.original_model
    assert torch.equal(hf.get_output_embeddings().weight, hf.get_input_embeddings().weight)


def test_names_may_lack_the_base_prefix_and_old_buffers_may_stay(model_dir: Path, tiny_dir: Path) -> None:
    def rename(held: dict[str, torch.Tensor]) -> None:
        for name in [n for n in held if n.startswith("model.")]:
            held[name.removeprefix("model.")] = held.pop(name)
        held["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    tensors(rename)(model_dir)
    tokens = torch.arange(10)[None]
    assert torch.equal(load(str(model_dir)).logits(tokens), load(str(tiny_dir)).logits(tokens))


def test_half_precision_weights_are_read_as_float32(model_dir: Path) -> None:
    tensors(lambda t: t.update({n: v.to(torch.bfloat16) for n, v in t.items()}))(model_dir)
    config(dtype="bfloat16")(model_dir)
    model = load(str(model_dir))
    assert {p.dtype for p in model.bridge.parameters()} == {torch.float32}
