"""What an explanation says: a rule, how well it predicts on text it was not learned on, and examples."""

from typing import Literal

from ..visible import visible
from .rules import Record, Rule


class Example(Record):
    """A place where it is active."""

    before: str
    """Characters before the token, as they stand in the text."""
    token: str
    after: str
    activation: float

    def __str__(self) -> str:
        """In one line, the token between » and «, nothing in it hidden."""
        return visible(f"{self.before}»{self.token}«{self.after}")


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

    def __str__(self) -> str:
        """The rule in words, q with its parts, and the examples with the token marked."""
        active = f"active at {self.n_active:,} tokens in {self.n_texts:,} texts"
        head = f"not explained: {self.status}; {active}"
        if self.q is not None:
            parts = (
                f"balanced accuracy {self.balanced_accuracy:.3f}, at least {self.low:.3f}; {self.null:.3f} by chance"
            )
            head = f"{visible(self.rule)}\nq {self.q:.2f} ({parts}); {active}"
        return "\n".join([head, *(f"{each.activation:10.3g}  {each}" for each in self.examples)])
