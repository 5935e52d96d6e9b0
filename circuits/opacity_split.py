"""A model divided at chosen sites into explained and unexplained parts, and forwards that treat the two apart.

What a forward does with a divided site is up to the caller (:data:`Rewrite`): leave it, hold its unexplained part at
recorded values while units are recomputed from whatever reaches them, or cut a gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Port
from heredity.interp.errors import DictionaryError
from heredity.interp.model import Edit, Model
from heredity.interp.sites import order

from .opacity_parts import DictionaryPart, Part, World


@dataclass(frozen=True)
class Visit:
    """A divided site as a forward comes to it.

    Attributes:
        site: its name.
        value: [batch, pos, D].
        made: what units write there, [W, batch, pos, D], one per set of weights.
        seen: values at sites read or divided so far, as they were before being rewritten.
    """

    site: str
    value: Tensor
    made: Tensor
    seen: Mapping[str, Tensor]


Rewrite = Callable[[Visit], Tensor]
"""What takes the place of a site's value."""


@dataclass(frozen=True, eq=False)
class Split:
    """Sites of a model and what is explained of each.

    Attributes:
        parts: units, with how well each is explained.
        opaque: sites all of which is unexplained.

    Raises:
        DictionaryError: a part writes a site before the forward has come to what it reads.
        ValueError: no parts and no sites; a site that is opaque and written by a part.
    """

    parts: tuple[Part, ...]
    opaque: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts and not self.opaque:
            raise ValueError("a split needs a part or an opaque site")
        for side in (0, 1):
            both = {site for part in self.parts for site in part.writes(side)} & set(self.opaque)
            if both:
                raise ValueError(f"{min(both)} is said to be opaque and has units")
            for part in self.parts:
                reads, writes = part.reads(side), part.writes(side)
                if reads and writes and max(map(order, reads)) > min(map(order, writes)):
                    raise DictionaryError(
                        f"it writes {min(writes, key=order)} before the forward has come to {max(reads, key=order)}",
                        where=repr(part),
                        remedy="Opacity needs units that read before they write.",
                    )

    def sites(self, side: int = 0) -> tuple[str, ...]:
        """Divided sites, in the order of the forward."""
        own = {site for part in self.parts for site in part.writes(side)}
        return tuple(sorted(own | set(self.opaque), key=order))

    @cached_property
    def q(self) -> tuple[Tensor, ...]:
        """How well units are explained, [F] of each part."""
        return tuple(part.q for part in self.parts)

    def with_q(self, q: Sequence[Tensor]) -> "Split":
        """The same units, explained otherwise."""
        return replace(self, parts=tuple(part.with_q(each) for part, each in zip(self.parts, q, strict=True)))

    def permuted(self, seed: int) -> "Split":
        """Explanations handed to other units of the same part at random: what is left of Ω says how much of it is due
        to *which* units are explained rather than to how many."""
        generator = torch.Generator().manual_seed(seed)
        return self.with_q([q[torch.randperm(len(q), generator=generator)] for q in self.q])

    def unexplained(self) -> "Split":
        """The same sites with nothing explained."""
        return self.with_q([torch.zeros_like(q) for q in self.q])

    def elsewhere(self, side: int) -> tuple[Port, ...]:
        """What is read of other models than ``side``."""
        found = [port for p in self.parts if isinstance(p, DictionaryPart) for port in p.elsewhere(side)]
        return tuple(dict.fromkeys(found))

    def edits(
        self,
        world: World,
        rewrite: Rewrite,
        *,
        weights: Sequence[Tensor] | None = None,
        slopes: bool = False,
    ) -> dict[str, Edit]:
        """Edits for one forward of ``world`` that pass every divided site through ``rewrite``.

        Args:
            world: the run.
            rewrite: what becomes of a site.
            weights: of each part's units, [W, F]; q (W = 1) if None.
            slopes: as of :meth:`.opacity_parts.Part.write`.
        """
        chosen = [q[None] for q in self.q] if weights is None else list(weights)
        forward = _Forward(self, world, rewrite, chosen, slopes)
        return {site: forward.at(site) for site in forward.sites}


@dataclass
class _Forward:
    """What the edits of one forward tell each other."""

    split: Split
    world: World
    rewrite: Rewrite
    weights: list[Tensor]
    slopes: bool
    seen: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        side = self.world.side
        self.divided = set(self.split.sites(side))
        reads = {site for part in self.split.parts for site in part.reads(side)}
        self.sites = sorted(self.divided | reads, key=order)
        # A part whose reads were all given is evaluated as soon as this forward gets anywhere.
        self.last_read = [max(part.reads(side), key=order, default=self.sites[0]) for part in self.split.parts]

    def at(self, site: str) -> Edit:
        """The edit at one site."""
        ready = [i for i, last in enumerate(self.last_read) if last == site]

        def edit(value: Tensor) -> Tensor:
            self.seen[site] = value
            for i in ready:
                part = self.split.parts[i]
                for to, out in part.write(self.world, self.seen, self.weights[i], self.slopes).items():
                    self.written[to] = self.written[to] + out if to in self.written else out
            if site not in self.divided:
                return value
            made = self.written.pop(site, None)
            n_sets = len(self.weights[0]) if self.weights else 1
            made = value.new_zeros(1).expand(n_sets, *value.shape) if made is None else made
            return self.rewrite(Visit(site, value, made, self.seen)).to(value.dtype)

        return edit


def whole_model(
    model: Model, parts: Sequence[Part] = (), *, heads: bool = False, side: int = 0, opaque: Sequence[str] = ()
) -> Split:
    """All of a model's computation divided: what has no explained units is opaque.

    Every MLP that no part writes becomes an opaque site, and with ``heads`` every layer's attention too; without, heads
    stay live, carrying what earlier parts wrote to where the patterns send it. MLPs and heads before a divided residual
    stream are left alone: all they do passes through there.

    Args:
        model: the model.
        parts: units.
        heads: whether attention counts as computation to be explained (between models it does: a changed head is a
            changed mechanism) or as transport (within one model; its patterns are then measured apart, as routing).
        side: the model's number, for crosscoders.
        opaque: further opaque sites.
    """
    written = {site for part in parts for site in part.writes(side)}
    streams = [order(site) for site in written | set(opaque) if site.startswith("resid_")]
    screen = max(streams, default=(-1, 0, 0))
    found = set(opaque)
    for layer in range(model.shape.n_layers):
        for site in (f"attn_out@{layer}", f"mlp_out@{layer}") if heads else (f"mlp_out@{layer}",):
            if site not in written and order(site) > screen:
                found.add(site)
    return Split(tuple(parts), tuple(sorted(found, key=order)))
