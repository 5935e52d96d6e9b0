import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from heredity.interp.capture import capture
from heredity.interp.corpus import corpus_of
from heredity.interp.errors import StoreError
from heredity.interp.model import Model
from heredity.interp.store import Store, open_store

SITES = ("mlp_out@0", "resid_post@2")
TEXTS = ["the old river", "a train to the coast", "so we took it .", "bread and milk"]


@pytest.fixture(scope="module")
def kept(tiny_model, tmp_path_factory) -> Store:
    directory = tmp_path_factory.mktemp("stores") / "kept"
    return capture(tiny_model, corpus_of(TEXTS, "s"), SITES, directory, batch_tokens=8, shard_tokens=8)


@pytest.fixture
def store(kept, tmp_path) -> Store:
    return Store(shutil.copytree(kept.directory, tmp_path / "store"), kept.manifest)


def change_manifest(store: Store, **fields) -> None:
    path = store.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_opens_with_what_was_captured(store, tiny_model):
    opened = open_store(str(store.directory))
    assert opened == store
    assert opened.sites == SITES and opened.n_tokens == 16 and opened.n_shards > 1
    assert opened.manifest.weights == tiny_model.digest
    assert opened.manifest.corpus == corpus_of(TEXTS, "elsewhere").digest
    assert opened.manifest.sites == {site: [32] for site in SITES}


def test_another_key_is_refused_by_the_name_of_its_field(store, tiny_model):
    corpus = corpus_of(TEXTS, "s")
    other = Model(tiny_model.bridge, tiny_model.tokenizer, spec="other", digest="beef", floor=0.0)
    sizes = {"batch_tokens": 8, "shard_tokens": 8}
    cases = {
        "weights": lambda: capture(other, corpus, SITES, store.directory, **sizes),
        "corpus": lambda: capture(tiny_model, corpus_of(TEXTS[1:], "s"), SITES, store.directory, **sizes),
        "sites": lambda: capture(tiny_model, corpus, SITES[:1], store.directory, **sizes),
        "dtype": lambda: capture(tiny_model, corpus, SITES, store.directory, dtype="float16", **sizes),
        "batch_tokens": lambda: capture(tiny_model, corpus, SITES, store.directory, shard_tokens=8),
    }
    for field, run in cases.items():
        with pytest.raises(StoreError, match=f"holds another capture: {field} is "):
            run()
    change_manifest(store, code="0/heredity-0.0.1")
    with pytest.raises(StoreError, match=r"code is 0/heredity-0\.0\.1, not "):
        capture(tiny_model, corpus, SITES, store.directory, **sizes)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"schema_version": 2}, "schema_version is 2, not 1"),
        ({"schema_version": None}, "schema_version is None"),
        ({"n_tokens": "16"}, "malformed n_tokens"),
        ({"n_tokens": 17}, "index does not fit the manifest"),
        ({"n_shards": -1}, "malformed n_shards"),
        ({"dtype": "float8"}, "malformed dtype"),
        ({"extra": 1}, "malformed extra"),
        ({"sites": {"../../etc": [32]}}, "malformed site name"),
        ({"sites": {"resid_post@2": [0]}}, "malformed sites.resid_post@2.0"),
    ],
)
def test_malformed_manifests(store, fields, what):
    change_manifest(store, **fields)
    with pytest.raises(StoreError) as caught:
        open_store(store.directory)
    assert what in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_manifests_that_are_no_object(store, data):
    (store.directory / "manifest.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"manifest\.json: "):
        open_store(store.directory)


def test_damaged_shards_are_named(store):
    path = store.shard_path(SITES[0], 1)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for damaged, what in (
        (good[:-4], "damaged or absent"),
        (b"", "damaged or absent"),
        (b"\xff" * 64, "damaged or absent"),
        (bytes(flipped), "checksum differs"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=what) as caught:
            open_store(store.directory).read(SITES[0], 1)
        assert caught.value.where == str(path)
    # The others are still good.
    assert store.read(SITES[0], 0).shape[1] == store.read(SITES[1], 1).shape[1] == 32


def test_shards_of_another_kind(store):
    path = store.shard_path(SITES[0], 0)
    values = store.read(SITES[0], 0)
    for wrong, what in (
        ({"values": values[:, :5].contiguous()}, "another shape or dtype"),
        ({"values": values.double()}, "another shape or dtype"),
        ({"values": values}, "checksum differs"),  # saved without one
        ({"weights": values}, "damaged or absent"),
    ):
        save_file(wrong, path)
        with pytest.raises(StoreError, match=what):
            store.read(SITES[0], 0)
    shutil.copy(store.shard_path(SITES[0], 1), path)
    with pytest.raises(StoreError, match="checksum differs"):  # a good shard in the wrong place
        store.read(SITES[0], 0)


def test_damaged_index(store):
    path = store.directory / "index.parquet"
    good = path.read_bytes()
    for damaged in (b"", good[:100], b"PAR1" + bytes(len(good) - 8) + b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged index"):
            open_store(store.directory)


def test_what_is_not_there(store, tmp_path):
    with pytest.raises(StoreError, match="no readable manifest"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no site 'embed' in this store"):
        store.read("embed", 0)
    with pytest.raises(StoreError, match="damaged or absent"):
        store.read(SITES[0], 99)
    store.shard_path(SITES[1], 1).unlink()
    with pytest.raises(StoreError, match="unfinished") as caught:
        open_store(store.directory)
    assert caught.value.where == str(store.shard_path(SITES[1], 1))


def test_values_survive_the_disk(store, tiny_model):
    row = next(row for row in store.index().to_pylist() if row["text"] == 0 and row["position"] == 2)
    with torch.no_grad():
        values = tiny_model.capture(torch.tensor([tiny_model.encode(TEXTS[0]).ids]), ["resid_post@2"])
    stored = store.read("resid_post@2", row["shard"])[row["row"]]
    torch.testing.assert_close(stored, values["resid_post@2"][0, 2], atol=1e-5, rtol=1e-5)
