"""Which units an audit explains: latents of dictionaries that were given or trained for it, or heads and neurons."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heredity.circuits.opacity import alike
from heredity.circuits.opacity_dictionaries import packed, site_sae, unpacked
from heredity.circuits.opacity_labels import values_at
from heredity.circuits.opacity_parts import DictionaryPart, HeadsPart, NeuronsPart
from heredity.circuits.opacity_units import Pool, UnitId, latent_pool, node_pool
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.dictionaries.splicing import layers_of
from heredity.interp.errors import DictionaryError
from heredity.interp.explain.contexts import Contexts
from heredity.interp.model import Model
from heredity.interp.sites import order

from .phrases import count

if TYPE_CHECKING:
    from .assemble import Setting

TRAIN = "train"
"""The value of ``--dictionary`` that asks for training."""


@dataclass(frozen=True)
class Effort:
    """How much is spent on opacity."""

    behaviours: int
    explained: int
    """Units explained for each."""
    latents: int
    """Of each trained dictionary."""
    steps: int
    """Of its training."""
    seeds: int
    """Sets of dictionaries trained."""
    layers: int
    """Layers with units in a large model, those of the circuit's strongest nodes."""
    gradients: int
    """Points of the integral that says where and why."""
    draws: int
    """Of q from its uncertainty, for the intervals."""
    prompts: int
    """At most, of each behaviour: more than a share needs, since a step of it need not stand in all of them."""
    tokens: int
    """Of the text that units are explained on, at most."""


def effort(s: "Setting") -> Effort:
    """For the budget and size of an audit."""
    level = ("quick", "standard", "thorough").index(s.sizes.name)
    if s.sizes.small:
        return Effort(
            behaviours=2 * 2**level,
            explained=64 * 2**level,
            latents=128,
            steps=200 * 2**level,
            seeds=1 + level,
            layers=s.successor.shape.n_layers,
            gradients=8,
            draws=3,
            prompts=48,
            tokens=s.sizes.scan_tokens,
        )
    # A forward with every site divided takes some ten times as long as a bare one, and tens of them are needed.
    return Effort(
        behaviours=level,
        explained=32 * level,
        latents=1024,
        steps=150 * level,
        seeds=1 + level,
        layers=2 + level,
        gradients=2 * level,
        draws=0,
        prompts=36,
        tokens=12_000 * level,
    )


@dataclass(frozen=True)
class Given:
    """The dictionaries of ``--dictionary DIR``.

    Attributes:
        dictionaries: at most one for each site; their latents are explained.
        other_seeds: crosscoders of the same sites as one of those: what comes back in them is no accident of training.
    """

    dictionaries: tuple[Dictionary, ...] = ()
    other_seeds: tuple[Dictionary, ...] = ()


def load_dictionaries(paths: Sequence[str], successor: Model, parent: Model) -> Given:
    """The dictionaries of ``--dictionary DIR``, checked against the models.

    Raises:
        DictionaryError: one cannot be read or used, does not fit, is given twice, or two that are not crosscoders of
            the same sites write one site.
        SiteError: the successor lacks a site.
    """
    from heredity.interp.dictionaries.formats import load_dictionary
    from heredity.interp.dictionaries.notes import digest

    found: list[Dictionary] = []
    others: list[Dictionary] = []
    written: dict[str, str] = {}
    for path in paths:
        for layer in layers_of(load_dictionary(path)):
            _check_widths(layer, successor, parent, path)
            like = [d for d in found if d.kind == layer.kind == "crosscoder" and d.reads == layer.reads]
            if like:
                if digest(layer) in map(digest, (*like, *others)):
                    raise DictionaryError(
                        "it is the same crosscoder as one given before",
                        where=path,
                        remedy="Give one that was trained from another seed.",
                    )
                others.append(layer)
                continue
            for site in DictionaryPart(layer, torch.zeros(layer.n_latents, dtype=layer.b_enc.dtype)).writes(1):
                if site in written and layer.kind != "cross_layer_transcoder":
                    raise DictionaryError(
                        f"{site} is written by {written[site]} already",
                        where=path,
                        remedy="Give one dictionary for each site.",
                    )
                written[site] = path
            found.append(layer)
    return Given(tuple(found), tuple(others))


def _check_widths(layer: Dictionary, successor: Model, parent: Model, path: str) -> None:
    for port, weight in zip(layer.reads, layer.W_enc, strict=True):
        model = parent if _of_parent(layer, port) else successor
        width = model.capture(torch.zeros(1, 1, dtype=torch.int64), [port.site])[port.site].flatten(2).shape[-1]
        if width != weight.shape[0]:
            raise DictionaryError(
                f"it reads {weight.shape[0]} numbers at {port.site}, where this model has {width}",
                where=path,
                remedy="Give dictionaries of the successor.",
            )


@dataclass
class Makers:
    """Makes the pools of one audit.

    Attributes:
        s: the audit.
        contexts: texts to explain on.
        layers: where units are wanted, unless dictionaries were given.
        seen: activations at the texts, read so far.
    """

    s: "Setting"
    contexts: Contexts
    layers: Sequence[int]
    seen: dict[tuple[bool, str], Tensor] = field(default_factory=dict)

    def kind(self) -> str:
        """What the units are, in words."""
        if self.s.dictionaries:
            return "latents of the dictionaries given"
        if self.trains:
            return "latents of sparse autoencoders trained on the audited text"
        return "heads and neurons, each at the 5 % of tokens where it is largest"

    @property
    def trains(self) -> bool:
        """Whether dictionaries are trained for this audit."""
        return self.s.train_dictionaries or (self.s.sizes.small and not self.s.dictionaries)

    @property
    def seeds(self) -> int:
        """Sets of units that can be made."""
        return effort(self.s).seeds if self.trains else 1

    def pool(self, seed: int) -> Pool:
        """The units, of dictionaries number ``seed`` where any are trained."""
        successor = self.s.successor
        if self.s.dictionaries:
            return self._latents(self.s.dictionaries)
        if self.trains:
            return self._latents(self._trained(seed))
        return node_pool(successor, self.contexts, self.layers, seed=self.s.seed)

    def _latents(self, dictionaries: Sequence[Dictionary]) -> Pool:
        ports = {(_of_parent(d, p), p.site) for d in dictionaries for p in d.reads}
        values = self.values(tuple(sorted(ports, key=lambda port: (port[0], order(port[1])))))
        return latent_pool(
            dictionaries, lambda d, port: values[_of_parent(d, port), port.site], self.contexts, seed=self.s.seed
        )

    def _trained(self, seed: int) -> list[Dictionary]:
        sizes, s = effort(self.s), self.s
        sites = [f"{kind}@{layer}" for layer in self.layers for kind in ("attn_out", "mlp_out")]
        sides = (True, False) if alike(s.parent, s.successor) else (False,)
        found = []
        for i, site in enumerate(sites):
            s.progress("training dictionaries", i, len(sites))

            def compute(site: str = site) -> dict[str, Tensor]:
                values = self.values(tuple((side, each) for side in sides for each in sites))
                rows = [values[side, site] for side in sides]
                return packed(site_sae(rows, site, latents=sizes.latents, steps=sizes.steps, seed=s.seed * 100 + seed))

            found.append(unpacked(s.work.arrays(f"opacity-{site}-{seed}", compute), site))
        s.progress("training dictionaries", len(sites), len(sites))
        return found

    def values(self, ports: tuple[tuple[bool, str], ...]) -> dict[tuple[bool, str], Tensor]:
        """Values [T, …] at sites of the parent (True) and the successor, kept for the next time."""
        for of_parent, model in ((True, self.s.parent), (False, self.s.successor)):
            sites = [site for side, site in ports if side == of_parent and (side, site) not in self.seen]
            if sites:
                found = values_at(model, self.contexts.texts, sites)
                self.seen |= {(of_parent, site): value for site, value in found.items()}
        return self.seen


def _of_parent(d: Dictionary, port: Port) -> bool:
    return d.kind == "crosscoder" and port.model == 0


def unit_name(pool: Pool, unit: UnitId) -> str:
    """A unit as a reader knows it."""
    part, number = pool.units[unit[0]], unit[1]
    if isinstance(part, HeadsPart):
        return f"attn_head@{part.layer}.{number}"
    if isinstance(part, NeuronsPart):
        return f"mlp_post@{part.layer} neuron {number}"
    return f"{', '.join(part.writes(1))} latent {number}"


def in_words(makers: Makers, pool: Pool) -> str:
    """What was explained."""
    sites = dict.fromkeys(site for part in pool.units for site in part.writes(1))
    return f"{makers.kind()}, at {count(len(sites), 'site')}: {', '.join(sites)}"
