import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from heredity.interp import capture as capture_module
from heredity.interp.capture import batches, capture
from heredity.interp.corpus import corpus_of
from heredity.interp.errors import CorpusError, SiteError, StoreError
from heredity.interp.model import Encoded
from heredity.interp.store import Store, open_store

SITES = ("resid_post@1", "attn_z@2", "attn_head@0.3")
WORDS = "the old river was cold and dark , so we took a train to the coast . unheard-of"
SIZES = {"batch_tokens": 64, "shard_tokens": 150}


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS.split(), k=rng.randint(1, 40))) for _ in range(n)]


@pytest.fixture(scope="module")
def corpus():
    return corpus_of(sentences(40), "made up")


@pytest.fixture(scope="module")
def whole(tiny_model, corpus, tmp_path_factory) -> Store:
    return capture(tiny_model, corpus, SITES, tmp_path_factory.mktemp("stores") / "whole", **SIZES)


def content(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


def encoded(*lengths: int) -> list[Encoded]:
    return [Encoded("", (7,) * n, ((0, 1),) * n) for n in lengths]


def test_batches_by_length():
    assert batches(encoded(3, 1, 0, 3, 9, 2, 3), 6) == [[1, 5], [0, 3], [6], [4]]
    assert batches([], 6) == []


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_text_once_within_the_bound(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(0, 30) for _ in range(200)]
    found = batches(encoded(*lengths), 64)
    assert sorted(i for batch in found for i in batch) == [i for i, n in enumerate(lengths) if n]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in found)
    widths = [lengths[i] for batch in found for i in batch]
    assert widths == sorted(widths)


def test_values_are_those_of_the_text_alone(tiny_model, corpus, whole):
    index = whole.index().to_pylist()
    assert len(index) == whole.n_tokens == sum(len(tiny_model.encode(text.text).ids) for text in corpus.texts)
    assert whole.n_shards > 3
    rows = {(row["text"], row["position"]): row for row in index}
    shards = {(site, shard): whole.read(site, shard) for site in SITES for shard in range(whole.n_shards)}
    for text in corpus.texts:
        tokens = tiny_model.encode(text.text)
        with torch.no_grad():
            values = tiny_model.capture(torch.tensor([tokens.ids]), SITES)
        for position, (token, span) in enumerate(zip(tokens.ids, tokens.spans, strict=True)):
            row = rows[text.id, position]
            assert (row["token"], row["start"], row["end"]) == (token, *span)
            for site in SITES:
                stored = shards[site, row["shard"]][row["row"]]
                torch.testing.assert_close(stored, values[site][0, position], atol=1e-5, rtol=1e-5)
    assert shards["attn_z@2", 0].shape[1:] == (4, 8)


def test_rows_of_the_index_count_the_rows_of_the_shards(whole):
    for shard in range(whole.n_shards):
        table = whole.index(shard)
        assert table["row"].to_pylist() == list(range(len(whole.read("resid_post@1", shard))))
        assert set(table["shard"].to_pylist()) == {shard}


def test_same_bytes_every_time_and_a_finished_one_is_left_alone(tiny_model, corpus, whole, tmp_path, monkeypatch):
    again = capture(tiny_model, corpus, list(reversed(SITES)), tmp_path / "again", **SIZES)
    assert content(again.directory) == content(whole.directory)
    monkeypatch.setattr(type(tiny_model), "capture", lambda *_, **__: pytest.fail("ran the model again"))
    assert capture(tiny_model, corpus, SITES, again.directory, **SIZES) == again


def test_lost_shards_are_made_again(tiny_model, corpus, whole, tmp_path):
    copy = shutil.copytree(whole.directory, tmp_path / "copy")
    for lost in ("resid_post@1/00001.safetensors", "attn_z@2/00000.safetensors"):
        (copy / lost).unlink()
    with pytest.raises(StoreError, match="unfinished"):
        open_store(copy)
    seen = []
    capture(tiny_model, corpus, SITES, copy, **SIZES, progress=lambda done, total: seen.append((done, total)))
    assert content(copy) == content(whole.directory)
    assert seen == sorted(seen) and {total for _, total in seen} == {whole.n_tokens}
    assert seen[-1][0] == sum(whole.index(shard).num_rows for shard in (0, 1))


class Cut(BaseException):
    """Stands for the end of the process: nothing in the package may catch it or clean up after it."""


@pytest.mark.parametrize("half_written", [False, True])
@pytest.mark.parametrize("nth", [0, 1, 2, 3, 9])
def test_cut_off_at_any_file_ends_in_the_same_bytes(
    tiny_model, corpus, whole, tmp_path, monkeypatch, nth, half_written
):
    replace, calls = os.replace, []

    def cut(source, target):
        calls.append(target)
        if len(calls) == nth + 1:
            if half_written:
                os.truncate(source, os.path.getsize(source) // 2)
            raise Cut
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(Cut):
        capture(tiny_model, corpus, SITES, tmp_path / "cut", **SIZES)
    finished = {name for name in content(tmp_path / "cut") if not name.endswith(".tmp")}
    assert len(finished) == nth
    monkeypatch.undo()
    capture(tiny_model, corpus, SITES, tmp_path / "cut", **SIZES)
    assert content(tmp_path / "cut") == content(whole.directory)


KILLED = """
import sys
import torch
from heredity.interp.capture import capture
from heredity.interp.corpus import read_corpus
from heredity.interp.load import load

torch.set_num_threads(1)

def waiting(done, total):
    print(done, flush=True)
    sys.stdin.readline()

capture(load(sys.argv[1]), read_corpus([sys.argv[2]]), sys.argv[4:], sys.argv[3], batch_tokens=64, shard_tokens=150,
        progress=waiting)
"""


def test_killed_process_loses_only_the_open_shard(tiny_dir, tiny_model, corpus, whole, tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(text.text for text in corpus.texts))
    out = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny_dir), str(file), str(out), *SITES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        begun = whole.index(0).num_rows + whole.index(1).num_rows
        while int(process.stdout.readline()) <= begun:
            process.stdin.write("\n")
            process.stdin.flush()
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = content(out)
    assert {f"{site}/0000{shard}.safetensors" for site in SITES for shard in (0, 1)} <= kept.keys()
    assert not any("00002" in name for name in kept)
    before = (out / SITES[0] / "00000.safetensors").stat().st_mtime_ns
    capture(tiny_model, corpus, SITES, out, **SIZES)
    assert content(out) == content(whole.directory)
    assert (out / SITES[0] / "00000.safetensors").stat().st_mtime_ns == before


def test_one_open_shard_and_one_batch_at_a_time(tiny_model, corpus, tmp_path, monkeypatch):
    written, batch = weakref.WeakSet(), weakref.WeakSet()
    most = {"shards": 0, "batches": 0}
    write, run = capture_module.write_shard, tiny_model.capture

    def counting_write(store, site, shard, values):
        written.add(values)
        most["shards"] = max(most["shards"], len(written))
        write(store, site, shard, values)

    def counting_run(tokens, sites):
        assert not batch, "activations of an earlier batch are still held"
        most["batches"] += 1
        values = run(tokens, sites)
        batch.update(values.values())
        return values

    monkeypatch.setattr(capture_module, "write_shard", counting_write)
    monkeypatch.setattr(tiny_model, "capture", counting_run)
    store = capture(tiny_model, corpus, SITES, tmp_path / "s", **SIZES)
    assert store.n_shards > 3 and most["batches"] > 10
    assert most["shards"] <= len(SITES)


def test_float16(tiny_model, corpus, whole, tmp_path, monkeypatch):
    half = capture(tiny_model, corpus, ["resid_post@1"], tmp_path / "half", dtype="float16", **SIZES)
    assert torch.equal(half.read("resid_post@1", 0), whole.read("resid_post@1", 0).half())
    run = tiny_model.capture
    monkeypatch.setattr(tiny_model, "capture", lambda *a, **k: {n: v * 1e6 for n, v in run(*a, **k).items()})
    with pytest.raises(StoreError, match="too large for float16"):
        capture(tiny_model, corpus, ["resid_post@1"], tmp_path / "large", dtype="float16", **SIZES)


def test_text_beyond_the_context_is_cut_and_long_texts_are_alone(tiny_model, tmp_path):
    store = capture(tiny_model, corpus_of(["the river " * 400, "a"], "s"), ["embed"], tmp_path / "s", batch_tokens=8)
    assert store.n_tokens == tiny_model.shape.n_ctx + 1


def test_faults(tiny_model, corpus, tmp_path):
    with pytest.raises(SiteError):
        capture(tiny_model, corpus, ["resid_post@9"], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(CorpusError, match="no text gives a token"):
        capture(tiny_model, corpus_of([], "nothing"), ["embed"], tmp_path / "b")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"cannot be written|no readable manifest"):
            capture(tiny_model, corpus, ["embed"], out)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"holds 'thesis.tex' and no manifest"):
        capture(tiny_model, corpus, ["embed"], tmp_path / "home")
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["thesis.tex"]
