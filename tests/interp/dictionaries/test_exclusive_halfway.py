"""Halfway patching between a tiny model and itself with a rank-one change of known effect."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port
from heredity.interp.dictionaries.exclusive import halfway
from heredity.interp.errors import DictionaryError
from heredity.interp.load import load
from heredity.interp.model import Encoded, Model
from heredity.kernels import ReLU

SITE = "resid_post@1"
TEXTS = (
    "the river and the old bridge by the sea",
    "a friend of the king told the queen one story and one more , and then left at night",
    "no horse , no dog , no cat ? not one !",
    "when the sailor came home , the house was cold and the door open",
    "salt and bread",
    "she said : read the letter before the week is last and the song lost ; walk east , then north to the white hill",
)
UP, DOWN, HALF, FIRST_SHARED = 0, 1, 2, 3


@dataclass(frozen=True)
class Two:
    parent: Model
    successor: Model
    dictionary: Dictionary
    texts: list[Encoded]


@pytest.fixture(scope="module")
def two(tiny_dir: Path, tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Two:
    """The successor's second MLP adds (k·a) v to its output; latents UP and DOWN read just that, HALF half of UP's.

    UP and DOWN together hold the whole change, so that the exact share of the gap they close is 1.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draws = torch.Generator().manual_seed(5)
    v, k = torch.randn(32, generator=draws), torch.randn(64, generator=draws)
    bare = AutoModelForCausalLM.from_pretrained(tiny_dir)
    bare.model.layers[1].mlp.down_proj.weight.data += torch.outer(v, 2 * k)
    directory = tmp_path_factory.mktemp("successor")
    bare.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)

    n = FIRST_SHARED + 40
    read, write = torch.randn(32, n, generator=draws), torch.randn(n, 32, generator=draws)
    W_enc, W_dec = [read, read.clone()], [write, write.clone()]
    for latent, sign in ((UP, 1), (DOWN, -1), (HALF, 1)):
        W_enc[1][:, latent] = sign * v / v.square().sum()
        W_enc[0][:, latent] = -W_enc[1][:, latent]
        W_dec[0][latent] = 0
        W_dec[1][latent] = sign * v * (0.5 if latent == HALF else 1)
    ports = (Port(SITE, 0), Port(SITE, 1))
    dictionary = Dictionary(
        "crosscoder", ports, ports, tuple(W_enc), torch.zeros(n), tuple(W_dec), (torch.zeros(32),) * 2, ReLU()
    )
    return Two(tiny_model, load(str(directory)), dictionary, [tiny_model.encode(text) for text in TEXTS])


def log_probabilities(model: Model, tokens: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model.logits(tokens, **options).double().log_softmax(-1)


def by_hand(two: Two, latents: list[int], first: int | None = None) -> float:
    """Share of the gap closed, text by text without padding, from the definition."""
    left = gap = 0.0
    for text in two.texts:
        tokens = torch.tensor([text.ids])
        with torch.no_grad():
            h = [model.capture(tokens, [SITE])[SITE] for model in (two.parent, two.successor)]
        f = two.dictionary.encode(h[0][0], h[1][0]).to_dense()
        changed = h[0] + sum(
            torch.outer(f[:, j], two.dictionary.W_dec[1][j] - two.dictionary.W_dec[0][j]) for j in latents
        )
        truth = log_probabilities(two.successor, tokens)
        for into, value in (("gap", h[0]), ("left", changed)):
            patched = log_probabilities(two.successor, tokens, edits={SITE: lambda _, value=value: value})
            kl = float((truth.exp() * (truth - patched)).sum(-1)[0, :first].sum())
            left, gap = (left + kl, gap) if into == "left" else (left, gap + kl)
    return 1 - left / gap


def test_latents_that_hold_the_whole_change_close_the_whole_gap(two: Two) -> None:
    found = halfway(two.parent, two.successor, two.dictionary, two.texts, [UP, DOWN], seed=0)
    for part in (found.all_tokens, found.first_tokens):
        assert part.gap > 0.05
        assert part.share == pytest.approx(1, abs=1e-6)
        assert part.low == pytest.approx(1, abs=1e-6)
        assert part.left == pytest.approx(0, abs=1e-7)
    assert (found.n_texts, found.n_tokens) == (len(TEXTS), sum(len(text.ids) for text in two.texts))


@pytest.mark.parametrize("latents", [[UP], [DOWN], [HALF, DOWN]])
@pytest.mark.parametrize("batch", [1, 4])
def test_equals_the_definition(two: Two, latents: list[int], batch: int) -> None:
    found = halfway(two.parent, two.successor, two.dictionary, two.texts, latents, seed=0, controls=0, batch=batch)
    assert found.all_tokens.share == pytest.approx(by_hand(two, latents), abs=1e-4)
    assert found.first_tokens.share == pytest.approx(by_hand(two, latents, first=9), abs=1e-4)
    assert found.all_tokens.low <= found.all_tokens.share <= found.all_tokens.high
    assert found.all_tokens.low < found.all_tokens.high


def test_controls_are_active_latents_outside_the_set(two: Two) -> None:
    # All but UP, DOWN and HALF write the same to both models, so that no control can close anything.
    found = halfway(two.parent, two.successor, two.dictionary, two.texts, [UP, DOWN, HALF], seed=3, controls=6)
    assert found.all_tokens.controls == pytest.approx((0,) * 6, abs=1e-6)
    # A control for UP alone may draw DOWN or HALF, never UP itself: the share of UP is not among them.
    alone = halfway(two.parent, two.successor, two.dictionary, two.texts, [UP], seed=3, controls=30)
    possible = [0, by_hand(two, [DOWN]), by_hand(two, [HALF])]
    assert all(min(abs(share - one) for one in possible) < 1e-4 for share in alone.all_tokens.controls)
    again = halfway(two.parent, two.successor, two.dictionary, two.texts, [UP], seed=3, controls=30)
    assert again == alone


def test_no_gap_has_no_share(two: Two) -> None:
    found = halfway(two.parent, two.parent, two.dictionary, two.texts, [UP], seed=0, controls=1)
    assert found.all_tokens.gap == 0
    assert found.all_tokens.share != found.all_tokens.share


def test_refusals(two: Two) -> None:
    d = two.dictionary
    narrow = replace(
        d,
        W_enc=(d.W_enc[0][:8], d.W_enc[1]),
        W_dec=(d.W_dec[0][:, :8], d.W_dec[1]),
        b_dec=(d.b_dec[0][:8], d.b_dec[1]),
    )
    with pytest.raises(DictionaryError, match="widths 8 and 32"):
        halfway(two.parent, two.successor, narrow, two.texts, [UP], seed=0)
    ports = (Port("resid_post@0", 0), Port(SITE, 1))
    with pytest.raises(DictionaryError, match="resid_post@0 and resid_post@1"):
        halfway(two.parent, two.successor, replace(d, reads=ports, writes=ports), two.texts, [UP], seed=0)
    with pytest.raises(ValueError, match="latents must lie"):
        halfway(two.parent, two.successor, d, two.texts, [d.n_latents], seed=0)
    with pytest.raises(ValueError, match="no texts"):
        halfway(two.parent, two.successor, d, [], [UP], seed=0)
