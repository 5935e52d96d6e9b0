import random
import weakref
from collections import Counter
from itertools import pairwise

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from heredity.interp.align import align
from heredity.interp.capture import capture
from heredity.interp.corpus import Corpus, corpus_of
from heredity.interp.errors import StoreError
from heredity.interp.model import Model
from heredity.interp.store import Store
from heredity.interp.stream import stream

WORDS = "the old river was cold and dark , so we took a train to the coast 🙂 ."
SITES = ("resid_post@1", "attn_z@0")


def by_character(model: Model) -> Model:
    """The same weights behind another tokenizer: one token a character, so long texts are cut earlier."""
    characters = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {chr(97 + i): 2 + i for i in range(26)}, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>")
    return Model(model.bridge, tokenizer, spec="characters", digest="characters", floor=0.0)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = random.Random(1)
    return corpus_of([" ".join(rng.choices(WORDS.split(), k=rng.randint(1, 70))) for _ in range(40)], "made up")


@pytest.fixture(scope="module")
def others(tiny_model) -> Model:
    return by_character(tiny_model)


@pytest.fixture(scope="module")
def stores(tiny_model, others, corpus, tmp_path_factory) -> tuple[Store, Store]:
    directory = tmp_path_factory.mktemp("stores")
    return (
        capture(tiny_model, corpus, SITES, directory / "words", batch_tokens=256, shard_tokens=200),
        capture(others, corpus, SITES, directory / "characters", batch_tokens=512, shard_tokens=700, dtype="float16"),
    )


def expected(a: Store, b: Store, model_a: Model, model_b: Model, corpus: Corpus, site_a: str, site_b: str) -> Counter:
    def rows(store: Store, site: str) -> dict[tuple[int, int], Tensor]:
        shards = [store.read(site, shard) for shard in range(store.n_shards)]
        return {
            (row["text"], row["position"]): shards[row["shard"]][row["row"]].float()
            for row in store.index().to_pylist()
        }

    rows_a, rows_b = rows(a, site_a), rows(b, site_b)
    return Counter(
        key(rows_a[text.id, i], rows_b[text.id, j])
        for text in corpus.texts
        for i, j in zip(*align(model_a.encode(text.text), model_b.encode(text.text)), strict=True)
    )


def key(a: Tensor, b: Tensor) -> tuple[bytes, bytes]:
    return a.contiguous().numpy().tobytes(), b.contiguous().numpy().tobytes()


@pytest.mark.parametrize("buffer_tokens", [1, 500, 10**6])
def test_every_aligned_token_once(stores, tiny_model, others, corpus, buffer_tokens):
    a, b = stores
    read = list(stream(a, b, SITES[0], SITES[1], batch=7, seed=0, buffer_tokens=buffer_tokens))
    assert all(x.dtype == y.dtype == torch.float32 for x, y in read)
    assert all(x.shape == (7, 32) and y.shape == (7, 4, 8) for x, y in read[:-1])
    assert 1 <= len(read[-1][0]) == len(read[-1][1]) <= 7
    found = Counter(key(p, q) for x, y in read for p, q in zip(x, y, strict=True))
    wanted = expected(a, b, tiny_model, others, corpus, *SITES)
    assert found == wanted
    # Texts cut at the shorter context leave tokens without partner, so this is a real selection.
    assert 0 < wanted.total() < a.n_tokens < b.n_tokens


def test_either_order(stores, tiny_model, others, corpus):
    a, b = stores
    found = Counter(
        key(p, q)
        for x, y in stream(b, a, SITES[0], SITES[0], batch=50, seed=1, buffer_tokens=300)
        for p, q in zip(x, y, strict=True)
    )
    assert found == expected(b, a, others, tiny_model, corpus, SITES[0], SITES[0])


def test_a_store_with_itself_keeps_every_token(stores):
    a, _ = stores
    pairs = list(stream(a, a, SITES[0], SITES[0], batch=64, seed=0, buffer_tokens=400))
    assert sum(len(x) for x, _ in pairs) == a.n_tokens
    assert all(torch.equal(x, y) for x, y in pairs)


def test_seed_fixes_the_order(stores):
    a, b = stores

    def run(seed: int) -> Tensor:
        return torch.cat([x for x, _ in stream(a, b, *SITES, batch=16, seed=seed, buffer_tokens=400)])

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))
    # Shuffled within shards too, not only between them.
    in_order = torch.cat([a.read(SITES[0], shard) for shard in range(a.n_shards)])
    where = {row.numpy().tobytes(): i for i, row in enumerate(in_order)}
    places = [where[row.numpy().tobytes()] for row in run(3)]
    assert sum(j == i + 1 for i, j in pairwise(places)) < len(places) / 10


def test_one_open_shard_of_each(stores, monkeypatch):
    a, b = stores
    open_shards, most, read = weakref.WeakSet(), [0], Store.read

    def counting(self, site, shard):
        values = read(self, site, shard)
        open_shards.add(values)
        most[0] = max(most[0], len(open_shards))
        return values

    monkeypatch.setattr(Store, "read", counting)
    for _ in stream(a, b, *SITES, batch=16, seed=0, buffer_tokens=400):
        assert not open_shards
    assert a.n_shards > 4 and b.n_shards > 4 and most[0] == 2


def test_other_texts_are_refused(stores, tiny_model, tmp_path):
    other = capture(tiny_model, corpus_of(["the sea"], "s"), SITES, tmp_path / "other")
    with pytest.raises(StoreError, match="captured on other texts"):
        next(stream(stores[0], other, *SITES, batch=4, seed=0))


def test_absent_site_is_refused(stores):
    with pytest.raises(StoreError, match="no site 'embed'"):
        next(stream(*stores, "embed", SITES[0], batch=4, seed=0))
