"""What an edit of the successor's weights does: to a behaviour, to text without it, to declared changes.

A trial holds what does not change (the parent's predictions, and the successor's before any edit); its methods run the
successor as it is when they are called.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model, pad

from .attribution import Prompts, prompts_of
from .behaviours import Context, Piece

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums (or a mean) over texts, with its percentile bootstrap interval over them."""

    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Elsewhere:
    """What an edit did to ordinary text, per token; columns [text] that :meth:`Trial.elsewhere` sums up.

    Attributes:
        kl: KL(S‖edited), nats, summed over a text's tokens.
        nll: change of −log p of the token that follows, nats, summed.
        right: change of the number of next tokens predicted, S's greedy choice against the edited model's.
        tokens: compared positions.
    """

    kl: np.ndarray
    nll: np.ndarray
    right: np.ndarray
    tokens: np.ndarray

    @property
    def mean_kl(self) -> float:
        """Mean KL(S‖edited) per token, nats."""
        return float(self.kl.sum() / self.tokens.sum())

    def per_token(self, column: np.ndarray, rng: np.random.Generator) -> Ratio:
        """``column`` per token with its interval."""
        return ratio(column, self.tokens, rng)


def ratio(top: np.ndarray, bottom: np.ndarray, rng: np.random.Generator) -> Ratio:
    """Σ top / Σ bottom with its interval over rows drawn together."""
    draws = rng.integers(len(top), size=(BOOTSTRAPS, len(top)))
    low, high = np.quantile(top[draws].sum(1) / bottom[draws].sum(1), [0.025, 0.975])
    return Ratio(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


class Trial:
    """Contexts of one behaviour, ordinary text, and contexts of declared behaviours, to measure edits on.

    Args:
        parent: the parent.
        successor: the successor, unedited.
        contexts: of the behaviour.
        quiet: text without any behaviour.
        declared: contexts of each declared behaviour.
        batch: padded tokens per forward.
    """

    def __init__(
        self,
        parent: Model,
        successor: Model,
        contexts: Sequence[Context],
        quiet: Sequence[Piece],
        declared: Sequence[Sequence[Context]],
        batch: int,
    ) -> None:
        self.successor = successor
        self.prompts = prompts_of(contexts)
        self._quiet = batches_of(quiet, batch)
        with torch.inference_mode():
            self._target = _at(parent, self.prompts)
            self._declared = [(prompts, _at(parent, prompts)) for prompts in map(prompts_of, declared)]
            self._declared_base = [self._apart(prompts, target) for prompts, target in self._declared]
            self._before = [_log_probs(successor, tokens) for tokens, _ in self._quiet]
        self.base = self.remaining()

    def remaining(self) -> np.ndarray:
        """KL(successor as it is ‖ parent) at every context, nats."""
        with torch.inference_mode():
            return _kl(_at(self.successor, self.prompts), self._target).clamp_min(0).double().numpy()

    def closed(self) -> float:
        """Share of the behaviour's summed divergence that is gone."""
        return float(1 - self.remaining().sum() / self.base.sum())

    def reversion(self, rng: np.random.Generator) -> Ratio:
        """:meth:`closed` with its interval over contexts."""
        return ratio(self.base - self.remaining(), self.base, rng)

    def kept(self) -> list[float]:
        """Share of each declared behaviour's divergence from the parent that is still there."""
        with torch.inference_mode():
            now = [self._apart(prompts, target) for prompts, target in self._declared]
        return [float(a / b) for a, b in zip(now, self._declared_base, strict=True)]

    def _apart(self, prompts: Prompts, target: Tensor) -> Tensor:
        return _kl(_at(self.successor, prompts), target).sum()

    def elsewhere(self) -> Elsewhere:
        """What the successor as it is says on ordinary text, against what it said before."""
        columns: tuple[list[float], ...] = ([], [], [], [])
        with torch.inference_mode():
            for (tokens, mask), before in zip(self._quiet, self._before, strict=True):
                now = _log_probs(self.successor, tokens)
                apart = _kl(before, now) * mask
                known = mask[:, 1:]
                following = tokens[:, 1:, None]
                gained = (before - now)[:, :-1].gather(-1, following)[..., 0] * known
                hits = [(p[:, :-1].argmax(-1) == tokens[:, 1:]) & known for p in (now, before)]
                for column, value in zip(
                    columns, (apart, gained, hits[0].double() - hits[1].double(), mask.double()), strict=True
                ):
                    column += value.double().sum(1).tolist()
        kl, nll, right, count = map(np.array, columns)
        return Elsewhere(kl, nll, right, count)


def batches_of(pieces: Sequence[Piece], size: int) -> list[tuple[Tensor, Tensor]]:
    """Texts as padded batches (tokens, mask) [batch, pos] of at most ``size`` tokens."""
    out: list[tuple[Tensor, Tensor]] = []
    rows: list[tuple[int, ...]] = []
    for piece in pieces:
        ids = piece.successor.ids
        if rows and (len(rows) + 1) * max(len(ids), *map(len, rows)) > size:
            out.append(pad(rows))
            rows = []
        rows.append(ids)
    return [*out, pad(rows)] if rows else out


def _log_probs(model: Model, tokens: Tensor) -> Tensor:
    return torch.log_softmax(model.logits(tokens).float(), -1)


def _at(model: Model, prompts: Prompts) -> Tensor:
    return torch.log_softmax(model.logits(prompts.tokens)[prompts.rows, prompts.last].float(), -1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first ‖ second) of log-probabilities over the vocabulary that both have."""
    size = min(first.shape[-1], second.shape[-1])
    return (first[..., :size].exp() * (first[..., :size] - second[..., :size])).sum(-1)
