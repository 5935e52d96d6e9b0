"""What an audit says of mechanisms in both models: inherited, lost, emergent, and what moving them does."""

from typing import Literal

from .values import Estimate, Interval, NotMeasured, Record


class Held(Record):
    """A node of the circuit of what one model says, and how much of its effect the other's counterpart carries."""

    id: str
    counterpart: str | None
    """Its match in the other model; null where it has none."""
    similarity: float | None
    """Of the match, by what both do on the same characters; null where it is by identity or there is none."""
    effect: Interval
    """Logits by which what the model says here falls behind what the other says when the node is at its mean."""
    inherited: Estimate
    """Share of that effect that stays when the counterpart stands in: 1 all of it, 0 nothing."""


class HeldEdge(Record):
    """A connection of a circuit, from one node into what another reads, and how much of it the other model has."""

    source: str
    target: str
    effect: Interval
    """Logits by which what the model says here falls behind when ``target`` reads ``source`` at its mean."""
    inherited: Interval
    """Share of that effect that stays when the other model's ``source`` and ``target`` stand in: 1 all of it."""

    @property
    def fate(self) -> Literal["inherited", "new", "unclear"]:
        """Whether more or less than half is inherited, if the interval tells: of the parent's edges, new means lost."""
        if self.inherited.low > 0.5:
            return "inherited"
        return "new" if self.inherited.high < 0.5 else "unclear"


class Stitching(Record):
    """How well what one model's nodes write is foretold from the other's stream, on text without the behaviour."""

    r2: float
    """Share of the variance of all nodes' writes that is foretold."""
    ordinary: Estimate
    """Share of the nodes' effect on the model's own next tokens that the prediction keeps: what ``inherited`` would be
    if everything were inherited."""


class Mechanisms(Record):
    """The circuits of what either model says at the contexts of a behaviour, matched, moved and taken out."""

    way: Literal["identity", "function"]
    """How nodes were matched: the same parameters correspond, or by what they do."""
    successor: tuple[Held, ...]
    """Nodes that carry what the successor says, strongest first."""
    parent: tuple[Held, ...]
    """Nodes that carry what the parent says, and whether the successor still has them."""
    successor_edges: tuple[HeldEdge, ...] | NotMeasured
    """Connections among its strongest nodes, those with an effect of their own, strongest first."""
    parent_edges: tuple[HeldEdge, ...] | NotMeasured
    emergent: Estimate
    """Effect-weighted mean of 1 − ``inherited`` over ``successor``."""
    lost: Estimate
    """The same over ``parent``."""
    transplanted: tuple[str, ...]
    """The fewest nodes that make up the target share of what is new and of what is lost; between models whose
    parameters do not correspond, the fewest that close that share of what all nodes together close."""
    transplant: Estimate
    """Share of the gap that closes when the parent runs with these nodes of the successor."""
    transplant_controls: tuple[float, ...]
    """The same with random nodes, as many of each kind."""
    side_effects: Estimate
    """KL(S‖S with the circuit reverted), nats per token of text without the behaviour."""
    side_effect_controls: tuple[float, ...]
    """The same with random nodes, as many of each kind."""
    stitches: tuple[Stitching, ...]
    """Between models whose parameters do not correspond: of the successor's nodes, and of the parent's. Else empty."""
