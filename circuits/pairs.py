"""Prompts in pairs, clean and counterfactual, of equal length token by token, and what is measured on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    def groups(self, tokens: int) -> Iterator[Tensor]:
        """Numbers of pairs, shortest first, in groups of at most ``tokens`` padded tokens (at least one pair)."""
        group: list[int] = []
        for i in self.last.argsort(stable=True).tolist():
            if group and (int(self.last[i]) + 1) * (len(group) + 1) > tokens:
                yield torch.tensor(group)
                group = []
            group.append(i)
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
        found = []
        for at, row in zip(_at_last(logits, self.last, rows), rows.tolist(), strict=True):
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
        found = []
        for at, row in zip(_at_last(logits, self.last, rows).softmax(-1), rows.tolist(), strict=True):
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
        own = _at_last(logits, self.last, rows).log_softmax(-1)
        target = self.reference[rows]
        return (target.exp() * (own - target)).sum(-1)


def _at_last(logits: Tensor, last: Tensor, rows: Tensor) -> Tensor:
    return logits[torch.arange(len(rows)), last[rows]].float()
