"""What to train and how: every choice that decides the result, in one frozen record.

Numbers that have no rule to follow from (rate, the weight of the dead latents' loss, how latents start) were chosen on
activations of SmolLM2-135M in runs of 32 to 128 steps, with another seed than ``benchmarks/dictionaries.py`` reports.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from ...errors import TrainingError

Kind = Literal["sae", "transcoder", "crosscoder", "difference"]
Rule = Literal["topk", "batchtopk", "jumprelu"]
Share = Annotated[float, Field(ge=0, le=1)]
PATIENCE = 32
"""How many activations at the mean rate a latent may miss before it counts as dead."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """A dictionary and its training; equal recipes on equal sources give equal bytes.

    Raises:
        pydantic.ValidationError: a value is out of range (a ``ValueError``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Kind
    """``difference``: an SAE of the second model's activations minus the first's."""
    latents: PositiveInt
    k: PositiveInt
    """Active latents per token: exactly (topk), on average (batchtopk), or aimed at (jumprelu)."""
    activation: Rule = "batchtopk"
    skip: bool = False
    """A transcoder's linear path beside the latents (Paulo et al. 2501.18823)."""
    shared: Share = 0.0
    """Share of a crosscoder's latents, the first ones, whose decoder rows are one row for all models (designated shared
    features: Anthropic, February 2025), under the rule of all latents."""
    shared_penalty: Annotated[float, Field(gt=0, le=1)] = 0.7
    """A shared latent's price over that of any other: it is selected by its score divided by this (2603.05805)."""
    dedicated: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a crosscoder's latents, the last ones, that belong to the first model alone, and as many to every other
    model: encoder and decoder are zero elsewhere (dedicated features: 2602.11729)."""
    batch: PositiveInt = 1024
    """Tokens in a step."""
    tokens: PositiveInt | None = None
    """Tokens to train on; None: as many as the source has."""
    rate: Positive = 3e-3
    """Adam's, in units where every place has root mean square 1. Chosen for hundreds of steps; many thousands may want
    less."""
    warm: Share = 0.05
    """Share of all steps over which the rate rises from 0."""
    decay: Share = 0.4
    """Share of all steps, the last ones, over which it falls to 0."""
    k_start: Positive = 2.0
    """How many times k are active at first."""
    anneal: Share = 0.2
    """Share of all steps until it is k."""
    aux: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the loss by which dead latents learn what the others leave out (AuxK, Gao et al. 2406.04093: 1/32)."""
    aux_k: PositiveInt = 64
    """Dead latents per token in it."""
    dead_after: PositiveInt | None = None
    """Tokens in a row without it after which a latent is dead; None: those in which a latent of the mean rate, k of all
    latents per token, is active :data:`PATIENCE` times; a hundredth of all tokens if that is more; at most a tenth of
    them and at most ten million. With a tenth throughout, latents too rare to be active on 16,384 tokens were left."""
    massive: Positive | None = 3.0
    """Tokens are left out where the norm at a place is above so many medians of the batch: massive activations, as on
    the first token of a text (2602.11729 leaves out those above 2); None: all are used."""
    seed: NonNegativeInt = 0

    @property
    def rule(self) -> str:
        """The activation as it is usually spelled."""
        return {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}[self.activation]

    def steps(self, n_tokens: int) -> int:
        """How many steps there are, on a source of ``n_tokens``."""
        return (self.tokens or n_tokens) // self.batch

    def window(self, n_tokens: int) -> int:
        """``dead_after`` with its default filled in."""
        tokens, typical = self.tokens or n_tokens, PATIENCE * self.latents // self.k
        return self.dead_after or max(self.batch, min(10_000_000, tokens // 10, max(tokens // 100, typical)))

    def blocks(self, models: int) -> tuple[int, int]:
        """How many latents are shared, and how many are dedicated to each model."""
        return round(self.shared * self.latents), round(self.dedicated * self.latents)


def check(recipe: Recipe, widths: Sequence[int], n_tokens: int) -> None:
    """Nothing, if ``recipe`` can be trained on places of these widths.

    Raises:
        TrainingError: it cannot; names the setting.
    """
    kind, places = recipe.kind, len(widths)
    needed = {"sae": (1, 1), "transcoder": (2, 2), "difference": (2, 2), "crosscoder": (2, 64)}[kind]
    shared, own = recipe.blocks(places)
    faults: list[tuple[bool, str, str, str]] = [
        (
            not needed[0] <= places <= needed[1],
            "source",
            f"a {kind} is not trained on {places} place(s)",
            _PLACES[kind],
        ),
        (
            kind in ("transcoder", "difference") and len(set(widths)) > 1,
            "source",
            f"a {kind} needs places of one width, not {' and '.join(map(str, widths))}",
            "A crosscoder takes any.",
        ),
        (recipe.k > recipe.latents, "k", f"{recipe.k} active of {recipe.latents} latents", "Lower k."),
        (recipe.skip and kind != "transcoder", "skip", f"a {kind} has no skip path", "Leave it out."),
        (
            bool(recipe.shared or recipe.dedicated) and kind != "crosscoder",
            "shared, dedicated",
            f"a {kind} is of one model",
            "Only a crosscoder's latents are shared or dedicated.",
        ),
        (
            shared + places * own > recipe.latents,
            "shared, dedicated",
            f"{shared} shared and {places} times {own} dedicated latents are more than {recipe.latents}",
            "Lower one.",
        ),
        (
            bool(shared) and len(set(widths)) > 1,
            "shared",
            f"one decoder row cannot serve widths {', '.join(map(str, widths))}",
            "Leave it out, or use dedicated.",
        ),
        (
            recipe.steps(n_tokens) < 1,
            "tokens",
            f"{recipe.tokens or n_tokens} do not fill one batch of {recipe.batch}",
            "Lower batch, or give more text.",
        ),
    ]
    for wrong, where, what, remedy in faults:
        if wrong:
            raise TrainingError(what, where=where, remedy=remedy)


_PLACES = {
    "sae": "Give one site of one model.",
    "transcoder": "Give the site it reads and the site it writes, of one model.",
    "difference": "Give one site of two models.",
    "crosscoder": "Give the site of two models or more.",
}
