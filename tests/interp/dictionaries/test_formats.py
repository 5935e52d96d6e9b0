"""Our own format: everything of a dictionary comes back, nothing damaged does; the registry tells formats apart."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heredity.interp.dictionaries.formats import load_dictionary, save_dictionary
from heredity.interp.dictionaries.notes import digest
from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
from heredity.interp.errors import DictionaryError, OutputError
from heredity.kernels import BatchTopK, JumpReLU, ReLU, TopK

SITE = (Port("resid_post@1"),)


def random(kind="sae", reads=SITE, writes=None, widths=(6,), out=None, f=10, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    dtype = more.pop("dtype", torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    writes, out = writes or reads, out or widths
    return Dictionary(
        kind=kind,
        reads=reads,
        writes=writes,
        W_enc=tuple(normal(d, f) for d in widths),
        b_enc=normal(f),
        W_dec=tuple(normal(f, d) for d in out),
        b_dec=tuple(normal(d) for d in out),
        activation=more.pop("activation", ReLU()),
        **more,
    )


PAIR = (Port("resid_post@1", 0), Port("resid_post@1", 1))
KINDS = {
    "jumprelu": lambda: random(activation=JumpReLU(torch.rand(10), bandwidth=0.5)),
    "one threshold": lambda: random(activation=JumpReLU(0.25)),
    "half": lambda: random(dtype=torch.bfloat16, activation=JumpReLU(torch.rand(10).bfloat16())),
    "scaled": lambda: random(scaling="unit_norm", activation=TopK(3), dtype=torch.float64),
    "skip": lambda: random(
        "transcoder",
        (Port("mlp_in@1"),),
        (Port("mlp_out@1"),),
        out=(4,),
        W_skip=torch.randn(6, 4),
        scaling="layer_norm",
    ),
    "crosscoder": lambda: random(
        "crosscoder", PAIR, widths=(6, 5), activation=BatchTopK(threshold=0.5), norm=torch.rand(10)
    ),
    "foreign place": lambda: random(reads=(Port("blocks.0.ln2.hook_normalized"),), provenance={"a": [1, {"b": None}]}),
}


def same(a: Dictionary, b: Dictionary) -> bool:
    # The digest covers every array, place and the rule; these are what it leaves out.
    rules = [each.activation.bandwidth if isinstance(each.activation, JumpReLU) else 0 for each in (a, b)]
    return digest(a) == digest(b) and a.provenance == b.provenance and rules[0] == rules[1]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_of_a_dictionary_comes_back(kind, tmp_path):
    dictionary = KINDS[kind]()
    save_dictionary(dictionary, tmp_path / "d")
    back = load_dictionary(tmp_path / "d")
    assert same(back, dictionary)
    x = [torch.randn(7, width).to(dictionary.b_enc.dtype) for width in dictionary.widths]
    for ours, theirs in zip(back.reconstruct(*x), dictionary.reconstruct(*x), strict=True):
        assert torch.equal(ours, theirs)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["dictionary.json", "dictionary.safetensors"]


def test_no_field_of_the_record_is_forgotten():
    # A field added to the record must be saved too, or be named here.
    saved = {"kind", "reads", "writes", "W_enc", "b_enc", "W_dec", "b_dec", "activation", "norm", "W_skip", "scaling"}
    assert {field.name for field in fields(Dictionary)} == saved | {"provenance", "notes"}


def layers() -> DictionarySet:
    sites = [Port(f"mlp_out@{i}") for i in range(3)]
    made = tuple(
        random("cross_layer_transcoder", (Port(f"mlp_in@{i}"),), tuple(sites[i:]), out=(4,) * (3 - i), seed=i)
        for i in range(3)
    )
    return DictionarySet(made, {"model": "tiny"})


def test_a_set_comes_back(tmp_path):
    save_dictionary(layers(), tmp_path)
    back = load_dictionary(tmp_path)
    assert isinstance(back, DictionarySet) and back.provenance == {"model": "tiny"}
    assert all(same(a, b) for a, b in zip(back.layers, layers().layers, strict=True))


def test_exchanged_layers_are_refused(tmp_path):
    save_dictionary(layers(), tmp_path)
    (tmp_path / "layers/00000").rename(tmp_path / "layers/x")
    (tmp_path / "layers/00001").rename(tmp_path / "layers/00000")
    (tmp_path / "layers/x").rename(tmp_path / "layers/00001")
    with pytest.raises(DictionaryError, match="not the layer"):
        load_dictionary(tmp_path)


def test_arrays_in_shared_memory_are_kept_apart(tmp_path):
    whole = random("crosscoder", PAIR, widths=(6, 6))
    tied = replace(whole, W_dec=(whole.W_dec[0], whole.W_dec[0]), b_dec=(whole.b_dec[0], whole.b_dec[0]))
    save_dictionary(tied, tmp_path)
    assert same(load_dictionary(tmp_path), tied)


def test_replacing_keeps_other_files_and_a_failed_save_keeps_the_old(tmp_path):
    old, new = random(seed=1), random(seed=2)
    save_dictionary(old, tmp_path)
    (tmp_path / "history.csv").write_text("1")
    with pytest.raises(DictionaryError, match="NaN"):
        save_dictionary(replace(new, b_enc=new.b_enc / 0 * 0), tmp_path)
    with pytest.raises(DictionaryError, match="JSON"):
        save_dictionary(replace(new, provenance={"when": object()}), tmp_path)
    assert same(load_dictionary(tmp_path), old)
    save_dictionary(new, tmp_path)
    assert same(load_dictionary(tmp_path), new) and (tmp_path / "history.csv").read_text() == "1"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_dictionary(random(), tmp_path / "file")


def edit(directory: Path, **changes):
    path = directory / "dictionary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def arrays(directory: Path, **changes):
    """Other arrays, with the digest to go with them."""
    import hashlib

    path = directory / "dictionary.safetensors"
    found = load_file(path) | changes
    save_file({name: array for name, array in found.items() if array is not None}, path)
    edit(directory, arrays=hashlib.sha256(path.read_bytes()).hexdigest())


PLACE = {"site": "a", "model": 0, "width": 6}
DAMAGE = {
    "truncated": (lambda d: cut(d / "dictionary.safetensors"), "truncated"),
    "absent arrays": (lambda d: (d / "dictionary.safetensors").unlink(), "cannot be read"),
    "a bit": (lambda d: flip(d / "dictionary.safetensors"), "not the arrays"),
    "not JSON": (lambda d: (d / "dictionary.json").write_text("{"), "not valid JSON"),
    "a list": (lambda d: (d / "dictionary.json").write_text("[]"), "JSON object"),
    "of the future": (lambda d: edit(d, schema_version=2), "schema_version"),
    "unknown field": (lambda d: edit(d, surprise=1), "surprise"),
    "unknown kind": (lambda d: edit(d, kind="lorsa"), "kind"),
    "unknown rule": (lambda d: edit(d, activation={"rule": "groupmax"}), "activation"),
    "k as text": (lambda d: edit(d, activation={"rule": "topk", "k": "3"}), "activation.topk.k"),
    "k of more than there are": (lambda d: edit(d, activation={"rule": "topk", "k": 11}), "of 10 latents"),
    "both k and threshold": (
        lambda d: edit(d, activation={"rule": "batchtopk", "k": 3, "threshold": 0.1}), "exactly one"
    ),
    "absurd size": (lambda d: edit(d, n_latents=1 << 40), "was expected"),
    "kind that does not fit": (lambda d: edit(d, kind="crosscoder", writes=[PLACE]), "crosscoder"),
    "nothing read": (lambda d: edit(d, reads=[]), "not one of this format"),
    "missing": (lambda d: arrays(d, b_enc=None), "no array 'b_enc'"),
    "extra": (lambda d: arrays(d, pickle=torch.ones(1)), "'pickle' is not one"),
    "shape": (lambda d: arrays(d, b_enc=torch.ones(9)), "b_enc: shape"),
    "dtype": (lambda d: arrays(d, b_enc=torch.ones(10).half()), "float32 was expected"),
    "integers": (lambda d: arrays(d, b_enc=torch.ones(10).int()), "floating-point"),
    "NaN": (lambda d: arrays(d, b_enc=torch.full((10,), torch.nan)), "b_enc: NaN"),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(damage, tmp_path):
    save_dictionary(random(), tmp_path)
    spoil, words = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(DictionaryError) as error:
        load_dictionary(tmp_path)
    assert words in str(error.value) and str(tmp_path) in error.value.where and error.value.remedy


def test_what_is_no_dictionary(tmp_path):
    with pytest.raises(DictionaryError, match="not a dictionary in any known format"):
        load_dictionary(tmp_path)
    with pytest.raises(DictionaryError, match="no such file"):
        load_dictionary(tmp_path / "absent")
    with pytest.raises(DictionaryError, match="no format called 'pickle'"):
        load_dictionary(tmp_path, format="pickle")
    save_dictionary(random(), tmp_path)
    with pytest.raises(DictionaryError, match="takes no 'device'"):
        load_dictionary(tmp_path, device="cpu")
