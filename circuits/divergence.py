"""Where two models disagree: per-token KL both ways, what each would say, and which logits moved (diff mining).

Sources: relative entropy (Kullback & Leibler 1951); diff mining (arXiv 2608.26462) for the counts of top logit
differences. Shapes: N aligned positions, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
        raised: Counter[int] = Counter()
        lowered: Counter[int] = Counter()
        out = []
        for i, window in enumerate(windows):
            pairs = zip(*align(window.parent, window.successor), strict=True)
            kept = [(a, b) for a, b in pairs if b >= window.first]
            at_parent, at_successor = [a for a, _ in kept], [b for _, b in kept]
            columns: list[list[float]] = [[] for _ in range(8)]
            surprise: list[float] = []
            surprise_parent: list[float] = []
            for lo in range(0, len(kept), CHUNK):
                at, at_p = at_successor[lo : lo + CHUNK], at_parent[lo : lo + CHUNK]
                rows_p, rows_s = logits_parent[i, at_p], logits_successor[i, at]
                log_p, log_s = _common(rows_p, rows_s, vocab)
                surprise += _surprise(_own(rows_s, log_s, vocab), window.successor.ids, at)
                surprise_parent += _surprise(_own(rows_p, log_p, vocab), window.parent.ids, at_p)
                for column, values in zip(columns, _compare(log_p, log_s, vocab), strict=True):
                    column += values.tolist()
                _mine(log_p, log_s, vocab, raised, lowered)
            kl, reverse, *rest = columns
            found = TextScan(window.text_id, at_successor, at_parent, kl, reverse, *rest, surprise, surprise_parent)  # pyright: ignore
            out.append(found)
    return Scan(out, dict(raised), dict(lowered))


def _own(logits: Tensor, common: Tensor, vocab: Vocabulary) -> Tensor:
    """Log-probabilities [N, V] over a model's own tokens, which mostly are the common ones."""
    return common if vocab.same and common.shape == logits.shape else torch.log_softmax(logits.float(), -1)


def _surprise(log_p: Tensor, ids: Sequence[int], at: Sequence[int]) -> list[float]:
    """−log p of the token after each position ``at``; rows of ``log_p`` are those positions."""
    return [-float(log_p[k, ids[i + 1]]) if i + 1 < len(ids) else 0.0 for k, i in enumerate(at)]


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


def _mine(log_p: Tensor, log_s: Tensor, vocab: Vocabulary, raised: Counter[int], lowered: Counter[int]) -> None:
    gain = log_s - log_p if vocab.same else (log_s - log_p)[:, :-1]
    k = min(MINED, gain.shape[1])
    for counter, best in ((raised, gain.topk(k)), (lowered, (-gain).topk(k))):
        moved = best.indices[best.values > 0]
        counter.update((moved if vocab.ids_successor is None else vocab.ids_successor[moved]).tolist())
