"""A dictionary put in the place of what it reconstructs, inside a model's forward.

At each site written, the model goes on with

    Σ decode(edit(f)) + error,    error = value − Σ decode(f)

where f are the active latents and the sums run over all dictionaries that write there. Without an edit this is the
value itself, to rounding. Errors are those of the forward that runs: whatever the model computes differently after an
edit stays, and only the edited latents' contribution is new. Errors of a clean run given instead (:func:`clean_errors`)
hold the error nodes still, as attribution graphs and sparse feature circuits do (Marks et al. 2024, arXiv:2403.19647,
§3.1): later layers are then what later dictionaries make of the changed input. Without errors the reconstruction alone
goes on.

Rows of the features are positions, batch by batch: position p of text b of [batch, pos] tokens is row b·pos + p.
Padding gets latents like any token; every other position's latents are its own, so padding changes none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heredity.kernels import BatchTopK, FeatureCSR, decode

from ..errors import DictionaryError
from ..model import Edit, Model
from ..sites import order, parse_site
from .record import Dictionary, DictionarySet, Port

FeatureEdit = Callable[[FeatureCSR], FeatureCSR]


def splice(
    dictionary: Dictionary | DictionarySet,
    edit: FeatureEdit | Mapping[int, FeatureEdit] | None = None,
    keep_error: bool = True,
    *,
    side: int = 0,
    given: Mapping[Port, Tensor] | None = None,
    errors: Mapping[str, Tensor] | None = None,
) -> dict[str, Edit]:
    """Edits for :meth:`heredity.interp.Model.logits` that run the model through ``dictionary``.

    They may be used for any number of forwards, one at a time. Latents carry no gradients.

    Args:
        dictionary: one dictionary, or those of several layers, which then all take part and whose writes to one site
            are summed.
        edit: what is done to the active latents before they are decoded; of a set, by number of the layer.
        keep_error: whether what the dictionary leaves unexplained is added back.
        side: which of a crosscoder's models this is (:attr:`Port.model`).
        given: activations [batch, pos, *site shape] at places that are not read from this forward: those of a
            crosscoder's other models, for the same tokens.
        errors: by site, the errors of a clean run to add instead of this forward's.

    Raises:
        DictionaryError: a place is no site of ours; activations are needed that this forward does not have by then;
            or which latents are active depends on the batch. In the forward: widths differ.
        SiteError: in the forward, if the model does not have the site.
        ValueError: ``errors`` without ``keep_error``, or for other sites or shapes; an edit changes the number of
            tokens or latents.
    """
    spliced = _Splice(dictionary, edit, keep_error, side, dict(given or {}), errors)
    return {site: spliced.at(site) for site in sorted(spliced.sites, key=order)}


@torch.no_grad()
def clean_errors(
    model: Model,
    dictionary: Dictionary | DictionarySet,
    tokens: Tensor,
    *,
    side: int = 0,
    given: Mapping[Port, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What the dictionary leaves unexplained of a forward without edits, by site written: [batch, pos, *site shape].

    Args and errors raised are those of :func:`splice`.
    """
    found: dict[str, Tensor] = {}
    spliced = _Splice(dictionary, None, True, side, dict(given or {}), None, found)
    edits = {site: spliced.at(site) for site in sorted(spliced.sites, key=order)}
    model.capture(tokens, [max(spliced.sites, key=order)], edits=edits)
    return found


def ablate(*latents: int) -> FeatureEdit:
    """An edit that switches ``latents`` off at every position."""

    def edit(features: FeatureCSR) -> FeatureCSR:
        off = torch.isin(features.indices, torch.tensor(latents, dtype=torch.int32, device=features.device))
        return features.with_values(features.values.masked_fill(off, 0.0))

    return edit


def clamp(values: Mapping[int, float]) -> FeatureEdit:
    """An edit that holds latents at the values given, at every position, whether they are active there or not."""

    def edit(features: FeatureCSR) -> FeatureCSR:
        held = torch.tensor(sorted(values), dtype=torch.int64, device=features.device)
        level = features.values.new_tensor([values[latent] for latent in sorted(values)])
        tokens, latents, active = features.to_coo()
        other = ~torch.isin(latents, held.int())
        every = torch.arange(features.n_tokens, device=features.device)
        return FeatureCSR.from_coo(
            torch.cat([tokens[other], every.repeat_interleave(len(held))]),
            torch.cat([latents[other].long(), held.repeat(features.n_tokens)]),
            torch.cat([active[other], level.repeat(features.n_tokens)]),
            (features.n_tokens, features.n_latents),
        )

    return edit


def layers_of(dictionary: Dictionary | DictionarySet) -> tuple[Dictionary, ...]:
    """The dictionaries of a set, or the one."""
    return dictionary.layers if isinstance(dictionary, DictionarySet) else (dictionary,)


def check_token_by_token(dictionary: Dictionary) -> None:
    """Nothing, if a token's latents do not depend on which other tokens are in the batch.

    Raises:
        DictionaryError: they do, as with BatchTopK by k.
    """
    if isinstance(dictionary.activation, BatchTopK) and dictionary.activation.k is not None:
        raise DictionaryError(
            "which latents are active depends on the other tokens of the batch (BatchTopK by k)",
            where=repr(dictionary),
            remedy="Give it the threshold it is meant to use at inference: BatchTopK(threshold=…).",
        )


def check_width(dictionary: Dictionary, port: Port, found: int, wanted: int) -> None:
    """Nothing, if the model's activations at ``port`` are as wide as the dictionary's.

    Raises:
        DictionaryError: they are not.
    """
    if found != wanted:
        raise DictionaryError(
            f"{port.site} of the model is {found} wide, the dictionary {wanted}",
            where=repr(dictionary),
            remedy="Use it with the model it was trained on.",
        )


@dataclass(frozen=True)
class _Active:
    """One dictionary's latents in the forward that runs."""

    x: tuple[Tensor, ...]
    found: FeatureCSR
    edited: FeatureCSR


@dataclass
class _Splice:
    """The edits of one splice and what they tell each other in a forward."""

    dictionary: Dictionary | DictionarySet
    edit: FeatureEdit | Mapping[int, FeatureEdit] | None
    keep_error: bool
    side: int
    given: Mapping[Port, Tensor]
    errors: Mapping[str, Tensor] | None
    into: dict[str, Tensor] | None = None
    seen: dict[Port, Tensor] = field(default_factory=dict)
    active: dict[int, _Active] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = layers_of(self.dictionary)
        self.edits = self._edits()
        for layer in self.layers:
            check_token_by_token(layer)
            self._check_places(layer)
        own = [port.site for layer in self.layers for port in layer.writes if port.model == self.side]
        self.written = set(own)
        self.sites = self.written | {port.site for layer in self.layers for port in self._own_reads(layer)}
        if self.errors is not None and (not self.keep_error or set(self.errors) != self.written):
            raise ValueError(f"errors must be kept and be those of {sorted(self.written)}, not {sorted(self.errors)}")

    def at(self, site: str) -> Edit:
        """The edit at one site."""
        here = Port(site, self.side)
        ready = [i for i, layer in enumerate(self.layers) if self._last_read(layer) == site]
        first = min(self.sites, key=order) == site
        # Dictionaries whose reads were all given are encoded as soon as this forward gets anywhere.
        ready += [i for i, layer in enumerate(self.layers) if first and self._last_read(layer) is None]
        writers = [(i, layer.writes.index(here)) for i, layer in enumerate(self.layers) if here in layer.writes]
        done = [i for i, _ in writers if max(self._own_writes(self.layers[i]), key=order) == site]

        def edited(value: Tensor) -> Tensor:
            self.seen[here] = value
            for i in ready:
                self.active[i] = self._encode(i, value)
            out = self._write(site, value, writers) if writers else value
            for i in done:
                del self.active[i]
            if site == max(self.sites, key=order):
                self.seen.clear()
            return out

        return edited

    def _encode(self, i: int, value: Tensor) -> _Active:
        layer, edit = self.layers[i], self.edits.get(i)
        x = tuple(self._input(layer, m, value) for m in range(len(layer.reads)))
        found = layer.encode(*x)
        changed = found if edit is None else edit(found)
        if (changed.n_tokens, changed.n_latents) != (found.n_tokens, found.n_latents):
            raise ValueError(f"an edit must keep tokens and latents: it made {changed!r} of {found!r}")
        return _Active(x, found, changed)

    def _input(self, layer: Dictionary, m: int, value: Tensor) -> Tensor:
        """Activations [T, D] at the m-th place read."""
        port = layer.reads[m]
        read = self.given[port] if port in self.given else self.seen[port]
        if read.shape[:2] != value.shape[:2]:
            shapes = f"{list(read.shape[:2])}, this forward {list(value.shape[:2])}"
            raise ValueError(f"activations given for {port.site} of model {port.model} are of [batch, pos] {shapes}")
        flat = read.detach().flatten(0, 1).flatten(1).to(layer.W_enc[m].dtype)
        check_width(layer, port, flat.shape[1], layer.W_enc[m].shape[0])
        return flat

    def _write(self, site: str, value: Tensor, writers: list[tuple[int, int]]) -> Tensor:
        flat = value.flatten(0, 1).flatten(1)
        flat = flat.to(torch.promote_types(flat.dtype, self.layers[0].b_enc.dtype))
        before = after = torch.zeros_like(flat)
        for i, j in writers:
            layer, active = self.layers[i], self.active[i]
            check_width(layer, layer.writes[j], flat.shape[1], layer.W_dec[j].shape[1])
            was = _decoded(layer, j, active.found, active.x)
            before = before + was
            after = after + (was if active.edited is active.found else _decoded(layer, j, active.edited, active.x))
        error = (flat - before).reshape(value.shape)
        if self.into is not None:
            self.into[site] = error
        if self.errors is not None:
            error = self.errors[site]
            if error.shape != value.shape:
                raise ValueError(f"errors at {site} are {list(error.shape)}, this forward {list(value.shape)}")
        out = after.reshape(value.shape)
        return (out + error if self.keep_error else out).to(value.dtype)

    # --- checks ---

    def _edits(self) -> dict[int, FeatureEdit]:
        if self.edit is None:
            return {}
        if isinstance(self.dictionary, Dictionary):
            if not callable(self.edit):
                raise ValueError("the edit of one dictionary is a function, not a mapping")
            return {0: self.edit}
        if callable(self.edit) or not set(self.edit) <= set(range(len(self.layers))):
            raise ValueError(f"the edits of a set are given by number of the layer, 0 to {len(self.layers) - 1}")
        return dict(self.edit)

    def _check_places(self, layer: Dictionary) -> None:
        where, fault = repr(layer), ""
        foreign = [port.site for port in (*layer.reads, *layer.writes) if parse_site(port.site) is None]
        elsewhere = [port for port in layer.reads if port.model != self.side and port not in self.given]
        if foreign:
            fault, remedy = (
                f"{foreign[0]!r} is a hook of other software",
                "A dictionary can be spliced at our sites only.",
            )
        elif not self._own_writes(layer):
            fault, remedy = f"it writes nothing to model {self.side}", "Choose another side."
        elif elsewhere:
            fault = f"it also reads {elsewhere[0].site} of model {elsewhere[0].model}"
            remedy = "Give that model's activations for the same tokens."
        else:
            reads, first = self._own_reads(layer), min(self._own_writes(layer), key=order)
            late = [port.site for port in reads if order(port.site) > order(first)]
            if not late:
                return
            fault = f"it writes {first} before the forward has come to {late[0]}, which it reads"
            remedy = f"Give the activations at {late[0]}."
        raise DictionaryError(fault, where=where, remedy=remedy)

    def _own_reads(self, layer: Dictionary) -> list[Port]:
        return [port for port in layer.reads if port.model == self.side and port not in self.given]

    def _own_writes(self, layer: Dictionary) -> list[str]:
        return [port.site for port in layer.writes if port.model == self.side]

    def _last_read(self, layer: Dictionary) -> str | None:
        return max((port.site for port in self._own_reads(layer)), key=order, default=None)


def _decoded(layer: Dictionary, j: int, features: FeatureCSR, x: tuple[Tensor, ...]) -> Tensor:
    """What ``features`` write to the j-th place, [T, D]."""
    if len(layer.writes) == 1:
        return layer.decode(features, *x)[0]
    # Neither scaling nor a skip connection goes with several places.
    return decode(features, layer.W_dec[j], layer.b_dec[j])
