"""Which part of what a site carries is explained, and which is not.

At every site of a split

    y = e + u,    e = Σ_i q_i a_i d_i + b,    u = what is left: error + Σ_i (1 − q_i) a_i d_i

with a_i the activations of units (latents of a dictionary, heads, neurons), d_i what they write and q_i in [0, 1] how
well it is explained when unit i is active (:mod:`heredity.interp.explain`). Constants such as b cancel in everything
that is measured with a split.

* **Latents** (:class:`DictionaryPart`): a_i as the dictionary computes it; a unit that is not active writes nothing.
  The linear path of a skip transcoder has no label, so it is left to u.
* **Heads and neurons** (:class:`HeadsPart`, :class:`NeuronsPart`): an explanation covers the tokens at which the unit
  counted as active when it was made (the largest 5 % of its values, :mod:`heredity.interp.explain.nodes`) and, of a
  head, one direction. So e holds q_i times the unit's write where it is at least that large, along that direction; the
  rest of what it writes is unexplained however good the label.
* Sites in :attr:`Split.opaque` have no units: all they carry is unexplained.

One letter means one dimension: T tokens, F units, W sets of weights, D width of a site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
from heredity.interp.dictionaries.splicing import check_token_by_token, check_width, layers_of
from heredity.interp.errors import DictionaryError
from heredity.interp.sites import parse_site
from heredity.kernels import decode


@dataclass(frozen=True, eq=False)
class World:
    """One of the two runs that are compared: a model at some tokens.

    Attributes:
        model: a :class:`heredity.interp.Model`, or whatever has its ``logits``, ``capture`` and the weights parts need.
        tokens: int64 [batch, pos].
        side: which of a crosscoder's models it is.
        given: what a crosscoder reads of its other models, [batch, pos, *site shape], for the same tokens.
    """

    model: Any
    tokens: Tensor
    side: int = 0
    given: Mapping[Port, Tensor] = field(default_factory=dict)


@runtime_checkable
class Part(Protocol):
    """Units whose activity is computed from some sites and written to others of the same forward."""

    @property
    def q(self) -> Tensor:
        """How well each unit is explained, [F]."""
        ...

    def with_q(self, q: Tensor) -> "Part":
        """The same units, explained otherwise."""
        ...

    def reads(self, side: int) -> tuple[str, ...]:
        """Sites of the own model that are read."""
        ...

    def writes(self, side: int) -> tuple[str, ...]:
        """Sites of the own model that are written."""
        ...

    def write(self, world: World, seen: Mapping[str, Tensor], weights: Tensor, slopes: bool) -> dict[str, Tensor]:
        """What units write when each is multiplied by its weight, with constants: site to [W, batch, pos, D].

        Args:
            world: the run.
            seen: values [batch, pos, …] at the sites read.
            weights: [W, F].
            slopes: whether gradients (of either mode) flow from ``seen`` and ``weights``. Which units are active is
                held fixed.
        """
        ...


@dataclass(frozen=True, eq=False)
class DictionaryPart:
    """The latents of one dictionary.

    Attributes:
        dictionary: SAE, transcoder, crosscoder or one layer of a cross-layer transcoder. All but crosscoders are
            applied to whichever model runs.
        q: [F].

    Raises:
        DictionaryError: it stands at hooks of other software, or its latents depend on the rest of the batch.
        ValueError: not one q in [0, 1] for each latent.
    """

    dictionary: Dictionary
    q: Tensor

    def __post_init__(self) -> None:
        check_token_by_token(self.dictionary)
        _check_q(self.q, self.dictionary.n_latents, repr(self.dictionary))
        foreign = [p.site for p in (*self.dictionary.reads, *self.dictionary.writes) if parse_site(p.site) is None]
        if foreign:
            raise DictionaryError(
                f"{foreign[0]!r} is a hook of other software",
                where=repr(self.dictionary),
                remedy="Opacity can be measured at our sites only.",
            )

    def with_q(self, q: Tensor) -> "DictionaryPart":
        """The same latents, explained otherwise."""
        return replace(self, q=q)

    def reads(self, side: int) -> tuple[str, ...]:
        """Sites of model ``side`` that it reads."""
        return tuple(port.site for port in self.dictionary.reads if self._own(port, side))

    def writes(self, side: int) -> tuple[str, ...]:
        """Sites of model ``side`` that it writes."""
        return tuple(port.site for port in self.dictionary.writes if self._own(port, side))

    def write(self, world: World, seen: Mapping[str, Tensor], weights: Tensor, slopes: bool) -> dict[str, Tensor]:
        """As :meth:`Part.write`."""
        d = self.dictionary
        values = [seen[p.site] if self._own(p, world.side) else world.given[p] for p in d.reads]
        shape = values[0].shape[:2]
        x = [value.flatten(0, 1).flatten(1).to(encoder) for value, encoder in zip(values, d.W_enc, strict=True)]
        for port, flat, encoder in zip(d.reads, x, d.W_enc, strict=True):
            check_width(d, port, flat.shape[1], encoder.shape[0])
        features = d.encode(*[each.detach() for each in x])
        scale, middle = _scaling(d, x[0])
        tokens, latents, active = features.tokens, features.indices.long(), features.values
        if slopes:
            # A value stays what it is and takes its pre-activation's slope: every activation keeps its own.
            for each, encoder in zip(x, d.W_enc, strict=True):
                scaled = (each - middle) / scale
                active = active + ((scaled - scaled.detach())[tokens] * encoder.T[latents]).sum(1)
        out: dict[str, Tensor] = {}
        for j, port in enumerate(d.writes):
            if self._own(port, world.side):
                rows = []
                for each in weights.to(active):
                    weighted = active * each[latents]
                    if slopes:
                        terms = weighted[:, None] * d.W_dec[j][latents]
                        row = d.b_dec[j].expand(len(x[0]), -1).index_add(0, tokens, terms)
                    else:
                        row = decode(features.with_values(weighted), d.W_dec[j], d.b_dec[j])
                    rows.append(row * scale + middle)
                written = torch.stack(rows).unflatten(1, shape)
                out[port.site] = written if slopes else written.detach()
        return out

    def elsewhere(self, side: int) -> tuple[Port, ...]:
        """What is read of other models."""
        return tuple(port for port in self.dictionary.reads if not self._own(port, side))

    def _own(self, port: Port, side: int) -> bool:
        # A dictionary of one model is applied to whichever model runs.
        return port.model == side or self.dictionary.kind != "crosscoder"


@dataclass(frozen=True, eq=False)
class HeadsPart:
    """The heads of one layer (H of them), each along one direction where its write is large.

    Attributes:
        layer: which.
        q: [H].
        thresholds: [H]; a head is active where the absolute value of what is measured of it reaches its threshold.
        directions: [H, D], unit vectors; a head's activation is its write's projection. None: all of the write counts,
            and its norm is its activation.
        centres: [H, D], taken off a write before it is projected (a mean write).
    """

    layer: int
    q: Tensor
    thresholds: Tensor
    directions: Tensor | None = None
    centres: Tensor | None = None

    def __post_init__(self) -> None:
        _check_q(self.q, len(self.thresholds), f"attention of layer {self.layer}")

    def with_q(self, q: Tensor) -> "HeadsPart":
        """The same heads, explained otherwise."""
        return replace(self, q=q)

    def reads(self, side: int) -> tuple[str, ...]:
        """Values of heads."""
        return (f"attn_z@{self.layer}",)

    def writes(self, side: int) -> tuple[str, ...]:
        """The attention's output."""
        return (f"attn_out@{self.layer}",)

    def write(self, world: World, seen: Mapping[str, Tensor], weights: Tensor, slopes: bool) -> dict[str, Tensor]:
        """As :meth:`Part.write`."""
        weight, bias = world.model.head_weights(self.layer)
        z = seen[f"attn_z@{self.layer}"]
        written = torch.einsum("bphd,hdm->bphm", z, weight) + bias / len(self.q)
        if self.directions is None:
            active = written.detach().norm(dim=-1) >= self.thresholds
        else:
            centred = written if self.centres is None else written - self.centres
            along = torch.einsum("bphm,hm->bph", centred, self.directions)
            written = along[..., None] * self.directions
            active = along.detach().abs() >= self.thresholds
        out = torch.einsum("bphm,wh->wbpm", written * active[..., None], weights.to(written))
        return {f"attn_out@{self.layer}": out if slopes else out.detach()}


@dataclass(frozen=True, eq=False)
class NeuronsPart:
    """The neurons of one layer's MLP (M of them), each where its value is large.

    Attributes:
        layer: which.
        q: [M].
        thresholds: [M]; a neuron is active where its absolute value reaches its threshold.
    """

    layer: int
    q: Tensor
    thresholds: Tensor

    def __post_init__(self) -> None:
        _check_q(self.q, len(self.thresholds), f"MLP of layer {self.layer}")

    def with_q(self, q: Tensor) -> "NeuronsPart":
        """The same neurons, explained otherwise."""
        return replace(self, q=q)

    def reads(self, side: int) -> tuple[str, ...]:
        """Neurons."""
        return (f"mlp_post@{self.layer}",)

    def writes(self, side: int) -> tuple[str, ...]:
        """The MLP's output."""
        return (f"mlp_out@{self.layer}",)

    def write(self, world: World, seen: Mapping[str, Tensor], weights: Tensor, slopes: bool) -> dict[str, Tensor]:
        """As :meth:`Part.write`."""
        weight, _ = world.model.neuron_weights(self.layer)
        value = seen[f"mlp_post@{self.layer}"]
        active = value * (value.detach().abs() >= self.thresholds)
        out = torch.stack([(active * each) @ weight for each in weights.to(active)])
        return {f"mlp_out@{self.layer}": out if slopes else out.detach()}


def dictionary_parts(dictionary: Dictionary | DictionarySet, q: Sequence[Tensor]) -> list[DictionaryPart]:
    """A part for each dictionary, given the q of its latents.

    Raises:
        ValueError: not one q [F] for each dictionary.
        DictionaryError: as :class:`DictionaryPart`.
    """
    layers = layers_of(dictionary)
    if len(layers) != len(q):
        raise ValueError(f"{len(layers)} dictionaries need as many q, not {len(q)}")
    return [DictionaryPart(layer, each) for layer, each in zip(layers, q, strict=True)]


def _scaling(d: Dictionary, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Factor and offset [T, 1] that undo a dictionary's scaling of tokens [T, D]."""
    if d.scaling == "layer_norm":
        return x.std(-1, keepdim=True, unbiased=False) + 1e-5, x.mean(-1, keepdim=True)
    if d.scaling == "unit_norm":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return torch.where(scale > 0, scale, torch.ones_like(scale)), 0.0
    return 1.0, 0.0


def _check_q(q: Tensor, n: int, where: str) -> None:
    if tuple(q.shape) != (n,) or not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(f"{where}: needs one q in [0, 1] for each of {n} units, not {list(q.shape)}")
