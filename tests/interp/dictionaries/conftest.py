"""A dictionary whose latents are known, with notes on it: no model is run."""

import re
from dataclasses import dataclass

import pytest
import torch

from heredity.interp.dictionaries import Dictionary, Port
from heredity.interp.dictionaries.notes import LatentNotes, LogitEffects, digest
from heredity.interp.explain import Contexts, explain
from heredity.interp.model import Encoded
from heredity.kernels import FeatureCSR, ReLU, statistics

NOUNS = ("bridge", "river", "garden", "<script>alert(1)</script>", "\x1b[31mred", "king")
FILL = ("the", "old", "saw", "and", "new", "of", "a", "small")
WORDS = (*NOUNS, *FILL, ".")
IDS = {word: i for i, word in enumerate(WORDS)}
ON_BRIDGE, AFTER_OLD, ON_SCRIPT, EVERYWHERE, NEVER, UNEXPLAINED = range(6)
N_LATENTS = 6


def read(text: str) -> Encoded:
    """Words as tokens, after a token that the tokenizer adds."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    return Encoded(text, (len(WORDS), *(IDS[text[a:b]] for a, b in spans)), ((0, 0), *spans))


def corpus(n: int = 240, seed: int = 0) -> list[Encoded]:
    draws = torch.Generator().manual_seed(seed)

    def word(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=draws))]

    texts = []
    for _ in range(n):
        words = [word(FILL if k % 3 else NOUNS) for k in range(int(torch.randint(9, 40, (), generator=draws)))]
        texts.append(read(" ".join([*words, "."])))
    return texts


def dictionary_of(kind: str) -> Dictionary:
    draws = torch.Generator().manual_seed(1)
    ports = (Port("resid_post@1"),) if kind == "sae" else (Port("resid_post@1", 0), Port("resid_post@1", 1))
    return Dictionary(
        kind="sae" if kind == "sae" else "crosscoder",
        reads=ports,
        writes=ports,
        W_enc=tuple(torch.randn(8, N_LATENTS, generator=draws) for _ in ports),
        b_enc=torch.zeros(N_LATENTS),
        W_dec=tuple(torch.randn(N_LATENTS, 8, generator=draws) for _ in ports),
        b_dec=tuple(torch.zeros(8) for _ in ports),
        activation=ReLU(),
        provenance={"from": "<img src=x onerror=alert(2)>"},
    )


def notes_on(dictionary: Dictionary) -> LatentNotes:
    contexts = Contexts(tuple(corpus()))
    draws = torch.Generator().manual_seed(2)
    values = torch.zeros(len(contexts), N_LATENTS)
    ids, before = torch.from_numpy(contexts.ids), torch.from_numpy(contexts.shifted(-1))
    size = 1 + torch.rand(len(contexts), generator=draws)
    for latent, on in (
        (ON_BRIDGE, ids == IDS["bridge"]),
        (AFTER_OLD, before == IDS["old"]),
        (ON_SCRIPT, ids == IDS[NOUNS[3]]),
        (EVERYWHERE, ids >= 0),
        (UNEXPLAINED, ids == IDS["king"]),
    ):
        values[:, latent] = on * size * (latent + 1)
    features = FeatureCSR.from_dense(values)
    kept = (ON_BRIDGE, AFTER_OLD, ON_SCRIPT, NEVER)
    only = values.clone()
    only[:, [EVERYWHERE, UNEXPLAINED]] = 0
    raised = torch.tensor([[IDS["river"], IDS["king"]]] * N_LATENTS)
    raised[UNEXPLAINED] = torch.tensor([IDS[NOUNS[3]], IDS["garden"]])
    by = torch.tensor([[2.0, 1.0]] * N_LATENTS)
    effects = LogitEffects(raised, by, raised.flip(1), -by)
    return LatentNotes(
        dictionary=digest(dictionary),
        models=("a" * 64, "b" * 64)[: len(dictionary.writes)],
        seed=3,
        contexts=contexts,
        statistics=statistics(features, top=16),
        effects=(effects, None)[: len(dictionary.writes)],
        names={i: WORDS[i] for i in raised.unique().tolist()},
        features=FeatureCSR.from_dense(only),
        kept=kept,
        explanations={e.latent: e for e in explain(FeatureCSR.from_dense(only), contexts, kept, seed=3)},
    )


@dataclass(frozen=True)
class Known:
    """A dictionary without notes, notes on it, the same for a crosscoder of a pair, and which latent is which."""

    bare: Dictionary
    notes: LatentNotes
    pair: Dictionary
    pair_notes: LatentNotes
    on_bridge: int = 0
    after_old: int = 1
    on_script: int = 2
    everywhere: int = 3
    never: int = 4
    unexplained: int = 5
    script: str = NOUNS[3]


@pytest.fixture(scope="session")
def known() -> Known:
    """Latents that are known, hostile text among what they are active on."""
    bare, pair = dictionary_of("sae"), dictionary_of("crosscoder")
    return Known(bare, notes_on(bare), pair, notes_on(pair))
