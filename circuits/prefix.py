"""Some pairs of prompts, run from the first token on that differs: what stands before is computed once.

Attention is causal, so everything before the first token in which a pair's prompts differ is the same in both, in every
mixture of both and under every intervention that exchanges one for the other. Its keys and values are kept as a cache,
and forwards, backwards and patches run on the rest. Logits are read only where the metric looks.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .pairs import AtLast, Metric, Pairs

_works: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


class Batch:
    """The pairs ``rows``, without the tokens that all of them share between clean and counterfactual.

    Args:
        model: the model.
        pairs: all pairs.
        rows: int64 [n], which of them.
        share: whether to leave the shared beginning out. Not for interventions that would change it, such as means.

    Attributes:
        pairs: tokens from ``start`` on; ``last`` counts from there.
        start: tokens left out.
    """

    def __init__(self, model: Model, pairs: Pairs, rows: Tensor, *, share: bool = True) -> None:
        whole = pairs.of(rows)
        self.model, self.rows = model, rows
        self.start = int(whole.first.min()) if share and can_share(model) else 0
        rest = slice(self.start, None)
        self.pairs = Pairs(whole.clean[:, rest], whole.corrupt[:, rest], whole.last - self.start)
        self._before = whole.clean[:, : self.start]
        self._cache = _keys_and_values(model, self._before) if self.start else []
        self._logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def value(self, metric: Metric, tokens: Tensor, edits: Mapping[str, Edit] | None = None) -> Tensor:
        """The metric [copies · n] on ``tokens`` [copies · n, pos], rows of the batch in order, copy after copy."""
        return self.value_and_capture(metric, tokens, (), edits)[0]

    def value_and_capture(
        self,
        metric: Metric,
        tokens: Tensor,
        sites: Sequence[str],
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The metric, and values at ``sites`` from ``start`` on."""
        copies = len(tokens) // len(self)
        rows, last, past = self.rows.repeat(copies), self.pairs.last.repeat(copies), self._past(copies)
        if isinstance(metric, AtLast) and can_share(self.model):
            positions, which = last.unique(return_inverse=True)
            logits, seen = self.model.logits_and_capture(tokens, sites, edits=edits, past=past, positions=positions)
            return metric.at_last(logits[torch.arange(len(rows)), which], rows), seen
        logits, seen = self.model.logits_and_capture(tokens, sites, edits=edits, past=past)
        if self.start:
            if self._logits is None:
                with torch.no_grad():
                    self._logits = self.model.logits(self._before)
            logits = torch.cat([self._logits.repeat(copies, 1, 1), logits], 1)
        return metric(logits, rows), seen

    def capture(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """Values at ``sites`` on ``tokens`` [copies · n, pos], from ``start`` on."""
        return self.model.capture(tokens, sites, past=self._past(len(tokens) // len(self)))

    def _past(self, copies: int):
        if not self._cache:
            return None
        return _cache_of(
            [(keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1)) for keys, values in self._cache]
        )


def can_share(model: Model) -> bool:
    """Whether ``model`` computes the same from a cache of its beginning, and reads logits where asked (tried once)."""
    if model not in _works:
        tokens = torch.arange(2 * min(4, model.shape.n_ctx // 2))[None] % model.shape.d_vocab
        half = tokens.shape[1] // 2
        with torch.no_grad():
            whole = model.logits(tokens)[:, half:]
            try:
                cache = _cache_of(_keys_and_values(model, tokens[:, :half]))
                rest = model.logits(tokens[:, half:], past=cache, positions=torch.arange(half))
                _works[model] = rest.shape == whole.shape and bool((rest - whole).norm() <= 1e-4 * whole.norm())
            except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):
                _works[model] = False  # an architecture with a cache of another kind
    return _works[model]


def _keys_and_values(model: Model, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        cache: Any = _cache_of([])
        model.logits(tokens, past=cache, positions=torch.tensor([tokens.shape[1] - 1]))
    layers: list[Any] = cache.layers  # of a dynamic cache, which hold keys and values
    return [(layer.keys, layer.values) for layer in layers]


def _cache_of(keys_and_values: list[tuple[Tensor, Tensor]]):
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(keys_and_values):
        cache.update(keys, values, layer)
    return cache
