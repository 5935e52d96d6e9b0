"""Variants: other text before and other words inside, and still the behaviour."""

import numpy as np
import pytest
import torch

from heredity.circuits.behaviours import Context, Piece
from heredity.circuits.divergence import Window, scan
from heredity.circuits.variants import STILL, variants
from heredity.interp.model import Model


def test_variants_end_as_their_context_and_keep_its_divergence(parent: Model, successor: Model) -> None:
    rng = np.random.default_rng(0)
    words = list(parent.tokenizer.get_vocab())[2:120]
    texts = [" ".join(words[int(k)] for k in rng.integers(len(words), size=14)) for _ in range(12)]
    windows = [Window(str(i), parent.encode(t), successor.encode(t)) for i, t in enumerate(texts)]
    found = scan(parent, successor, windows[:2]).texts
    given = [
        Context(Piece("corpus", w.parent, w.successor, s), len(s.kl) - 1, (len(s.kl) - 1, len(s.kl) - 1))
        for w, s in zip(windows[:2], found, strict=True)
    ]
    made = variants(given, parent, successor, windows[2:], count=6, window=24, rng=np.random.default_rng(1))
    again = variants(given, parent, successor, windows[2:], count=6, window=24, rng=np.random.default_rng(1))
    assert made and [c.ids_successor for c in made] == [c.ids_successor for c in again]
    assert len({c.ids_successor for c in made}) == len(made) <= 6
    for context in made:
        number = int(context.piece.scan.text_id.partition("~")[0])
        source = given[number]
        assert context.ids_successor[-1] == source.ids_successor[-1]
        assert context.kl >= STILL * source.kl
        with torch.inference_mode():
            log_s, log_p = (
                m.logits(torch.tensor([context.ids_successor]))[0, -1].double().log_softmax(-1)
                for m in (successor, parent)
            )
        assert context.kl == pytest.approx(float((log_s.exp() * (log_s - log_p)).sum()), rel=1e-3, abs=1e-5)
    assert variants([], parent, successor, windows, count=3, window=24, rng=rng) == []
