"""The nodes that write to the stream at one prompt, and the direct effect of each on whatever reads it.

    A[t, s] = a_s · Σ_l W_dec[s, l] · g_l(t)        latents
    A[t, (l, p)] = ε_{l,p} · g_l(t)                 errors, ε = MLP output − reconstruction
    A[t, p] = W_E[token_p] · g_0(t)                 token embeddings

with g(t) the gradient of what target t reads in the frozen model (:mod:`.replacement`). Over all sources, and with what
constants put there, the effects add up to what t reads: a latent's pre-activation, a logit. They are not multiplied by
the target's activation (Ameisen et al. 2025, "Circuit tracing"; conventions of decoderesearch/circuit-tracer).

One letter means one dimension: P positions, D width, L layers, N active latents, S sources, B targets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, DictionarySet
from heredity.interp.dictionaries.splicing import check_token_by_token, check_width, layers_of
from heredity.interp.errors import DictionaryError
from heredity.interp.model import Model
from heredity.interp.sites import parse_site
from heredity.kernels import FeatureCSR, attribute, attribute_errors, decode

from .replacement import Frozen, Stream

READS = ("mlp_in", "resid_mid", "mlp_out")


@dataclass(frozen=True, eq=False)
class Active:
    """The active latents of one dictionary at the prompt.

    Attributes:
        dictionary: which.
        layer, kind: the site it reads, ``kind`` one of :data:`READS`.
        writes: layers whose MLP it stands for, one per place written.
        features: rows are positions.
        first: where its latents begin among all.
    """

    dictionary: Dictionary
    layer: int
    kind: str
    writes: tuple[int, ...]
    features: FeatureCSR
    first: int


@dataclass(frozen=True, eq=False)
class Sources:
    """All that writes to the stream at one prompt; S = N + L·P + P columns: latents, errors, tokens.

    Latents are in the order of layer, position, latent; error (l, p) is column N + l·P + p.

    Attributes:
        frozen: the model at the prompt.
        active: by layer.
        errors: [L, P, D].
        constant: [L, P, D], what dictionaries write whatever is active (and, at positions that are left out, the whole
            of the MLP's output).
        skips: by layer, the linear path [D, D] of a skip transcoder.
        unranked: [L, P, D], what latents that are no columns write, or None if all active latents are.
    """

    frozen: Frozen
    active: tuple[Active, ...]
    errors: Tensor
    constant: Tensor
    skips: dict[int, Tensor]
    unranked: Tensor | None = None

    @property
    def n_latents(self) -> int:
        """N."""
        return sum(part.features.nnz for part in self.active)

    @property
    def n_columns(self) -> int:
        """S."""
        n_layers, n_positions = self.errors.shape[:2]
        return self.n_latents + (n_layers + 1) * n_positions

    @cached_property
    def latents(self) -> Tensor:
        """(layer, position, latent) of each, int64 [N, 3]."""
        parts = [
            torch.stack([torch.full_like(a.features.tokens, a.layer), a.features.tokens, a.features.indices.long()], 1)
            for a in self.active
        ]
        return torch.cat(parts) if parts else torch.zeros(0, 3, dtype=torch.int64, device=self.errors.device)

    @cached_property
    def activations(self) -> Tensor:
        """[N]."""
        return torch.cat([self.errors.new_zeros(0), *(a.features.values for a in self.active)])

    def constants(self) -> Iterator[Stream]:
        """What constants alone put into the stream, place by place from below."""
        return self.frozen.run(torch.zeros_like(self.frozen.embedded), self.constant.__getitem__, self.skips)

    # --- what reads ---

    def part(self, layer: int) -> Active:
        """The dictionary that reads at ``layer``."""
        return next(a for a in self.active if a.layer == layer)

    def directions(self, layer: int, positions: Tensor, latents: Tensor) -> Tensor:
        """The directions [B, D] of the stream before a layer's MLP that latents of that layer read, int64 [B] both."""
        a = self.part(layer)
        return self._to_stream(a, a.dictionary.W_enc[0].T[latents], positions)

    def read(self, layer: int, x: Tensor, positions: Tensor, latents: Tensor) -> Tensor:
        """Pre-activations [B] of latents of a layer, given the stream [P, D] before its MLP, biases included."""
        a, frozen = self.part(layer), self.frozen.layers[layer]
        if a.kind != "resid_mid":
            x = frozen.mlp_norm.forward(x)
        if a.kind == "mlp_out":
            assert frozen.mlp is not None
            x = frozen.mlp.forward(x)
        weight = a.dictionary.W_enc[0].T[latents]
        return (x[positions] * weight).sum(1) + a.dictionary.b_enc[latents]

    # --- effects ---

    def rows(
        self, depths: Tensor, positions: Tensor, gradient: Tensor, before_attention: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Direct effects of all sources on B targets.

        Args:
            depths, positions, gradient, before_attention: as of :meth:`.replacement.Frozen.sweep`.

        Returns:
            [B, S], and [B, 2]: the effects of latents that are no columns, summed by position, their sum and the sum
            of their absolute values.
        """
        n_latents, (n_layers, n_positions) = self.n_latents, self.errors.shape[:2]
        out = gradient.new_zeros(len(gradient), self.n_columns)
        rest = gradient.new_zeros(len(gradient), 2)
        for layer, g in self.frozen.sweep(depths, positions, gradient, self.skips, before_attention):
            n, cone = g.shape[:2]
            if layer < 0:
                at = n_latents + n_layers * n_positions
                out[:, at : at + cone] = attribute_errors(g, self.frozen.embedded[:cone])
                continue
            at = n_latents + layer * n_positions
            out[:n, at : at + cone] = attribute_errors(g, self.errors[layer, :cone])
            if self.unranked is not None:
                left = attribute_errors(g, self.unranked[layer, :cone])
                rest[:n] += torch.stack([left.sum(1), left.abs().sum(1)], 1)
            for a in self.active:
                if layer in a.writes:
                    inside = a.features[:cone]
                    part = out[:n, a.first : a.first + inside.nnz]
                    part += attribute(g, inside, a.dictionary.W_dec[a.writes.index(layer)])
        out[:, :n_latents] *= self.activations
        return out, rest

    def total_effects(self, gradient: Tensor) -> Tensor:
        """What each latent contributes to a direction [D] at the end of the stream over all paths, [N].

        Its activation times the gradient in the frozen model with latents passing effects on (section "Indirect
        influence" of the source): exact, in one backward. Every active latent's slope is one.
        """
        n_layers, n_positions, width = self.errors.shape
        coefficients = [a.features.values.new_zeros(a.features.nnz) for a in self.active]
        g = gradient.new_zeros(1, n_positions, width)
        g[0, -1] = gradient
        for i in range(n_layers - 1, -1, -1):
            layer = self.frozen.layers[i]
            out = g if layer.post is None else layer.post.backward(g, slice(None))
            for k, a in enumerate(self.active):
                if i in a.writes:
                    coefficients[k] += attribute(out, a.features, a.dictionary.W_dec[a.writes.index(i)])[0]
            if i in self.skips:
                g = g + layer.mlp_norm.backward(out @ self.skips[i].T, slice(None))
            for k, a in enumerate(self.active):
                if a.layer == i and a.features.nnz:
                    carried = a.features.with_values(coefficients[k])
                    zero = torch.zeros_like(a.dictionary.b_dec[0])
                    read = decode(carried, a.dictionary.W_enc[0].T.contiguous(), zero)
                    g = g + self._to_stream(a, read, torch.arange(n_positions, device=g.device))
            layer.attend_backward(g)
        return torch.cat([c * a.features.values for c, a in zip(coefficients, self.active, strict=True)])

    def keeping(self, kept: Tensor) -> "Sources":
        """Only the latents at ``kept`` (bool [N]) as columns; what the others write goes into ``unranked``."""
        unranked = torch.zeros_like(self.errors) if self.unranked is None else self.unranked.clone()
        active, first = [], 0
        for a in self.active:
            mask = kept[a.first : a.first + a.features.nnz]
            dropped = _subset(a.features, ~mask)
            for layer, decoder in zip(a.writes, a.dictionary.W_dec, strict=True):
                unranked[layer] += decode(dropped, decoder, torch.zeros_like(decoder[0]))
            chosen = _subset(a.features, mask)
            active.append(Active(a.dictionary, a.layer, a.kind, a.writes, chosen, first))
            first += chosen.nnz
        return Sources(self.frozen, tuple(active), self.errors, self.constant, self.skips, unranked)

    def _to_stream(self, a: Active, gradient: Tensor, positions: Tensor) -> Tensor:
        frozen = self.frozen.layers[a.layer]
        if a.kind == "mlp_out":
            assert frozen.mlp is not None
            gradient = frozen.mlp.backward(gradient, positions)
        return gradient if a.kind == "resid_mid" else frozen.mlp_norm.backward(gradient, positions)


def frozen_mlps(dictionaries: Dictionary | DictionarySet) -> list[int]:
    """Layers whose latents read what the MLP returns, so that the MLP has to be frozen too."""
    return [layer for layer, kind, _ in map(_places, layers_of(dictionaries)) if kind == "mlp_out"]


@torch.no_grad()
def sources(frozen: Frozen, dictionaries: Dictionary | DictionarySet, constant_positions: int) -> Sources:
    """The nodes of a prompt.

    Args:
        frozen: the model at the prompt.
        dictionaries: transcoders of some or all layers; in other layers the whole MLP output is an error node.
        constant_positions: at so many positions from the first, MLP outputs count as constants and have no nodes.

    Raises:
        DictionaryError: a dictionary reads or writes elsewhere, or does not fit the model.
    """
    parts = sorted(layers_of(dictionaries), key=lambda d: _places(d)[0])
    errors = torch.stack(frozen.mlp_out)
    constant = torch.zeros_like(errors)
    skips: dict[int, Tensor] = {}
    active: list[Active] = []
    first = 0
    for dictionary in parts:
        layer, kind, writes = _check(dictionary, frozen.model, {a.layer for a in active})
        x = {"mlp_in": frozen.mlp_in, "resid_mid": frozen.mid, "mlp_out": frozen.mlp_out}[kind][layer]
        dictionary = dictionary.to(x.device, x.dtype)
        found = dictionary.encode(x)
        mask = found.tokens >= constant_positions
        features = _subset(found, mask)
        for i, decoder, bias in zip(writes, dictionary.W_dec, dictionary.b_dec, strict=True):
            constant[i] += bias
            errors[i] -= decode(features, decoder, bias)
        if dictionary.W_skip is not None:
            skips[layer] = dictionary.W_skip
            errors[layer] -= frozen.mlp_in[layer] @ dictionary.W_skip
        active.append(Active(dictionary, layer, kind, writes, features, first))
        first += features.nnz
    for i, out in enumerate(frozen.mlp_out):
        # A skip connection passes effects on at every position.
        skipped = frozen.mlp_in[i] @ skips[i] if i in skips else torch.zeros_like(out)
        constant[i, :constant_positions] = (out - skipped)[:constant_positions]
    errors[:, :constant_positions] = 0
    return Sources(frozen, tuple(active), errors, constant, skips)


def _subset(features: FeatureCSR, mask: Tensor) -> FeatureCSR:
    counts = torch.bincount(features.tokens[mask], minlength=features.n_tokens)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return FeatureCSR(indptr, features.indices[mask], features.values[mask], features.n_latents)


def _places(dictionary: Dictionary) -> tuple[int, str, tuple[int, ...]]:
    """Layer and kind of the site read, layers written; layer −1 where that is no such site."""
    sites = [parse_site(port.site) for port in (*dictionary.reads, *dictionary.writes)]
    read, written = sites[0], sites[len(dictionary.reads) :]
    if len(dictionary.reads) != 1 or read is None or read.kind not in READS or read.layer is None:
        return -1, "", ()
    if any(site is None or site.kind != "mlp_out" or site.layer is None for site in written):
        return -1, "", ()
    return read.layer, read.kind, tuple(site.layer for site in written)  # pyright: ignore


def _check(dictionary: Dictionary, model: Model, taken: set[int]) -> tuple[int, str, tuple[int, ...]]:
    layer, kind, writes = _places(dictionary)
    fault, remedy = "", "Use transcoders of MLPs, or SAEs on mlp_out."
    if layer < 0:
        fault = "an attribution graph needs dictionaries that read mlp_in, resid_mid or mlp_out and write mlp_out"
    elif any(port.model for port in (*dictionary.reads, *dictionary.writes)):
        fault = "it reads another model too"
    elif min(writes) < layer or max(writes) >= model.shape.n_layers or (kind == "mlp_out" and writes != (layer,)):
        fault = f"it reads layer {layer} and writes layers {sorted(writes)} of a model with {model.shape.n_layers}"
    elif layer in taken:
        fault, remedy = f"another dictionary reads layer {layer} already", "Give one dictionary per layer read."
    elif dictionary.W_skip is not None and kind != "mlp_in":
        fault = "its skip connection does not begin at mlp_in"
    elif dictionary.scaling != "none":
        fault = f"each token is scaled before it is encoded ({dictionary.scaling}), which is not linear"
        remedy = "Use a dictionary that encodes activations as they are."
    if fault:
        raise DictionaryError(fault, where=repr(dictionary), remedy=remedy)
    check_token_by_token(dictionary)
    for weight, port in [(dictionary.W_enc[0], dictionary.reads[0])]:
        check_width(dictionary, port, model.shape.d_model, weight.shape[0])
    for decoder, port in zip(dictionary.W_dec, dictionary.writes, strict=True):
        check_width(dictionary, port, model.shape.d_model, decoder.shape[1])
    return layer, kind, writes
