"""What an audit says of principles and tasks: whether the behaviour is kept, and whether the same parts carry it."""

from typing import Literal

from .values import Estimate, Interval, Record

PrincipleStatus = Literal["present", "weakened", "gone", "replaced", "unmeasured"]
TaskStatus = Literal["inherited", "weakened", "lost", "moved", "new", "absent", "unmeasured"]


class MechanismNode(Record):
    """A head or MLP and what it alone carries of the behaviour in each model, as a share of that model's effect."""

    parent: str | None
    """The node of the parent; null where the successor's has no counterpart."""
    successor: str | None
    """Its counterpart in the successor; null where it has none."""
    carrier: bool
    """In the smallest set found of the parent's that carries the behaviour."""
    share_parent: Estimate
    share_successor: Estimate
    change: Interval
    """Share in the successor minus share in the parent."""
    inherited: float | None
    """h: how much of its share in the successor it had in the parent already, 0 to 1; null where it has none."""
    moved: Literal["gained", "lost"] | None
    """Where the change exceeds what two halves of the prompts differ by in the parent."""


class BrokenPrompt(Record):
    """A prompt on which the parent gives the right answer and the successor the wrong one."""

    text: str
    parent: float
    """Lead of the right answer in the parent, in units of the metric."""
    successor: float


class Kept(Record):
    """A behaviour of the parent, and what became of it and of what carries it."""

    id: str
    description: str
    source: str
    """The file, or the shipped set."""
    metric: Literal["logit_difference", "probability"]
    """Right minus wrong answer at the end of the prompt: logits (that is, log-odds in nats) or probabilities."""
    pairs: int
    """Pairs of prompts measured on; as many others were used to find the mechanism."""
    reason: str
    """Why it is unmeasured, and why the parent is not said to have it; empty elsewhere."""
    effect_parent: Estimate
    """Metric on the prompts minus metric on their counterfactuals."""
    effect_successor: Estimate
    difference: Estimate
    """Successor minus parent, pair by pair."""
    lost: Estimate
    """Share of the parent's effect that the successor lacks; negative where it has more."""
    tolerance: float | None
    """Loss of effect that means nothing: the largest of any null successor, or between halves of the prompts."""
    kept_parent: Estimate
    """Share of the prompts on which the right answer leads."""
    kept_successor: Estimate
    broken: int
    """Prompts that the parent keeps and the successor breaks by more than any prompt fell in a null successor."""
    broken_prompts: tuple[BrokenPrompt, ...]
    """Those that fell furthest."""
    carriers: tuple[str, ...]
    """The smallest set found of the parent's nodes whose exchange takes most of the effect."""
    necessity_parent: Estimate
    """Share of the effect that goes when the carriers are exchanged for their values on the counterfactual prompts."""
    necessity_successor: Estimate
    """The same in the successor, with the carriers' counterparts."""
    carried: Estimate
    """Share carried in the successor over share carried in the parent, of the main carrier (one through which most of
    the effect passes) that kept least; of all carriers together where there is no main one. 1 where the same parts do
    the work, 0 where a step of it is done elsewhere."""
    least: str | None
    """The carrier that ``carried`` is of; null where it is of all together."""
    inherited: Estimate
    """Share of the successor's mechanism, node by node, that the parent's has too."""
    nodes: tuple[MechanismNode, ...]
    """By size of change; at most 12."""


class PrincipleRecord(Kept):
    """A principle that the successor has to keep."""

    status: PrincipleStatus
    declared_by: str | None
    """The intent's change that declares its loss."""
    counts: bool
    """Whether the policy counts this against approval."""


class TaskRecord(Kept):
    """A task of the user's."""

    status: TaskStatus
