"""Divergence against float64, its bounds across tokenizers, and which positions it covers."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heredity.circuits import divergence
from heredity.circuits.divergence import Vocabulary, Window, compare, logits_of_parent, scan, vocabulary
from heredity.interp.load import load
from heredity.interp.model import Encoded, Model

TEXTS = ("the old bridge over the river was closed last night .", "a cat read the letter", "two horse made bread")


def noise(rows: int, size: int, seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def kl64(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize(("rows", "size"), [(1, 2), (7, 63), (64, 1000)])
def test_columns_equal_a_float64_reference(rows: int, size: int) -> None:
    logits_p, logits_s = noise(rows, size, 0), noise(rows, size, 1)
    p, s = logits_p.double().softmax(-1), logits_s.double().softmax(-1)
    got = compare(logits_p, logits_s, Vocabulary(size))
    top_s, top_p, at = logits_s.argmax(-1), logits_p.argmax(-1), torch.arange(rows)
    want = (kl64(s, p), kl64(p, s), top_s, s[at, top_s], p[at, top_s], top_p, p[at, top_p], s[at, top_p])
    for column, expected in zip(got, want, strict=True):
        torch.testing.assert_close(column.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_a_model_and_itself_are_exactly_zero_apart() -> None:
    logits = noise(50, 500, 0, spread=9)
    kl, reverse, *_ = compare(logits, logits.clone(), Vocabulary(500))
    assert not kl.any() and not reverse.any()


def test_rows_of_padded_embeddings_are_no_tokens() -> None:
    logits_p, logits_s = noise(5, 40, 0), noise(5, 48, 1)
    logits_s[:, 40:] = 30.0
    for got, want in zip(
        compare(logits_p, logits_s, Vocabulary(40)), compare(logits_p, logits_s[:, :40], Vocabulary(40)), strict=True
    ):
        assert torch.equal(got, want)


def test_the_projection_equals_a_float64_reference_and_names_each_model_s_own_tokens() -> None:
    logits_p, logits_s = noise(30, 40, 0), noise(30, 50, 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    ids_p, ids_s = order[:25], order[:25] + 7
    p, s = logits_p.double().softmax(-1), logits_s.double().softmax(-1)
    p = torch.cat([p[:, ids_p], 1 - p[:, ids_p].sum(-1, keepdim=True)], -1)
    s = torch.cat([s[:, ids_s], 1 - s[:, ids_s].sum(-1, keepdim=True)], -1)
    kl, reverse, own_s, prob_s, _, own_p, prob_p, _ = compare(logits_p, logits_s, Vocabulary(None, ids_p, ids_s))
    torch.testing.assert_close(kl.double(), kl64(s, p), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reverse.double(), kl64(p, s), rtol=1e-4, atol=1e-5)
    assert own_s.tolist() == ids_s[s[:, :-1].argmax(-1)].tolist()
    assert own_p.tolist() == ids_p[p[:, :-1].argmax(-1)].tolist()
    torch.testing.assert_close(prob_s.double(), s[:, :-1].amax(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prob_p.double(), p[:, :-1].amax(-1), rtol=1e-4, atol=1e-6)


def test_the_projected_kl_is_a_lower_bound_also_where_hardly_anything_is_left_over() -> None:
    """Data-processing inequality. One minus the shared probabilities would be rounding error in the last rows."""
    logits_p, logits_s = noise(60, 80, 0), noise(60, 80, 1)
    logits_p[20:, 60:] = noise(40, 20, 2, spread=0.1) - 14.0
    logits_p[20:, 0] = logits_s[20:, 60] = 6.0
    shared = torch.arange(60)
    full = compare(logits_p, logits_s, Vocabulary(80))
    projected = compare(logits_p, logits_s, Vocabulary(None, shared, shared))
    for column in (0, 1):
        assert (projected[column] <= full[column] + 1e-5).all()
    rest_p = logits_p.double().softmax(-1)[20:, 60:].sum(-1)
    assert float(rest_p.min()) > 1e-9 and float(rest_p.max()) < 1e-7
    p, s = (torch.cat([x[:, :60], x[:, 60:].sum(-1, keepdim=True)], -1) for x in
            (logits_p.double().softmax(-1), logits_s.double().softmax(-1)))  # fmt: skip
    torch.testing.assert_close(projected[0].double(), kl64(s, p), rtol=1e-4, atol=1e-5)


def test_sharing_every_token_the_projection_is_the_full_kl() -> None:
    logits_p, logits_s = noise(20, 30, 0), noise(20, 30, 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    full, projected = (
        compare(logits_p, logits_s, v) for v in (Vocabulary(30), Vocabulary(None, torch.arange(30), torch.arange(30)))
    )
    for got, want in zip(projected, full, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    renamed = compare(logits_p, logits_s[:, order.argsort()], Vocabulary(None, torch.arange(30), order))
    torch.testing.assert_close(renamed[0], full[0], rtol=1e-5, atol=1e-6)
    assert renamed[2].tolist() == order[full[2]].tolist()


@pytest.fixture(scope="module")
def renumbered(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The parent with its tokens renumbered, and nothing else changed."""
    directory = Path(shutil.copytree(tiny_dir, tmp_path_factory.mktemp("renumbered") / "model"))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    order = torch.arange(len(words))
    order[2:] = 2 + torch.randperm(len(words) - 2, generator=torch.Generator().manual_seed(0))
    tokenizer["model"]["vocab"] = {word: int(order[i]) for word, i in words.items()}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    held = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name][order.argsort()].contiguous()
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    return load(str(directory))


def test_renumbering_the_tokens_changes_no_prediction(parent: Model, renumbered: Model) -> None:
    assert not vocabulary(parent, renumbered).same and vocabulary(parent, parent).same
    windows = [Window(str(i), parent.encode(text), renumbered.encode(text)) for i, text in enumerate(TEXTS)]
    assert windows[0].parent.ids != windows[0].successor.ids
    found = scan(parent, renumbered, windows)
    for text in found.texts:
        assert max(text.kl) < 1e-5 and max(text.reverse) < 1e-5
        said = zip(text.top_successor, text.top_parent, strict=True)
        assert all(renumbered.decode([s]) == parent.decode([p]) for s, p in said)


# --- scan ---


def windows_of(parent: Model, texts: tuple[str, ...] = TEXTS, first: int = 0) -> list[Window]:
    return [Window(str(i), parent.encode(text), parent.encode(text), first) for i, text in enumerate(texts)]


def test_a_batch_of_unequal_texts_gives_what_each_gives_alone(parent: Model, successor: Model) -> None:
    together = scan(parent, successor, windows_of(parent))
    raised: Counter[int] = Counter()
    for window, text in zip(windows_of(parent), together.texts, strict=True):
        single = scan(parent, successor, [window])
        alone = single.texts[0]
        raised.update(single.raised)
        assert (text.position, text.top_successor, text.top_parent) == (
            alone.position,
            alone.top_successor,
            alone.top_parent,
        )
        assert text.kl == pytest.approx(alone.kl, rel=1e-3, abs=1e-6)
        assert text.reverse == pytest.approx(alone.reverse, rel=1e-3, abs=1e-6)
    assert sum(raised.values()) == sum(together.raised.values()) == 20 * sum(len(t.kl) for t in together.texts)


def test_every_position_is_compared_and_scored_by_the_token_that_follows(parent: Model, successor: Model) -> None:
    window = windows_of(parent)[0]
    text = scan(parent, successor, [window]).texts[0]
    n = len(window.successor.ids)
    assert text.position == text.position_parent == list(range(n))
    tokens = torch.tensor([window.successor.ids])
    log_s = successor.logits(tokens)[0].double().log_softmax(-1)
    log_p = parent.logits(tokens)[0].double().log_softmax(-1)
    want = [-float(log_s[i, window.successor.ids[i + 1]]) for i in range(n - 1)]
    assert text.surprise == pytest.approx([*want, 0.0], abs=1e-4)
    want = [-float(log_p[i, window.parent.ids[i + 1]]) for i in range(n - 1)]
    assert text.surprise_parent == pytest.approx([*want, 0.0], abs=1e-4)
    assert text.kl == pytest.approx(kl64(log_s.exp(), log_p.exp()).tolist(), rel=1e-3, abs=1e-5)
    assert max(text.kl) > 0.01


def test_known_logits_of_the_parent_are_used_as_they_are(parent: Model, successor: Model) -> None:
    windows = windows_of(parent)
    known = logits_of_parent(parent, windows)
    assert scan(parent, successor, windows, known) == scan(parent, successor, windows)
    assert scan(parent, successor, windows, known.flip(-1)) != scan(parent, successor, windows)


def test_what_stands_before_the_first_position_is_only_context(parent: Model, successor: Model) -> None:
    whole = scan(parent, successor, windows_of(parent))
    part = scan(parent, successor, windows_of(parent, first=3))
    for text, rest in zip(whole.texts, part.texts, strict=True):
        assert rest.position == text.position[3:] and rest.position[0] == 3
        assert (rest.kl, rest.surprise, rest.top_parent) == (text.kl[3:], text.surprise[3:], text.top_parent[3:])
    assert sum(part.raised.values()) == sum(whole.raised.values()) - 3 * 3 * 20


def test_chunks_bound_memory_and_not_results(parent: Model, successor: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan(parent, successor, windows_of(parent))
    monkeypatch.setattr(divergence, "CHUNK", 3)
    assert scan(parent, successor, windows_of(parent)) == whole


def test_mined_tokens_are_those_whose_log_probability_moved_most(
    parent: Model, successor: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "MINED", 2)
    window = windows_of(parent)[1]
    tokens = torch.tensor([window.parent.ids])
    gain = successor.logits(tokens)[0].log_softmax(-1) - parent.logits(tokens)[0].log_softmax(-1)
    found = scan(parent, successor, [window])
    order = gain.argsort(-1)
    assert found.raised == dict(Counter(order[:, -2:].flatten().tolist()))
    assert found.lowered == dict(Counter(order[:, :2].flatten().tolist()))


def read(text: str, *ends: int, leading: int = 0, trailing: int = 0) -> Encoded:
    spans = list(zip((0, *ends), ends, strict=False))
    spans = [(0, 0)] * leading + spans + [(0, 0)] * trailing
    return Encoded(text, tuple(range(len(spans))), tuple(spans))


@pytest.mark.parametrize(("first", "want"), [(0, 0), (1, 3), (2, 3), (3, 5)])
@pytest.mark.parametrize("trailing", [0, 1])
def test_the_parent_s_first_position_has_read_as_much_as_the_successor_s(first: int, want: int, trailing: int) -> None:
    """The position counts whose tokens end where the successor's first compared token begins, or before."""
    text = "abcdefgh"
    theirs = read(text, 2, 3, 6, 8)
    ours = read(text, 1, 2, 5, 6, 8, leading=1, trailing=trailing)
    own = Window("0", ours, theirs, first).for_parent()
    assert (own.parent, own.successor, own.first) == (ours, ours, want)


def test_the_longer_reading_is_the_one_with_more_tokens() -> None:
    few, many = read("abcd", 4), read("abcd", 1, 2, 3, 4)
    assert Window("0", few, many).longer is Window("0", many, few).longer is many


def test_probabilities_of_tokens_no_model_names_stay_finite() -> None:
    """A model all of whose tokens are shared has nothing in the bucket; the other's mass there counts, finitely."""
    logits_p, logits_s = noise(4, 20, 0), noise(4, 30, 1)
    shared = torch.arange(20)
    kl, reverse, *_ = compare(logits_p, logits_s, Vocabulary(None, shared, shared))
    assert kl.isfinite().all() and reverse.isfinite().all()
    rest = logits_s.double().softmax(-1)[:, 20:].sum(-1)
    p = torch.cat([logits_p.double().softmax(-1), torch.full((4, 1), 1e-9)], -1)
    s = torch.cat([logits_s.double().softmax(-1)[:, :20], rest[:, None]], -1)
    torch.testing.assert_close(kl.double(), kl64(s, p), rtol=1e-4, atol=1e-5)
    assert math.isclose(float(p.sum()), 4, rel_tol=1e-6)
