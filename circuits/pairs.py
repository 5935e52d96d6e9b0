"""Prompts in pairs, clean and counterfactual, of equal length token by token, and what is measured on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Metric(Protocol):
    """A number per prompt that is larger the more the behaviour shows.

    ``logits`` are [batch, pos, d_vocab] and ``rows`` int64 [batch] says which pair each is of (a pair may come several
    times); the result is [batch].
    """

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor: ...  # noqa: D102


@runtime_checkable
class AtLast(Protocol):
    """A metric that looks at each pair's last token only, so that logits need not be computed elsewhere.

    ``logits`` are [batch, d_vocab], those at the last token.
    """

    def at_last(self, logits: Tensor, rows: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Pairs:
    """N pairs of prompts.

    Attributes:
        clean, corrupt: token ids int64 [N, pos], padded on the right.
        last: index of each pair's last token, int64 [N].

    Raises:
        ValueError: shapes differ.
    """

    clean: Tensor
    corrupt: Tensor
    last: Tensor

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupt.shape or self.last.shape != self.clean.shape[:1]:
            raise ValueError(
                f"pairs need clean and corrupt prompts of one shape and one length each, not {list(self.clean.shape)}, "
                f"{list(self.corrupt.shape)}, {list(self.last.shape)}"
            )

    def __len__(self) -> int:
        return len(self.clean)

    @cached_property
    def first(self) -> Tensor:
        """Index of the first token in which each pair's prompts differ (of the last token where none does), [N]."""
        differs = self.clean != self.corrupt
        return torch.where(differs.any(1), differs.int().argmax(1), self.last).minimum(self.last)

    def groups(self, tokens: int, *, share: bool = False) -> Iterator[Tensor]:
        """Numbers of pairs, shortest first, in groups of at most ``tokens`` padded tokens (at least one pair).

        With ``share``, tokens before the first that differs in a group count nothing (:mod:`.prefix`).
        """
        ends = self.last.tolist()
        starts = self.first.tolist() if share else [0] * len(self)
        group: list[int] = []
        start = 0
        for i in sorted(range(len(self)), key=lambda i: (ends[i], starts[i])):
            earliest = min(start, starts[i]) if group else starts[i]
            if group and (ends[i] + 1 - earliest) * (len(group) + 1) > tokens:
                yield torch.tensor(group)
                group, earliest = [], starts[i]
            group.append(i)
            start = earliest
        if group:
            yield torch.tensor(group)

    def of(self, rows: Tensor) -> "Pairs":
        """Some of the pairs, without padding that none of them needs."""
        width = int(self.last[rows].max()) + 1
        return Pairs(self.clean[rows, :width], self.corrupt[rows, :width], self.last[rows])


@dataclass(frozen=True)
class LogitDifference:
    """Mean logit of the right answers minus mean logit of the wrong ones at the last token of each pair.

    Attributes:
        last: int64 [N].
        right, wrong: token ids per pair.
    """

    last: Tensor
    right: Sequence[Sequence[int]]
    wrong: Sequence[Sequence[int]]

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[batch]."""
        return self.at_last(_at_last(logits, self.last, rows), rows)

    def at_last(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[batch], of logits [batch, d_vocab]."""
        found = []
        for at, row in zip(logits, rows.tolist(), strict=True):
            found.append(at[list(self.right[row])].mean() - at[list(self.wrong[row])].mean())
        return torch.stack(found)


@dataclass(frozen=True)
class ProbabilityDifference:
    """Probability of the right answers together minus that of the wrong ones at the last token (mass on a set).

    Attributes:
        last: int64 [N].
        right, wrong: token ids per pair; ``wrong`` may be empty.
    """

    last: Tensor
    right: Sequence[Sequence[int]]
    wrong: Sequence[Sequence[int]]

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[batch]."""
        return self.at_last(_at_last(logits, self.last, rows), rows)

    def at_last(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[batch], of logits [batch, d_vocab]."""
        found = []
        for at, row in zip(logits.softmax(-1), rows.tolist(), strict=True):
            found.append(at[list(self.right[row])].sum() - at[list(self.wrong[row])].sum())
        return torch.stack(found)


@dataclass(frozen=True)
class NegativeKL:
    """−KL(reference ‖ model) at the last token, nats: 0 where the model predicts what the reference does.

    Its gradient vanishes at the clean end of the path, so one gradient there sees nothing (Syed et al. 2310.10348,
    section 3.3).

    Attributes:
        last: int64 [N].
        reference: log-probabilities on the clean prompts [N, d_vocab].
    """

    last: Tensor
    reference: Tensor

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[batch]."""
        return self.at_last(_at_last(logits, self.last, rows), rows)

    def at_last(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[batch], of logits [batch, d_vocab]."""
        own = logits.log_softmax(-1)
        target = self.reference[rows]
        return (target.exp() * (own - target)).sum(-1)


def _at_last(logits: Tensor, last: Tensor, rows: Tensor) -> Tensor:
    return logits[torch.arange(len(rows)), last[rows]]
