"""What is known of each latent after some tokens, as a record that can be merged with that of other tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

LOWEST, HIGHEST = -10, 20
N_BINS = HIGHEST - LOWEST + 2
"""Bins of the histogram: powers of two, so that a value's bin is read off its exponent. Bin 0 holds what is below
2**-10 (also zero and negative values), bin b in between [2**(b - 11), 2**(b - 10)), the last what is at least 2**20,
infinity and NaN included."""

_DTYPES = {
    "count": torch.int64,
    "sum": torch.float64,
    "sum_of_squares": torch.float64,
    "max": torch.float32,
    "histogram": torch.int64,
    "top_values": torch.float32,
    "top_tokens": torch.int64,
}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of F latents' stored activations over some tokens. Values count as rounded to float32.

    A NaN among a latent's values makes its ``sum``, ``sum_of_squares`` and ``max`` NaN and comes first in
    ``top_values``, so ``top_tokens`` tells where it was.

    Attributes:
        count: int64 [F], stored activations.
        sum: float64 [F].
        sum_of_squares: float64 [F].
        max: float32 [F], -inf where there are none.
        histogram: int64 [F, N_BINS], of the values; see :data:`N_BINS`.
        top_values: float32 [F, n], the n largest, descending, -inf where there are fewer.
        top_tokens: int64 [F, n], their token ids, of equal values the lowest first; -1 where there are fewer.
        n_tokens: tokens seen.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes do not belong together. Contents are checked by :meth:`validate` alone.
    """

    count: Tensor
    sum: Tensor
    sum_of_squares: Tensor
    max: Tensor
    histogram: Tensor
    top_values: Tensor
    top_tokens: Tensor
    n_tokens: int

    def __post_init__(self) -> None:
        n_latents, n = self.count.numel(), self.top_values.shape[-1] if self.top_values.ndim else 0
        if n < 1:
            raise ValueError(f"Statistics.top_values must be [latents, at least 1], not {list(self.top_values.shape)}")
        if not 0 <= self.n_tokens < 2**63:
            raise ValueError(f"Statistics.n_tokens must lie in [0, 2**63), not {self.n_tokens}")
        shapes = {"histogram": [n_latents, N_BINS], "top_values": [n_latents, n], "top_tokens": [n_latents, n]}
        for name, dtype in _DTYPES.items():
            array, shape = getattr(self, name), shapes.get(name, [n_latents])
            if array.dtype != dtype:
                raise TypeError(f"Statistics.{name} must be {dtype}, not {array.dtype}")
            if list(array.shape) != shape:
                raise ValueError(f"Statistics.{name} must have shape {shape}, not {list(array.shape)}")

    def __repr__(self) -> str:
        silent = int((self.count == 0).sum())
        return f"Statistics({self.n_latents} latents over {self.n_tokens} tokens, {silent} never active)"

    @property
    def n_latents(self) -> int:
        """F."""
        return len(self.count)

    @property
    def mean(self) -> Tensor:
        """Mean of the stored activations of each latent, float64 [F]; NaN where there are none."""
        return self.sum / self.count

    @property
    def frequency(self) -> Tensor:
        """Share of tokens with a stored activation of each latent, float64 [F]; NaN without tokens."""
        return self.count.double() / self.n_tokens if self.n_tokens else torch.full_like(self.sum, torch.nan)

    def to(self, device: torch.device | str) -> "Statistics":
        """On another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _DTYPES})

    def merge(self, *others: "Statistics") -> "Statistics":
        """Statistics over the tokens of all, which must be different tokens.

        In whatever order and grouping shards are merged, the result is the same, but for the rounding of float64 sums.

        Raises:
            ValueError: different numbers of latents or of top values.
        """
        for other in others:
            if other.top_values.shape != self.top_values.shape:
                ours, theirs = list(self.top_values.shape), list(other.top_values.shape)
                raise ValueError(f"can't merge statistics whose [latents, top] are {ours} and {theirs}")
        merged = self
        for other in others:
            top_values, top_tokens = _merged_top(merged, other)
            merged = Statistics(
                merged.count + other.count,
                merged.sum + other.sum,
                merged.sum_of_squares + other.sum_of_squares,
                torch.maximum(merged.max, other.max),
                merged.histogram + other.histogram,
                top_values,
                top_tokens,
                merged.n_tokens + other.n_tokens,
            )
        return merged

    def validate(self) -> "Statistics":
        """Return itself if the contents agree with each other.

        Raises:
            ValueError: they can't be statistics of any activations.
        """
        filled = torch.arange(self.top_values.shape[1], device=self.count.device) < self.count[:, None]
        first = self.top_values[:, 0]
        left, right = self.top_values[:, :-1], self.top_values[:, 1:]
        equal = (left == right) | (left.isnan() & right.isnan())
        tokens_ascend = self.top_tokens[:, :-1] < self.top_tokens[:, 1:]
        wrong = {
            "count lies outside [0, n_tokens]": (self.count < 0) | (self.count > self.n_tokens),
            "histogram does not sum to count": (self.histogram < 0).any(1) | (self.histogram.sum(1) != self.count),
            "sum_of_squares is negative": self.sum_of_squares < 0,
            "sum or sum_of_squares is not 0 though count is": (self.count == 0)
            & ((self.sum != 0) | (self.sum_of_squares != 0)),
            "top_tokens are not as many as count says": (filled != (self.top_tokens >= 0)).any(1),
            "top_tokens must be -1 where empty": (~filled & (self.top_tokens != -1)).any(1),
            "top_values must be -inf where empty": (~filled & (self.top_values != -torch.inf)).any(1),
            "top_values do not descend, NaN first": ~(equal | (left > right) | left.isnan()).all(1),
            "top_tokens do not ascend among equal top_values": (equal & filled[:, 1:] & ~tokens_ascend).any(1),
            "max is not the first of top_values": (self.max != first) & ~(self.max.isnan() & first.isnan()),
        }
        for fault, latents in wrong.items():
            if bool(latents.any()):
                raise ValueError(f"Statistics, latent {int(latents.nonzero()[0])}: {fault}")
        return self

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        arrays = {name: getattr(self, name).cpu().contiguous() for name in _DTYPES}
        save_file(arrays, path, {"format": "Statistics", "n_tokens": str(self.n_tokens)})

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what :meth:`save` wrote, checked.

        Raises:
            ValueError: the file is not such a file, or its contents can't be statistics.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "Statistics" or not metadata.get("n_tokens", "").isdecimal():
                    raise ValueError(f"{path}: not a Statistics file (its metadata do not say so)")
                arrays = {name: file.get_tensor(name) for name in _DTYPES}
            return cls(**arrays, n_tokens=int(metadata["n_tokens"])).validate()
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path}: not a Statistics file ({error})") from error


def _merged_top(a: Statistics, b: Statistics) -> tuple[Tensor, Tensor]:
    """The n largest of both, only looking at latents where ``b`` holds something that reaches ``a``'s n-th value."""
    n = a.top_values.shape[1]
    # Not "reaches", but "does not stay below", for NaN.
    rows = ((b.top_tokens[:, 0] >= 0) & ~(b.top_values[:, 0] < a.top_values[:, -1])).nonzero()[:, 0]
    values = torch.cat([a.top_values[rows], b.top_values[rows]], 1)
    tokens = torch.cat([a.top_tokens[rows], b.top_tokens[rows]], 1)
    # Empty places last, also behind a stored -inf.
    order = tokens.where(tokens >= 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    values, tokens = values.gather(1, order), tokens.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :n]
    top_values = a.top_values.index_copy(0, rows, values.gather(1, order))
    return top_values, a.top_tokens.index_copy(0, rows, tokens.gather(1, order))
