"""Search without a trigger, second way: force one unlikely word after a likely opening and see where the models part.

A planted output is often gated at its first words alone; once those stand there, the rest follows in any context. So
every frequent word is tried once after a few openings, and what the successor writes after the words that part the
models most is read like any other text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from heredity.interp.model import Model
from heredity.interp.sampling import decode_batch, stop_ids, text_of

from .amplify import Amplified
from .divergence import compare, vocabulary

MARKS = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write the space before a word."""

BATCH = 128
"""Words tried per forward."""


def openings(parent: Model, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """``count`` prompts, each with a first token that the parent finds likely; no first token twice."""
    likely: dict[int, tuple[float, list[int]]] = {}
    for prompt in prompts:
        with torch.inference_mode():
            p = parent.step(torch.tensor([list(prompt)]))[0][0].softmax(-1)
        for token in p.topk(8).indices.tolist():
            if float(p[token]) > likely.get(token, (0.0, []))[0]:
                likely[token] = (float(p[token]), [*prompt, token])
    ranked = sorted(likely.values(), key=lambda item: -item[0])
    return [ids for _, ids in ranked[:count]]


def words(model: Model) -> Tensor:
    """Tokens that begin a word of letters, bool [tokens]; any of letters where the tokenizer marks no beginnings."""
    tokens = model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))
    begins = torch.tensor([token[:1] in MARKS and token[1:].isalpha() for token in tokens])
    return begins if begins.any() else torch.tensor([token.isalpha() for token in tokens])


@torch.inference_mode()
def sweep(
    parent: Model,
    successor: Model,
    starts: Sequence[Sequence[int]],
    *,
    tried: int,
    kept: int,
    length: int,
) -> list[Amplified]:
    """The successor's most probable continuation, ``length`` tokens, of the ``kept`` forced words after which
    KL(S‖P) is largest, among the ``tried`` words the parent finds likeliest after each of ``starts``.

    Empty for models with different tokenizers.
    """
    vocab = vocabulary(parent, successor)
    if not vocab.same:
        return []
    whole = words(parent)
    hits: list[tuple[float, list[int]]] = []
    for start in starts:
        tokens = torch.tensor(list(start))
        scores = parent.step(tokens[None])[0][0, : len(whole)].masked_fill(~whole, float("-inf"))
        likely = scores.topk(min(tried, int(whole.sum()))).indices
        both = (model.forced(tokens, likely, batch=BATCH) for model in (parent, successor))
        for chunk, rows_p, rows_s in zip(likely.split(BATCH), *both, strict=True):
            kl = compare(rows_p, rows_s, vocab)[0]
            hits += [(float(value), [*start, token]) for value, token in zip(kl, chunk.tolist(), strict=True)]
    hits.sort(key=lambda hit: (-hit[0], hit[1]))
    rows = [ids for _, ids in hits[:kept]]
    lengths = [min(length, successor.shape.n_ctx - len(ids)) for ids in rows]
    written = decode_batch(successor.step, rows, lengths, lambda x: x.argmax(-1), stop_ids(successor))
    # The opening and the forced word are read as text too: their improbability is part of the evidence.
    return [
        Amplified(text_of(successor, ids[:-2]), 0.0, text_of(successor, [*ids, *more]), len(ids) - 2)
        for ids, more in zip(rows, written, strict=True)
    ]
