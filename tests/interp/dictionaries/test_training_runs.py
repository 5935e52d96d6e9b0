"""A training as it runs: from stores and from models, killed and resumed, within memory, from the command line."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from heredity.gate.cli import app
from heredity.interp.capture import capture
from heredity.interp.corpus import Corpus, corpus_of
from heredity.interp.dictionaries import Port, load_dictionary
from heredity.interp.dictionaries.training import Recipe, Running, Stores, read_history, train, within
from heredity.interp.dictionaries.training.memory import BASE, needed
from heredity.interp.errors import OutputError, StoreError, TrainingError
from heredity.interp.model import Model
from heredity.interp.store import Store
from heredity.interp.stream import stream
from heredity.zoo import shipped

SITE = Port("resid_post@1")


def by_character(model: Model) -> Model:
    """The same weights behind another tokenizer: one token a character, so long texts are cut earlier."""
    characters = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {chr(97 + i): 2 + i for i in range(26)}, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>")
    return Model(model.bridge, tokenizer, spec="characters", digest="characters", floor=0.0)


FEW = Recipe(kind="sae", latents=48, k=4, batch=128, tokens=128 * 8, seed=3)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = random.Random(1)
    words = "the old river was cold and dark , so we took a train to the coast .".split()
    return corpus_of([" ".join(rng.choices(words, k=rng.randint(4, 60))) for _ in range(60)], "made up")


@pytest.fixture(scope="module")
def characters(tiny_model) -> Model:
    return by_character(tiny_model)


@pytest.fixture(scope="module")
def stores(tiny_model, characters, corpus, tmp_path_factory) -> tuple[Store, Store]:
    directory = tmp_path_factory.mktemp("stores")
    sites = ["resid_post@1", "mlp_in@1", "mlp_out@1", "attn_z@0"]
    return (
        capture(tiny_model, corpus, sites, directory / "words", batch_tokens=256, shard_tokens=300),
        capture(characters, corpus, sites, directory / "characters", batch_tokens=512, shard_tokens=900),
    )


def pair(stores: tuple[Store, ...], buffer: int = 65_536) -> Stores:
    return Stores(stores, tuple(Port("resid_post@1", m) for m in range(len(stores))), buffer)


def rows_of(source: Stores | Running, batches: int, batch: int, seed: int = 0, skip: int = 0) -> torch.Tensor:
    """Some batches, all places side by side, as rows."""
    taken = source.batches(batch=batch, seed=seed, skip=skip)
    return torch.cat([torch.cat(next(taken), 1) for _ in range(batches)])


def ordered(rows: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(rows.tolist()))


class TestSources:
    def test_a_pass_reads_every_token_once_in_an_order_of_the_seed(self, stores) -> None:
        store = stores[0]
        every = torch.cat([store.read("resid_post@1", shard) for shard in range(store.n_shards)])
        source = Stores((store,), (SITE,))
        assert source.n_tokens == len(every)
        one = rows_of(source, source.n_tokens // 20, 20)
        assert len(one) > len(every) - 20
        assert Counter(map(tuple, one.tolist())) <= Counter(map(tuple, every.tolist()))
        assert torch.equal(one, rows_of(source, source.n_tokens // 20, 20))
        assert not torch.equal(one, rows_of(source, source.n_tokens // 20, 20, seed=1))
        # The next pass has another order.
        assert not torch.equal(one, rows_of(source, source.n_tokens // 20, 20, skip=source.n_tokens // 20))

    @pytest.mark.parametrize("buffer", [200, 700, 65_536])
    def test_what_is_skipped_is_what_would_have_come(self, stores, buffer: int) -> None:
        source = Stores(stores[:1], (SITE,), buffer)
        whole = rows_of(source, 150, 16)
        for skip in (1, 17, 40, 111):
            assert torch.equal(rows_of(source, 4, 16, skip=skip), whole[16 * skip : 16 * (skip + 4)])

    def test_two_stores_in_step_as_the_stream_pairs_them(self, stores) -> None:
        source = pair(stores)
        expected = torch.cat([torch.cat(b, 1) for b in stream(*stores, SITE.site, SITE.site, batch=999, seed=0)])
        assert source.n_tokens == len(expected) and source.widths == (32, 32)
        every = torch.cat([torch.cat(source.load(shard), 1) for shard in range(stores[0].n_shards)])
        torch.testing.assert_close(ordered(every), ordered(expected))

    def test_three_stores(self, stores) -> None:
        source = pair((*stores, stores[0]))
        first, second, third = next(source.batches(batch=100, seed=0))
        assert torch.equal(first, third) and not torch.equal(first, second)
        assert source.n_tokens == pair(stores).n_tokens

    @pytest.mark.parametrize("many", [1, 2])
    def test_models_on_the_fly_give_what_stores_hold(self, tiny_model, characters, corpus, stores, many: int) -> None:
        running = Running((tiny_model, characters)[:many], pair(stores[:many]).ports, corpus)
        stored = pair(stores[:many])
        assert running.n_tokens == stored.n_tokens and running.widths == stored.widths
        one, other = (
            torch.cat([torch.cat(source.load(piece), 1) for piece in range(len(source.sizes))])
            for source in (running, stored)
        )
        torch.testing.assert_close(ordered(one), ordered(other), atol=1e-5, rtol=1e-4)
        skipped = rows_of(replace(running, buffer=300), 2, 50, skip=9)
        assert torch.equal(skipped, rows_of(replace(running, buffer=300), 11, 50)[450:])

    def test_stores_that_do_not_belong_together(self, tiny_model, stores, tmp_path: Path) -> None:
        other = capture(tiny_model, corpus_of(["one two three"], "x"), ["resid_post@1"], tmp_path / "other")
        with pytest.raises(StoreError, match="other texts"):
            pair((stores[0], other))
        with pytest.raises(StoreError, match="no site 'resid_post@2'"):
            Stores(stores[:1], (Port("resid_post@2"),))
        with pytest.raises(TrainingError, match="attn_z@0 has a row per head"):
            Stores(stores[:1], (Port("attn_z@0"),))
        with pytest.raises(TrainingError, match="do not fill one batch"):
            next(Stores(stores[:1], (SITE,)).batches(batch=100_000, seed=0))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from heredity.interp.dictionaries import Port
from heredity.interp.dictionaries.training import Recipe, Stores, train
from heredity.interp.store import open_store
stores = tuple(open_store(path) for path in sys.argv[2:])
source = Stores(stores, tuple(Port("resid_post@1", m) for m in range(len(stores))), 600)
recipe = Recipe(kind="crosscoder", latents=96, k=4, batch=64, tokens=64 * 100, dedicated=0.1, dead_after=512, seed=5)
train(recipe, source, out=sys.argv[1], every=0.0, progress=lambda done, total, row: print(done, flush=True))
"""


def test_killed_and_resumed_ends_in_the_same_bytes(stores, tmp_path: Path) -> None:
    paths = [str(store.directory) for store in stores]

    def start(out: Path) -> "subprocess.Popen[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", SCRIPT, str(out), *paths]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def killed_at(out: Path, step: int) -> None:
        process = start(out)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= step:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "dictionary.json").exists() and (out / "checkpoint.safetensors").exists()

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed_at(cut, 37)
    for process in [start(cut), start(whole)]:
        process.communicate(timeout=300)
        assert process.returncode == 0
    names = ["dictionary.json", "dictionary.safetensors"]
    assert [(whole / name).read_bytes() for name in names] == [(cut / name).read_bytes() for name in names]
    assert not (cut / "checkpoint.safetensors").exists()
    a, b = ([row.model_dump(exclude={"seconds"}) for row in read_history(out)] for out in (whole, cut))
    assert a == b and [row["step"] for row in a] == list(range(1, 101))


class Stop(Exception):
    pass


def interrupted(recipe: Recipe, source: Stores, out: Path, step: int) -> None:
    """A training that ends after ``step``, each step kept."""

    def stop(done: int, total: int, row: object) -> None:
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, source, out=out, every=0.0, progress=stop)


class TestDirectory:
    def test_every_point_resumes_to_the_same(self, stores, tmp_path: Path) -> None:
        source = Stores(stores[:1], (SITE,))
        recipe = FEW.model_copy(update={"activation": "jumprelu", "dead_after": 128})
        whole = train(recipe, source, out=tmp_path / "whole").dictionary
        for step in (2, 5, 8):
            out = tmp_path / str(step)
            interrupted(recipe, source, out, step)
            train(recipe, source, out=out)
            for name in ("dictionary.json", "dictionary.safetensors"):
                assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        again = load_dictionary(tmp_path / "whole")
        assert torch.equal(again.W_dec[0], whole.W_dec[0]) and again.provenance["training"]["recipe"]["k"] == 4

    def test_a_finished_training_is_read_not_repeated(self, stores, tmp_path: Path) -> None:
        source = Stores(stores[:1], (SITE,))
        first = train(FEW, source, out=tmp_path)
        before = (tmp_path / "dictionary.safetensors").stat().st_mtime_ns
        again = train(FEW, source, out=tmp_path)
        assert (tmp_path / "dictionary.safetensors").stat().st_mtime_ns == before
        assert again.history == first.history
        with pytest.raises(TrainingError, match="belongs to another training: seed is 3, not 4"):
            train(FEW.model_copy(update={"seed": 4}), source, out=tmp_path)

    def test_a_checkpoint_of_another_training(self, stores, tmp_path: Path) -> None:
        source = Stores(stores[:1], (SITE,))
        interrupted(FEW, source, tmp_path, 4)
        with pytest.raises(TrainingError, match="another training: latents is 48, not 64"):
            train(FEW.model_copy(update={"latents": 64}), source, out=tmp_path)
        with pytest.raises(TrainingError, match="another training: source is"):
            train(FEW, replace(source, buffer=300), out=tmp_path)

    @pytest.mark.parametrize("damage", ["cut", "text", "other"])
    def test_a_damaged_checkpoint(self, stores, tmp_path: Path, damage: str) -> None:
        source = Stores(stores[:1], (SITE,))
        interrupted(FEW, source, tmp_path, 4)
        path = tmp_path / "checkpoint.safetensors"
        data = path.read_bytes()
        path.write_bytes(
            {"cut": data[:-100], "text": b"nothing of the kind", "other": data.replace(b"quiet", b"quite")}[damage]
        )
        with pytest.raises(TrainingError, match=r"checkpoint\.safetensors"):
            train(FEW, source, out=tmp_path)

    def test_an_unfinished_line_of_the_history_is_left_out(self, stores, tmp_path: Path) -> None:
        source = Stores(stores[:1], (SITE,))
        interrupted(FEW, source, tmp_path, 4)
        with (tmp_path / "history.jsonl").open("a") as file:
            file.write('{"step": 99')
        trained = train(FEW, source, out=tmp_path)
        assert (
            [row.step for row in trained.history] == [row.step for row in read_history(tmp_path)] == list(range(1, 9))
        )

    def test_a_directory_with_something_else(self, stores, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(OutputError, match=r"holds 'thesis\.tex'"):
            train(FEW, Stores(stores[:1], (SITE,)), out=tmp_path)


class TestMemory:
    def test_the_buffer_gives_way_and_then_the_training_is_refused(self, stores) -> None:
        source = Stores(stores[:1], (SITE,), 10_000_000)
        large = needed(FEW, source)
        kept = within(FEW, source, large)
        assert kept.buffer == source.buffer
        smaller = within(FEW, source, BASE + 0.3 * (large - BASE))
        assert 1024 <= smaller.buffer < source.buffer and needed(FEW, smaller) <= BASE + 0.3 * (large - BASE)
        with pytest.raises(TrainingError, match=r"memory: about 128\.\d GB are needed, 3\.0 allowed; 120\.\d of them"):
            within(FEW.model_copy(update={"latents": 2**26}), source, 3e9)
        many = FEW.model_copy(update={"latents": 16_384})
        assert needed(many, replace(source, buffer=65_536)) < 3e9


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(done.exception, TrainingError | StoreError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


class TestCommand:
    def test_from_a_store(self, stores, tmp_path: Path) -> None:
        out = tmp_path / "out"
        given = ("train-dictionary", "transcoder", stores[0].directory, "--site", "mlp_in@1", "--site", "mlp_out@1")
        given = (*given, "--latents", 48, "--k", 4, "--batch", 128, "--skip", "--seed", 2, "--out", out)
        code, said = run(*given)
        assert code == 0 and "transcoder of mlp_in@1, mlp_out@1, 48 latents" in said and "variance explained" in said
        dictionary = load_dictionary(out)
        assert dictionary.W_skip is not None and dictionary.provenance["training"]["recipe"]["seed"] == 2
        assert "Plotly.newPlot" in (out / "history.html").read_text()
        rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == stores[0].n_tokens // 128
        assert run(*given)[0] == 0

    def test_from_models_with_the_loss_recovered(self, tmp_path: Path) -> None:
        # A trained pair: what a model without skill computes is not worth recovering.
        parent, successor = shipped() / "parent", shipped() / "trigger"
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join((shipped() / "corpus.jsonl").read_text().splitlines(keepends=True)[:120]))
        given = ("train-dictionary", "crosscoder", parent, successor, "--corpus", texts, "--site", "resid_post@1")
        given = (*given, "--latents", 128, "--k", 8, "--batch", 64, "--dedicated", 0.1, "--out", tmp_path / "out")
        code, said = run(*given)
        assert code == 0 and "loss recovered" in said
        measured = [row.recovered for row in read_history(tmp_path / "out") if row.recovered is not None]
        assert len(measured) == 4 and 0.3 < measured[-1] <= 1

    @pytest.mark.parametrize(
        ("arguments", "fault"),
        [
            (["sae", "STORE", "--site", "resid_post@9"], "no site 'resid_post@9'"),
            (["sae", "STORE", "STORE", "--site", "resid_post@1"], "a sae needs 1 of them, not 2"),
            (["transcoder", "STORE", "--site", "mlp_in@1"], "--site: a transcoder of 1 model"),
            (["sae", "nowhere", "--site", "resid_post@1"], "nowhere: is no activation store"),
            (["crosscoder", "STORE", "STORE", "--site", "resid_post@1", "--shared", "2"], "--shared: Input should be"),
            (["sae", "STORE", "--site", "resid_post@1", "--k", "99"], "k: 99 active of 48 latents"),
            (["sae", "STORE", "--site", "resid_post@1", "--memory", "0.1"], "GB are needed, 0.1 allowed"),
        ],
    )
    def test_what_is_refused(self, stores, tmp_path: Path, arguments: list[str], fault: str) -> None:
        given = [str(stores[0].directory) if a == "STORE" else a for a in arguments]
        code, said = run("train-dictionary", *given, "--latents", 48, "--batch", 128, "--out", tmp_path / "out")
        assert code == 2 and fault in said
        assert not (tmp_path / "out" / "dictionary.json").exists()
