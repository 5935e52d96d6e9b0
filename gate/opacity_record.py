"""What an audit records of the opacity of one behaviour, beside the share itself."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Interval, NotMeasured, Record


class Reason(Record):
    """One reason for a behaviour's opacity."""

    name: str
    """``linear error`` and ``non-linear error`` of dictionaries, ``unlabelled`` units, ``undivided``: parts without
    units."""
    share: Interval
    """Of the behaviour; all reasons and the residual add up to the opacity."""


class SiteOpacity(Record):
    """How much of a behaviour's opacity stems from one site, by reason."""

    site: str
    layer: int
    shares: dict[str, float]


class OpacityStep(Record):
    """How much nobody can explain of what the successor says behind one token of an episode."""

    behind: str
    """The token read last."""
    says: tuple[str, ...]
    """What the successor says there most often."""
    share: float
    """Of the episode's effect."""
    opacity: Interval


class Label(Record):
    """A unit that carries much of the behaviour, and how far it is explained."""

    unit: str
    """Where and which: ``mlp_out@2 latent 17``, ``attn_head@1.2``, ``mlp_post@0 neuron 5``."""
    carries: float
    """First-order estimate of the effect on the metric, summed over prompts, as a share of that of all units."""
    rule: str
    """When it is active, in words; empty where its contexts were too few."""
    q: float | None
    """How far the rule predicts that on other text, from 0 (chance) to 1; null where its contexts were too few."""


class Routing(Record):
    """Attention patterns as a third kind of part: shares that add up to 1."""

    status: Literal["measured"] = "measured"
    explained: Interval
    unexplained: Interval
    routing: Interval
    """What changed where attention looks carries."""
    needed: Interval
    """What is lost when the patterns alone are the counterfactual's."""


class OpacityDetail(Record):
    """Both terms of a behaviour's opacity, what they are shares of, and where and why it is opaque."""

    status: Literal["measured"] = "measured"
    needed: Interval
    """Share of the effect that is lost if unexplained parts say what they say in the counterfactual."""
    alone: Interval
    """Share that unexplained parts restore by themselves. Opacity is the mean of both."""
    interaction: Interval
    """``needed`` − ``alone``: above 0 explained and unexplained parts act together, below 0 either will do."""
    effect: Interval
    """What all of this is a share of: KL(successor‖parent) reached, nats, summed over the
    positions of an episode, mean over prompts."""
    control: Interval | None
    """Opacity if unexplained parts differed by a random direction as long: what leaving the usual states costs."""
    all_explained: Interval
    """Opacity if every unit were explained perfectly: what dictionaries leave over, and parts without units."""
    steps: tuple[OpacityStep, ...]
    """The same of what is said behind single tokens, the largest shares first; without those that fewer than thirty
    prompts hold. Opacity of the whole is the mean of all steps', by their shares."""
    counterfactual: Literal["parent", "without_trigger"]
    """What the successor is compared with: the parent on the same tokens, or itself without the trigger tokens."""
    n_replicated: int
    """Prompts made of a context's end behind other text."""
    units: str
    """What was explained, in words."""
    n_units: int
    """Units there are."""
    n_explained: int
    """Units of which an explanation was tried: those that carry most."""
    n_labelled: int
    """Units with an explanation better than chance."""
    carried: float
    """Share of all units' first-order effects that those tried carry."""
    text_tokens: int
    """Tokens of the text that explanations were learned and scored on, none of it of the prompts' texts."""
    routing: Annotated[Routing | NotMeasured, Field(discriminator="status")]
    reasons: tuple[Reason, ...]
    residual: float
    """What the reasons do not add up to."""
    sites: tuple[SiteOpacity, ...]
    labels: tuple[Label, ...]
    """Units that carry most, strongest first."""
    seeds: tuple[float, ...]
    """Opacity by dictionaries trained from other seeds; empty where none were."""
