"""What an explanation says: a rule, how well it predicts on text it was not learned on, and examples."""

from typing import Literal

from .rules import Record, Rule


class Example(Record):
    """A place where it is active."""

    before: str
    """Characters before the token, as they stand in the text."""
    token: str
    after: str
    activation: float


class Explanation(Record):
    """Where one latent, head or neuron is active, and how far that is understood."""

    latent: int
    status: Literal["measured", "too few contexts"]
    rule: str
    """In words; empty where nothing was learned."""
    program: Rule | None
    """The rule itself: ``program.holds(contexts)`` says of each token whether it predicts activity."""
    q: float | None
    """How much is explained, from 0 (chance) to 1: max(0, 2·low − 1 − null). None where it was not measured."""
    balanced_accuracy: float | None
    """Mean of the shares predicted right of active and of inactive tokens, on the texts the rule was not learned on."""
    low: float | None
    """Lower 95 % bound of ``balanced_accuracy``."""
    null: float | None
    """Mean of max(0, 2·balanced accuracy − 1) of rules learned the same way from labels moved along the text."""
    n_active: int
    """Tokens it is active at, in all texts."""
    n_texts: int
    """Texts it is active in."""
    examples: tuple[Example, ...]
    """Where it is most active, each in another text, strongest first."""
