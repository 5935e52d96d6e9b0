"""What an audit records of a latent that it names for a behaviour."""

from typing import Literal

from .values import Interval, Record


class LatentExample(Record):
    """A place in other text where a latent is active."""

    before: str
    token: str
    after: str
    activation: float


class LatentRecord(Record):
    """One direction of the difference between successor and parent, of a sparse autoencoder of that difference."""

    status: Literal["measured"] = "measured"
    site: str
    index: int
    """Number in the first of the autoencoders trained."""
    contrast: float
    """How much longer the latent's part of the difference is where the behaviour shows than where its trigger is broken
    (in ordinary text, where no trigger is known): mean over contexts, in units of the residual stream."""
    null_max: float
    """The largest such value among the latents of null successors, trained and measured in the same way."""
    n_null: int
    """Latents of null successors."""
    hard_auroc: float | None
    """How well its activation tells contexts from the same with the trigger broken; null where no trigger is known."""
    seed_cosines: tuple[float, ...]
    """Cosine with its partner in each autoencoder trained from another seed."""
    stable: bool
    """All of those reach 0.9."""
    rule: str
    """When it is active on other text, in words; empty where its contexts were too few."""
    q: float | None
    """How far the rule predicts that, from 0 (chance) to 1; null where its contexts were too few."""
    raises: tuple[str, ...]
    """Tokens whose logits its direction raises most."""
    lowers: tuple[str, ...]
    gap_closed: Interval
    """Share of KL(successor‖parent) that goes when the successor is set back to the parent along its direction."""
    gap_closed_together: Interval
    """The same within the span of its direction and of those named before it at the site."""
    control: float
    """The largest share that goes along one of several random directions."""
    examples: tuple[LatentExample, ...]
