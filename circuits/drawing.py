"""A circuit made ready to be drawn: parts on a grid of layers and columns, signed links, and the union of two.

Where a circuit comes from is the business of :mod:`.drawing_graph` (attribution graphs) and :mod:`.drawing_components`
(heads and MLPs); how it looks, of :mod:`.circuit_views`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["kept", "lost", "new"]
Kind = Literal["embedding", "token", "head", "mlp", "latent", "error", "logit"]


@dataclass(frozen=True)
class Part:
    """A node.

    Attributes:
        id: its name among the parts of a circuit, the same in another circuit for the same part.
        name: what it is, in words.
        kind: which kind.
        layer: −1 for what stands before the first layer, the number of layers for what stands behind the last.
        column: where in its layer.
        effect: on what the circuit explains, signed.
        low, high: ends of its interval, None where there is none.
        rule: when it is active, in words; empty where nobody knows.
        q: how far the rule is right on texts it was not learned on, 0 to 1; None where not measured.
        about: further lines.
        status: in a union, which of the two circuits it is in.
    """

    id: str
    name: str
    kind: Kind
    layer: int
    column: float | int
    effect: float
    low: float | None = None
    high: float | None = None
    rule: str = ""
    q: float | None = None
    about: tuple[str, ...] = ()
    status: Status | None = None


@dataclass(frozen=True)
class Link:
    """An edge.

    Attributes:
        source, target: ids of parts.
        effect: signed, in its own units.
        strength: what links are ranked by, not negative.
        about: further lines.
        status: in a union, which of the two circuits it is in.
    """

    source: str
    target: str
    effect: float
    strength: float
    about: tuple[str, ...] = ()
    status: Status | None = None


@dataclass(frozen=True)
class Drawing:
    """A circuit.

    Attributes:
        title: what it explains.
        columns: name of each column.
        across: what columns are.
        n_layers: of the model.
        parts, links: all of them; links lead to parts that are there.
        effect: what the effect of a part is, and its unit.
        link_effect: what the effect of a link is.
        notes: what a reader must know about how it came about.
        compared: names of the two circuits of a union.
    """

    title: str
    columns: tuple[str, ...]
    across: str
    n_layers: int
    parts: tuple[Part, ...]
    links: tuple[Link, ...]
    effect: str
    link_effect: str
    notes: tuple[str, ...] = ()
    compared: tuple[str, str] | None = None

    def strongest(self, parts: int, links: int) -> "Drawing":
        """At most so many parts of largest effect (what stands before and behind the layers comes first), and so many
        links of largest strength among them; what is left out is said in the notes."""
        outer = {part.id for part in self.parts if not 0 <= part.layer < self.n_layers}
        ranked = sorted(self.parts, key=lambda p: (p.id not in outer, -abs(p.effect)))
        kept = {part.id for part in ranked[:parts]}
        inside = [link for link in self.links if link.source in kept and link.target in kept]
        best = sorted(inside, key=lambda link: -link.strength)[:links]
        notes = list(self.notes)
        if len(kept) < len(self.parts):
            notes.append(f"Drawn are the {len(kept):,} parts with the largest effects, of {len(self.parts):,}.")
        if len(best) < len(inside):
            notes.append(f"Drawn are the {len(best):,} strongest links between them, of {len(inside):,}.")
        own = tuple(part for part in self.parts if part.id in kept)
        return replace(self, parts=own, links=tuple(best), notes=tuple(notes))


def union(first: Drawing, second: Drawing, names: Sequence[str] = ("first", "second")) -> Drawing:
    """Both circuits in one: what only ``first`` has is lost, what only ``second`` has is new.

    A part that is kept has its effect in ``second``, and both in its lines.

    Raises:
        ValueError: their columns differ, so that a part of one has no place in the other.
    """
    if first.columns != second.columns or first.across != second.across:
        raise ValueError("circuits over different positions or parts cannot be laid over one another")
    before, after = names
    old, new = {p.id: p for p in first.parts}, {p.id: p for p in second.parts}
    parts = [_joined(old.get(i), new.get(i), before, after) for i in dict.fromkeys([*old, *new])]
    links_old = {(link.source, link.target): link for link in first.links}
    links_new = {(link.source, link.target): link for link in second.links}
    links = [
        _linked(links_old.get(i), links_new.get(i), before, after) for i in dict.fromkeys([*links_old, *links_new])
    ]
    layers = max(first.n_layers, second.n_layers)
    if first.n_layers != second.n_layers:
        parts = [_lifted(part, first if part.status == "lost" else second, layers) for part in parts]
    title = first.title if first.title == second.title else f"{first.title} / {second.title}"
    return replace(
        second,
        title=title,
        n_layers=layers,
        parts=tuple(parts),
        links=tuple(links),
        notes=tuple(_notes(first, second, before, after)),
        compared=(before, after),
    )


def _notes(first: Drawing, second: Drawing, before: str, after: str) -> Iterator[str]:
    yield from (note for note in first.notes if note in second.notes)
    for name, own, other in ((before, first, second), (after, second, first)):
        yield from (f"{name}: {note}" for note in own.notes if note not in other.notes)


def _joined(old: Part | None, new: Part | None, before: str, after: str) -> Part:
    if old is None or new is None:
        only = old or new
        assert only is not None
        return replace(only, status="lost" if new is None else "new")
    return replace(
        new,
        rule=new.rule or old.rule,
        about=(*new.about, f"effect in {before}: {old.effect:+.3g}", f"effect in {after}: {new.effect:+.3g}"),
        status="kept",
    )


def _linked(old: Link | None, new: Link | None, before: str, after: str) -> Link:
    if old is None or new is None:
        only = old or new
        assert only is not None
        return replace(only, status="lost" if new is None else "new")
    about = (*new.about, f"in {before}: {old.effect:+.3g}", f"in {after}: {new.effect:+.3g}")
    return replace(new, strength=max(old.strength, new.strength), about=about, status="kept")


def _lifted(part: Part, own: Drawing, layers: int) -> Part:
    """What stands behind the last layer of the shallower model stands behind the last layer drawn."""
    return replace(part, layer=layers) if part.layer == own.n_layers else part
