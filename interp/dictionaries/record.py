"""A sparse dictionary as plain arrays: what it reads, which latents are active, what it writes.

One record covers every kind. A **SAE** reads and writes one site; a **transcoder** writes another than it reads, a
**skip transcoder** adds a linear path beside the latents; a **crosscoder** reads and writes the same site of several
models, of any widths; one layer of a **cross-layer transcoder** reads one site and writes several
(:class:`DictionarySet` holds all its layers).

One letter means one dimension: T tokens, F latents, D the width of a site (it may differ from site to site).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from heredity.kernels import Activation, BatchTopK, FeatureCSR, JumpReLU, ReLU, TopK, decode, encode

if TYPE_CHECKING:
    from .browse import Latents

Kind = Literal["sae", "transcoder", "crosscoder", "cross_layer_transcoder"]
Scaling = Literal["none", "layer_norm", "unit_norm"]


@dataclass(frozen=True)
class Port:
    """A place a dictionary reads from or writes to.

    Attributes:
        site: a site name of :mod:`heredity.interp.sites`, or a foreign hook name that has no equal there (such a
            dictionary encodes and decodes, but cannot be spliced into a model).
        model: which of several models, 0 for the only one (of a pair: 0 parent, 1 successor).
    """

    site: str
    model: int = 0


@dataclass(frozen=True, eq=False)
class Dictionary:
    """F latents: ``a = activation(Σ_i x_i W_enc_i + b_enc)``, ``ŷ_j = a W_dec_j + b_dec_j (+ x W_skip)``.

    The arrays act on activations as the models produce them: whatever bias is taken off before the encoder, or
    per-model scale the training used, is folded in. The one exception is ``scaling``, which depends on the token.

    Attributes:
        kind: which kind.
        reads, writes: the places, in the order of the arrays.
        W_enc: one [D, F] per place read.
        b_enc: [F].
        W_dec: one [F, D] per place written.
        b_dec: one [D] per place written.
        activation: the exact rule at inference.
        norm: [F]; TopK and BatchTopK select by pre-activation times this (a crosscoder's Σ‖d‖).
        W_skip: [D read, D written] of a skip transcoder.
        scaling: what is done to each token before the encoder and undone after the decoder. ``layer_norm``: mean taken
            off, divided by the standard deviation (biased, plus 1e-5); ``unit_norm``: scaled to norm √D.
        provenance: where it comes from (format, model, training), JSON values only.
        notes: what was found out about its latents (:class:`.notes.LatentNotes`), or the directory to read it from when
            it is first asked for. Not part of the dictionary: it is kept in files of its own.

    Raises:
        ValueError: shapes do not belong together, or the kind does not fit the places.
        TypeError: dtypes differ.
    """

    kind: Kind
    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    W_enc: tuple[Tensor, ...]
    b_enc: Tensor
    W_dec: tuple[Tensor, ...]
    b_dec: tuple[Tensor, ...]
    activation: Activation
    norm: Tensor | None = None
    W_skip: Tensor | None = None
    scaling: Scaling = "none"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        counts = (len(self.reads), len(self.writes), len(self.W_dec))
        if counts != (len(self.W_enc), len(self.b_dec), len(self.b_dec)) or not all(counts):
            raise ValueError("a dictionary needs one W_enc per place read, one W_dec and b_dec per place written")
        fits = {
            "sae": self.reads == self.writes and len(self.reads) == 1,
            "transcoder": counts[:2] == (1, 1),
            "crosscoder": self.reads == self.writes,
            "cross_layer_transcoder": len(self.reads) == 1,
        }
        if not fits[self.kind]:
            raise ValueError(f"a {self.kind} does not read {self.reads} and write {self.writes}")
        if (self.scaling != "none" or self.W_skip is not None) and counts[:2] != (1, 1):
            raise ValueError("scaling and W_skip belong to dictionaries that read one place and write one")
        for name, tensor, shape in self._shapes():
            if list(tensor.shape) != list(shape):
                raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
            if tensor.dtype != self.b_enc.dtype:
                raise TypeError(f"{name} must be {self.b_enc.dtype}, not {tensor.dtype}")

    def __repr__(self) -> str:
        places = ", ".join(dict.fromkeys(f"{p.site}" for p in (*self.reads, *self.writes)))
        return f"Dictionary({self.kind} of {places}, {self.n_latents} latents, {rule_in_words(self.activation)})"

    def _repr_html_(self) -> str:
        from .browse import overview

        return overview(self)

    @property
    def n_latents(self) -> int:
        """F."""
        return len(self.b_enc)

    @cached_property
    def latents(self) -> "Latents":
        """The latents one by one, to look at: ``latents[17]``, ``latents.search("bridge")``, ``latents.sort(by="q")``.

        Raises:
            DictionaryError: the notes on them cannot be read, or are on another dictionary.
        """
        from .browse import latents

        return latents(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each place read."""
        return tuple(weight.shape[0] for weight in self.W_enc)

    @cached_property
    def decoder_norms(self) -> Tensor:
        """‖d‖ of each latent at each place written, [places, F]."""
        return torch.stack([decoder.norm(dim=1) for decoder in self.W_dec])

    @torch.no_grad()
    def encode(self, *x: Tensor) -> FeatureCSR:
        """The active latents of T tokens, given their activations [T, D] at each place read.

        Raises:
            TypeError, ValueError: as :func:`heredity.kernels.encode`.
        """
        scaled = [self._scale(each)[0] for each in x]
        return encode(scaled, list(self.W_enc), self.b_enc, self.activation, norm=self.norm)

    @torch.no_grad()
    def decode(self, features: FeatureCSR, *x: Tensor) -> list[Tensor]:
        """What ``features`` write, [T, D] at each place written.

        Args:
            features: active latents of T tokens, perhaps edited.
            x: the activations at the place read; needed only where ``scaling`` or ``W_skip`` says so.

        Raises:
            ValueError: they are needed and were not given.
        """
        out = decode(features, list(self.W_dec), list(self.b_dec))
        if self.scaling == "none" and self.W_skip is None:
            return out
        if len(x) != 1:
            raise ValueError("this dictionary's output depends on its input: give the activations at the place read")
        scaled, scale, mean = self._scale(x[0])
        if self.W_skip is not None:
            out = [out[0] + scaled @ self.W_skip]
        return [out[0] * scale + mean]

    def reconstruct(self, *x: Tensor) -> list[Tensor]:
        """:meth:`decode` of :meth:`encode`."""
        return self.decode(self.encode(*x), *x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """On another device or of another dtype (then without notes, which are on the numbers as they were)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype)

        activation = self.activation
        if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
            activation = replace(activation, threshold=move(activation.threshold))
        return replace(
            self,
            notes=self.notes if dtype in (None, self.b_enc.dtype) else None,
            W_enc=tuple(map(move, self.W_enc)),
            b_enc=move(self.b_enc),
            W_dec=tuple(map(move, self.W_dec)),
            b_dec=tuple(map(move, self.b_dec)),
            activation=activation,
            norm=None if self.norm is None else move(self.norm),
            W_skip=None if self.W_skip is None else move(self.W_skip),
        )

    def _scale(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Scaled tokens, and the factor and offset that undo it."""
        if self.scaling == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            scale = x.std(-1, keepdim=True, unbiased=False) + 1e-5
            return (x - mean) / scale, scale, mean
        if self.scaling == "unit_norm":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            return x / scale, scale, 0.0
        return x, 1.0, 0.0

    def _shapes(self) -> list[tuple[str, Tensor, Sequence[int]]]:
        n = self.n_latents
        found: list[tuple[str, Tensor, Sequence[int]]] = []
        found += [(f"W_enc[{i}]", w, (w.shape[0], n)) for i, w in enumerate(self.W_enc)]
        found += [(f"W_dec[{j}]", w, (n, w.shape[-1])) for j, w in enumerate(self.W_dec)]
        found += [
            (f"b_dec[{j}]", b, (w.shape[-1],)) for j, (b, w) in enumerate(zip(self.b_dec, self.W_dec, strict=True))
        ]
        if self.norm is not None:
            found.append(("norm", self.norm, (n,)))
        if self.W_skip is not None:
            found.append(("W_skip", self.W_skip, (self.W_enc[0].shape[0], self.W_dec[0].shape[1])))
        if isinstance(self.activation, JumpReLU) and isinstance(self.activation.threshold, Tensor):
            found.append(("threshold", self.activation.threshold, (n,)))
        return found


@dataclass(frozen=True, eq=False)
class DictionarySet:
    """Transcoders of several layers of one model: one each (PLT), or cross-layer ones that write to all later layers.

    Attributes:
        layers: one dictionary per layer, in order.
        provenance: as of :class:`Dictionary`.
    """

    layers: tuple[Dictionary, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> Dictionary:
        return self.layers[layer]

    @property
    def cross_layer(self) -> bool:
        """Whether layers write to other layers than their own."""
        return any(layer.kind == "cross_layer_transcoder" for layer in self.layers)

    def reconstruct(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all layers together write: site to [T, D], from activations by site read.

        Raises:
            ValueError: activations of a site are missing.
        """
        written: dict[str, Tensor] = {}
        for layer in self.layers:
            absent = [port.site for port in layer.reads if port.site not in x]
            if absent:
                raise ValueError(f"activations at {absent[0]} are missing")
            out = layer.reconstruct(*[x[port.site] for port in layer.reads])
            for port, value in zip(layer.writes, out, strict=True):
                written[port.site] = written[port.site] + value if port.site in written else value
        return written


def rule_in_words(activation: Activation) -> str:
    """An activation as a short text."""
    match activation:
        case ReLU():
            return "ReLU"
        case JumpReLU():
            return "JumpReLU"
        case TopK(k=k):
            return f"TopK {k}"
        case BatchTopK(k=int(k)):
            return f"BatchTopK {k}"
        case BatchTopK(threshold=threshold):
            return f"BatchTopK above {threshold:.4g}"
    raise TypeError(f"no such activation: {activation!r}")
