"""Sparse latent activations of many tokens, in compressed rows: what every op of this package passes on.

One letter means one dimension throughout the package: T tokens, D width of a model's activations, F latents,
N stored activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

_TOO_MANY = 2**31
"""Latent ids are int32."""


@dataclass(frozen=True, eq=False)
class LatentView:
    """The same activations ordered by latent, then token.

    Attributes:
        indptr: int64 [F + 1]; activations of latent f stand at ``indptr[f]:indptr[f + 1]``.
        tokens: int64 [N], token of each.
        order: int64 [N], where each stands in the token-major arrays, so ``values[order]`` are its values.
    """

    indptr: Tensor
    tokens: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class FeatureCSR:
    """Activations of T tokens on F latents, row by row, latents ascending within a row.

    Attributes:
        indptr: int64 [T + 1]; activations of token t stand at ``indptr[t]:indptr[t + 1]``.
        indices: int32 [N], latent of each.
        values: [N], its activation, any floating dtype.
        n_latents: F.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices do not belong together. Contents are checked by :meth:`validate` alone.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    n_latents: int

    def __post_init__(self) -> None:
        for name, dtype in (("indptr", torch.int64), ("indices", torch.int32)):
            if getattr(self, name).dtype != dtype:
                raise TypeError(f"FeatureCSR.{name} must be {dtype}, not {getattr(self, name).dtype}")
        if not self.values.is_floating_point():
            raise TypeError(f"FeatureCSR.values must be floating point, not {self.values.dtype}")
        if self.indptr.ndim != 1 or len(self.indptr) < 1:
            raise ValueError(f"FeatureCSR.indptr must be [tokens + 1], not {list(self.indptr.shape)}")
        if self.indices.ndim != 1 or self.values.shape != self.indices.shape:
            shapes = f"{list(self.indices.shape)} and {list(self.values.shape)}"
            raise ValueError(f"FeatureCSR.indices and .values must be of one length, not {shapes}")
        if len({t.device for t in (self.indptr, self.indices, self.values)}) > 1:
            raise ValueError("FeatureCSR.indptr, .indices and .values must be on one device")
        if not 0 <= self.n_latents < _TOO_MANY:
            raise ValueError(f"FeatureCSR.n_latents must lie in [0, 2**31), not {self.n_latents}")

    def __repr__(self) -> str:
        place = f"{self.dtype}, {self.device}".replace("torch.", "")
        return f"FeatureCSR({self.n_tokens} tokens x {self.n_latents} latents, {self.nnz} active, {place})"

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """N."""
        return len(self.indices)

    @property
    def mean_active(self) -> float:
        """Active latents per token; 0 without tokens."""
        return self.nnz / self.n_tokens if self.n_tokens else 0.0

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @cached_property
    def tokens(self) -> Tensor:
        """Token of each activation, int64 [N]."""
        every = torch.arange(self.n_tokens, device=self.device)
        return torch.repeat_interleave(every, self.indptr.diff(), output_size=self.nnz)

    @cached_property
    def by_latent(self) -> LatentView:
        """Ordered by latent; computed once."""
        indices, order = torch.sort(self.indices, stable=True)
        counts = torch.bincount(indices, minlength=self.n_latents)
        return LatentView(starts(counts), self.tokens[order], order)

    def with_values(self, values: Tensor) -> "FeatureCSR":
        """The same places holding ``values`` [N]; what was computed about the places is kept."""
        new = FeatureCSR(self.indptr, self.indices, values, self.n_latents)
        kept = {name: self.__dict__[name] for name in ("tokens", "by_latent") if name in self.__dict__}
        new.__dict__.update(kept)
        return new

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FeatureCSR":
        """On another device or with values of another dtype."""
        values = self.values.to(device=device, dtype=dtype)
        return FeatureCSR(self.indptr.to(values.device), self.indices.to(values.device), values, self.n_latents)

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, part: slice) -> "FeatureCSR":
        """Some consecutive tokens; no copy of their activations."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"FeatureCSR takes a slice of consecutive tokens, not {part!r}")
        first, last, _ = part.indices(self.n_tokens)
        indptr = self.indptr[first : max(first, last) + 1]
        begin, end = int(indptr[0]), int(indptr[-1])
        return FeatureCSR(indptr - begin, self.indices[begin:end], self.values[begin:end], self.n_latents)

    @classmethod
    def concatenate(cls, parts: Sequence["FeatureCSR"]) -> "FeatureCSR":
        """The tokens of all ``parts`` in order.

        Raises:
            ValueError: no parts, or parts over different numbers of latents.
        """
        if not parts:
            raise ValueError("nothing to concatenate")
        sizes = {part.n_latents for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"parts have different numbers of latents: {sorted(sizes)}")
        counts = torch.cat([part.indptr.diff() for part in parts])
        indices, values = torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])
        return cls(starts(counts), indices, values, parts[0].n_latents)

    @classmethod
    def from_dense(cls, dense: Tensor) -> "FeatureCSR":
        """Every entry of ``dense`` [T, F] that is not zero."""
        if dense.ndim != 2:
            raise ValueError(f"dense must be [tokens, latents], not {list(dense.shape)}")
        tokens, latents = dense.nonzero(as_tuple=True)
        counts = torch.bincount(tokens, minlength=dense.shape[0])
        return cls(starts(counts), latents.int(), dense[tokens, latents], dense.shape[1])

    def to_dense(self) -> Tensor:
        """[T, F], zero where nothing is stored. Takes T·F memory; differentiable in the values."""
        dense = self.values.new_zeros(self.n_tokens, self.n_latents)
        return dense.index_put((self.tokens, self.indices.long()), self.values)

    @classmethod
    def from_coo(cls, tokens: Tensor, latents: Tensor, values: Tensor, shape: tuple[int, int]) -> "FeatureCSR":
        """Entries [N] in any order.

        Raises:
            TypeError: places are not whole numbers.
            ValueError: an entry lies outside ``shape`` (tokens, latents), or one stands there twice, or there are not
                as many tokens, latents and values.
        """
        n_tokens, n_latents = shape
        if tokens.is_floating_point() or latents.is_floating_point():
            raise TypeError(f"tokens and latents must be whole numbers, not {tokens.dtype} and {latents.dtype}")
        if not len(tokens) == len(latents) == len(values):
            counts = f"{len(tokens)} tokens, {len(latents)} latents and {len(values)} values"
            raise ValueError(f"{counts}: give as many of each")
        for name, ids, size in (("tokens", tokens, n_tokens), ("latents", latents, n_latents)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(f"{name} must lie in [0, {size})")
        key = tokens.long() * n_latents + latents.long()
        key, order = torch.sort(key)
        if len(key) and not bool((key.diff() > 0).all()):
            raise ValueError("an entry is given twice")
        counts = torch.bincount(tokens.long(), minlength=n_tokens)
        return cls(starts(counts), latents[order].int(), values[order], n_latents)

    def to_coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, value) of each activation, token-major."""
        return self.tokens, self.indices, self.values

    def validate(self) -> "FeatureCSR":
        """Return itself if the contents are in order.

        Raises:
            ValueError: ``indptr`` does not ascend from 0 to N, or a row's latents do not ascend within [0, F).
        """
        steps = self.indptr.diff()
        if int(self.indptr[0]) != 0 or int(self.indptr[-1]) != self.nnz or bool((steps < 0).any()):
            raise ValueError(f"FeatureCSR.indptr must ascend from 0 to the number of activations, {self.nnz}")
        if self.nnz:
            low, high = int(self.indices.min()), int(self.indices.max())
            if low < 0 or high >= self.n_latents:
                wrong = low if low < 0 else high
                raise ValueError(f"FeatureCSR.indices must lie in [0, {self.n_latents}), found {wrong}")
            same_row = self.tokens.diff() == 0
            if bool((same_row & (self.indices.diff() <= 0)).any()):
                raise ValueError("FeatureCSR.indices must ascend within each row")
        return self

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        arrays = {"indptr": self.indptr, "indices": self.indices, "values": self.values.detach()}
        arrays = {name: array.cpu().contiguous() for name, array in arrays.items()}
        save_file(arrays, path, {"format": "FeatureCSR", "n_latents": str(self.n_latents)})

    @classmethod
    def load(cls, path: str | Path) -> "FeatureCSR":
        """Read what :meth:`save` wrote, checked.

        Raises:
            ValueError: the file is not such a file, or its contents are out of order.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "FeatureCSR" or not metadata.get("n_latents", "").isdecimal():
                    raise ValueError(f"{path}: not a FeatureCSR file (its metadata do not say so)")
                indptr, indices, values = (file.get_tensor(name) for name in ("indptr", "indices", "values"))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a FeatureCSR file ({error})") from error
        try:
            return cls(indptr, indices, values, int(metadata["n_latents"])).validate()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; write it again with FeatureCSR.save") from error


def starts(counts: Tensor) -> Tensor:
    """Where each of consecutive groups of these sizes [n] starts, and the total: int64 [n + 1]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
