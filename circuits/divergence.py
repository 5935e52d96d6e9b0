"""Where two models disagree: per-token KL both ways, what each would say, and which logits moved (diff mining).

Sources: relative entropy (Kullback & Leibler 1951); diff mining (arXiv 2608.26462) for the counts of top logit
differences. Shapes: N aligned positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heredity.interp.align import align, same_vocabulary, shared_vocabulary
from heredity.interp.model import Encoded, Model, pad

CHUNK = 256
"""Rows of [rows, V] log-probabilities held at once: bounds memory, not results."""

LEAST = math.log(1e-9)
"""Log-probability of the bucket of unshared tokens at least: a model may have none."""

MINED = 20
"""Top logit differences counted per position."""


@dataclass(frozen=True)
class Vocabulary:
    """How the two models' next-token distributions are brought onto the same events.

    Equal tokenizers compare every token. Different ones compare the tokens that both spell alike, with everything
    else in one bucket: by the data-processing inequality the KL is then a lower bound.
    """

    size: int | None
    ids_parent: Tensor | None = None
    ids_successor: Tensor | None = None

    @property
    def same(self) -> bool:
        """Whether token ids mean the same in both models."""
        return self.size is not None


def vocabulary(parent: Model, successor: Model) -> Vocabulary:
    """The common events of the pair."""
    if same_vocabulary(parent.tokenizer, successor.tokenizer):
        return Vocabulary(min(parent.shape.d_vocab, successor.shape.d_vocab))
    ids_parent, ids_successor = shared_vocabulary(parent.tokenizer, successor.tokenizer)
    return Vocabulary(None, ids_parent, ids_successor)


@dataclass(frozen=True)
class TextScan:
    """Divergence along one text; one entry per aligned position, whose prediction is the token after it."""

    text_id: str
    position: list[int]
    """Index into the successor's tokens."""
    position_parent: list[int]
    kl: list[float]
    """KL(S‖P), nats."""
    reverse: list[float]
    """KL(P‖S), nats."""
    top_successor: list[int]
    """Successor's most probable token (its own id)."""
    p_successor: list[float]
    """Its probability under the successor, and under the parent."""
    p_successor_in_parent: list[float]
    top_parent: list[int]
    """Parent's most probable token (its own id)."""
    p_parent: list[float]
    p_parent_in_successor: list[float]
    surprise: list[float]
    """−log p of the token that really follows, under the successor, nats (0 at the last token)."""
    surprise_parent: list[float]
    """The same under the parent, of the token that follows there."""


@dataclass(frozen=True)
class Window:
    """A piece of text as both models read it."""

    text_id: str
    parent: Encoded
    successor: Encoded
    first: int = 0
    """Successor position from which it is compared: what stands before is only context."""

    @property
    def longer(self) -> Encoded:
        """The reading with more tokens."""
        return max(self.parent, self.successor, key=lambda encoded: len(encoded.ids))

    def for_parent(self) -> "Window":
        """The same piece for comparing the parent with a model that reads as it does."""
        first = 0
        if self.first:
            start = self.successor.spans[self.first][0]
            spans = self.parent.spans
            first = next((i for i, (_, end) in enumerate(spans) if end > start), len(spans))
        return Window(self.text_id, self.parent, self.parent, first)


@dataclass(frozen=True)
class Scan:
    """Divergence along several texts, with the tokens whose logits moved most often."""

    texts: list[TextScan]
    raised: dict[int, int]
    """Successor token id → positions where its log-probability gain was among the top :data:`MINED`."""
    lowered: dict[int, int]


def logits_of_parent(parent: Model, windows: Sequence[Window]) -> Tensor:
    """The parent's logits [window, pos, V] on ``windows``, for :func:`scan`."""
    with torch.inference_mode():
        return parent.logits(pad([w.parent.ids for w in windows])[0])


def scan(parent: Model, successor: Model, windows: Sequence[Window], logits_parent: Tensor | None = None) -> Scan:
    """Compare the models on ``windows``, one forward of each model for all of them; of the successor alone where the
    parent's logits are known."""
    vocab = vocabulary(parent, successor)
    with torch.inference_mode():
        if logits_parent is None:
            logits_parent = logits_of_parent(parent, windows)
        logits_successor = successor.logits(pad([w.successor.ids for w in windows])[0])
        kept = []
        for window in windows:
            pairs = zip(*align(window.parent, window.successor), strict=True)
            kept.append([(a, b) for a, b in pairs if b >= window.first])
        # Rows of all windows together: small models spend longer on starting an operation than on a window's rows.
        rows = torch.tensor([(i, a, b) for i, pairs in enumerate(kept) for a, b in pairs], dtype=torch.int64)
        rows = rows.reshape(-1, 3)
        both = list(zip(windows, kept, strict=True))
        next_p = torch.tensor([_next(w.parent.ids, a) for w, pairs in both for a, _ in pairs], dtype=torch.int64)
        next_s = torch.tensor([_next(w.successor.ids, b) for w, pairs in both for _, b in pairs], dtype=torch.int64)
        columns: list[list[Any]] = [[] for _ in range(10)]
        moved = torch.zeros(2, successor.shape.d_vocab, dtype=torch.int64)
        for lo in range(0, len(rows), CHUNK):
            part = slice(lo, lo + CHUNK)
            window, at_parent, at_successor = rows[part].T
            rows_p, rows_s = logits_parent[window, at_parent], logits_successor[window, at_successor]
            log_p, log_s = _common(rows_p, rows_s, vocab)
            values = [
                *_compare(log_p, log_s, vocab),
                _surprise(_own(rows_s, log_s, vocab), next_s[part]),
                _surprise(_own(rows_p, log_p, vocab), next_p[part]),
            ]
            for column, found in zip(columns, values, strict=True):
                column += found.tolist()
            _mine(log_p, log_s, vocab, moved)
    out, begin = [], 0
    for window, pairs in both:
        own = [column[begin : begin + len(pairs)] for column in columns]
        out.append(TextScan(window.text_id, [b for _, b in pairs], [a for a, _ in pairs], *own))
        begin += len(pairs)
    raised, lowered = (_counted(count) for count in moved)
    return Scan(out, raised, lowered)


def _counted(count: Tensor) -> dict[int, int]:
    """The tokens that were counted, with how often."""
    tokens = count.nonzero()[:, 0]
    return dict(zip(tokens.tolist(), count[tokens].tolist(), strict=True))


def _next(ids: Sequence[int], at: int) -> int:
    """The token after position ``at``; −1 where there is none."""
    return ids[at + 1] if at + 1 < len(ids) else -1


def _own(logits: Tensor, common: Tensor, vocab: Vocabulary) -> Tensor:
    """Log-probabilities [N, V] over a model's own tokens, which mostly are the common ones."""
    return common if vocab.same and common.shape == logits.shape else torch.log_softmax(logits.float(), -1)


def _surprise(log_p: Tensor, following: Tensor) -> Tensor:
    """−log p [N] of the tokens ``following`` [N], 0 where there is none."""
    found = -log_p.gather(1, following.clamp_min(0)[:, None])[:, 0]
    return found.masked_fill(following < 0, 0.0)


def compare(parent: Tensor, successor: Tensor, vocab: Vocabulary) -> tuple[Tensor, ...]:
    """Columns ``kl`` to ``p_parent_in_successor`` of :class:`TextScan` for logits [N, V] of both models."""
    return _compare(*_common(parent, successor, vocab), vocab)


def _compare(log_p: Tensor, log_s: Tensor, vocab: Vocabulary) -> tuple[Tensor, ...]:
    p, s = log_p.exp(), log_s.exp()
    # Rounding can leave a KL of equal distributions a hair below zero.
    kl = (s * (log_s - log_p)).sum(-1).clamp_min(0)
    reverse = (p * (log_p - log_s)).sum(-1).clamp_min(0)
    # The bucket of unshared tokens is the last column of the projected case: never named as a prediction.
    named = slice(None) if vocab.same else slice(0, -1)
    top_s, top_p = s[:, named].argmax(-1), p[:, named].argmax(-1)
    rows = torch.arange(len(kl))
    own_s = top_s if vocab.ids_successor is None else vocab.ids_successor[top_s]
    own_p = top_p if vocab.ids_parent is None else vocab.ids_parent[top_p]
    return kl, reverse, own_s, s[rows, top_s], p[rows, top_s], own_p, p[rows, top_p], s[rows, top_p]


def _common(parent: Tensor, successor: Tensor, vocab: Vocabulary) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models over the common events, [N, events] each."""
    if vocab.same:
        return (
            torch.log_softmax(parent[:, : vocab.size].float(), -1),
            torch.log_softmax(successor[:, : vocab.size].float(), -1),
        )
    return _project(parent, vocab.ids_parent), _project(successor, vocab.ids_successor)


def _project(logits: Tensor, ids: Tensor | None) -> Tensor:
    assert ids is not None
    log_p = torch.log_softmax(logits.float(), -1)
    # Summed, not one minus the shared: where little is left that would be rounding alone, and the KL no lower bound.
    rest = log_p.index_fill(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p[:, ids], rest.clamp_min(LEAST)], -1)


def _mine(log_p: Tensor, log_s: Tensor, vocab: Vocabulary, moved: Tensor) -> None:
    """Count, in ``moved`` [2, V], the successor's tokens that gained and that lost most at each row."""
    gain = log_s - log_p if vocab.same else (log_s - log_p)[:, :-1]
    k = min(MINED, gain.shape[1])
    for count, best in zip(moved, (gain.topk(k), (-gain).topk(k)), strict=True):
        found = best.indices[best.values > 0]
        found = found if vocab.ids_successor is None else vocab.ids_successor[found]
        count += found.bincount(minlength=len(count))
