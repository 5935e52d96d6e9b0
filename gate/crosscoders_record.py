"""What an audit records of a crosscoder of the pair that it was given."""

from typing import Literal

from .latents_record import LatentExample
from .values import Interval, NotMeasured, Record

NONE_GIVEN = NotMeasured(reason="no crosscoder of the two models was given with --dictionary")
"""Where there is nothing to compare."""


class CrosscoderLatent(Record):
    """A latent whose decoder row says that one model alone has it, and what became of that claim."""

    index: int
    verdict: Literal["successor-only", "parent-only"]
    alone: bool
    """It came back in the crosscoders from other seeds too, so it counts as a mechanism without counterpart."""
    came_back: int | None
    """In how many of those; null where none was given."""
    delta_norm: float
    """1 the successor's row alone, 0 the parent's, ½ both."""
    nu_error: float
    """What the other model's error still holds of it (latent scaling), 1 as much as the owner."""
    nu_reconstruction: float
    """The same of the other model's reconstruction."""
    rate: float
    """Share of tokens at which it is active."""
    rule: str
    """When it is active on the audited text, in words; empty where its contexts were too few."""
    q: float | None
    """How far the rule predicts that, from 0 (chance) to 1."""
    raises: tuple[str, ...]
    """Tokens whose logits its row in its own model raises most."""
    lowers: tuple[str, ...]
    examples: tuple[LatentExample, ...]


class CrosscoderEffect(Record):
    """What latents that only the successor has do for one behaviour."""

    behaviour: str
    latents: tuple[int, ...]
    shares: tuple[Interval, ...]
    """Of each by itself: share of KL(successor‖parent) that goes when the successor writes what the parent does."""
    together: Interval
    """The same of all of them at once."""
    controls: tuple[float, ...]
    """The same of random sets of as many latents that are as active."""


class CrosscoderRecord(Record):
    """A crosscoder's latents as mechanisms: each its own counterpart in the other model, or without one."""

    status: Literal["measured"] = "measured"
    way: Literal["latents"] = "latents"
    """How mechanisms were matched."""
    parent_site: str
    successor_site: str
    n_latents: int
    other_seeds: int
    """Crosscoders of the same sites that were given beside it."""
    tokens: int
    """Aligned tokens it was judged on."""
    verdicts: dict[str, int]
    """Latents of each verdict: ``successor-only``, ``parent-only``, ``shared``, ``undecided``."""
    cut_error: float
    """ν of the other model's error from which a latent of this pair counts as shared."""
    cut_reconstruction: float
    matched: int
    """Latents that are their own counterpart."""
    alone_in_successor: tuple[str, ...]
    """Latents without a counterpart, ``latent@J``."""
    alone_in_parent: tuple[str, ...]
    latents: tuple[CrosscoderLatent, ...]
    """Those that are one model's by verdict, the most one-sided first; at most 16."""
    effects: tuple[CrosscoderEffect, ...]
    """For the behaviours whose opacity was measured."""
