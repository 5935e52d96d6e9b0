"""What a repair says: ``repair.json`` beside the repaired weights is one :class:`Repair`."""

from typing import Literal

from .values import Interval, NotMeasured, Record


class EditedTensor(Record):
    """One weight that was changed."""

    name: str
    rank: int
    """Rank of the change: directions of the map's input on which it is another map now."""
    relative_change: float
    """‖W_new − W_old‖ / ‖W_old‖."""


class Attempt(Record):
    """One edit that was tried, as measured on the contexts and texts the choice was made on."""

    way: Literal["restore", "overwrite"]
    level: float
    """Directions restored per map, or how much the behaviour's tokens weigh against ordinary ones in overwriting."""
    tensors: int
    reversion: float
    """Share of KL(successor‖parent) at the behaviour's contexts that is gone."""
    kl_elsewhere: float
    """Mean KL(successor‖edited) per token of text without any behaviour, nats."""


class RepairedFinding(Record):
    """What was done about one finding, measured with all edits in place on contexts that no choice was made on."""

    id: str
    title: str
    chosen: Attempt
    """The best edit found. It is left out where it misses the target and costs more than next to nothing."""
    tensors: tuple[EditedTensor, ...]
    """What was changed for it; empty where the edit was left out."""
    contexts_chosen_on: int
    effect_before: Interval
    """KL(successor‖parent), nats, mean over the held-out contexts."""
    effect_after: Interval
    """KL(repaired‖parent) at the same contexts, nats."""
    reversion: Interval
    """Share of the summed divergence that is gone, held-out contexts."""
    reached: bool
    """``reversion`` is at least the target."""
    tried: tuple[Attempt, ...]
    controls: tuple[Attempt, ...]
    """The same sizes of edit in the same tensors, reading random directions of the input instead."""


class Kept(Record):
    """A declared behaviour and what the repair left of it."""

    declared_by: str
    title: str
    kept: float
    """KL(repaired‖parent) over KL(successor‖parent) at its contexts."""


class Cost(Record):
    """What the repair did to text in which no behaviour shows, on texts that no choice was made on."""

    texts: int
    tokens: int
    kl: Interval
    """Mean KL(successor‖repaired) per token, nats; interval over texts."""
    nll: Interval
    """Change of −log p of the next token, nats per token; positive is worse."""
    accuracy: Interval
    """Change of the share of next tokens predicted; negative is worse."""


class Repair(Record):
    """The whole record of one repair."""

    schema_version: Literal["1.0"] = "1.0"
    parent: str
    """Content sha256."""
    successor: str
    """Content sha256 of the model that was repaired."""
    target: float
    findings: tuple[RepairedFinding, ...]
    left: tuple[str, ...]
    """Undeclared findings of the audit that were not repaired."""
    elsewhere: Cost
    declared: tuple[Kept, ...] | NotMeasured
    budget: str
    seed: int
    versions: dict[str, str]
