"""Which latents belong to one model only: ranked by decoder norm, decided by what the other model still holds.

A large Δnorm alone is a claim about the dictionary, not about the models. A latent is a model's own only if, besides,

* no other latent writes the same direction in the other model, or in both (a **twin**: latent decoupling);
* the other model's error holds nothing along it when it is active (ν^ε: complete shrinkage), neither as much as a
  shared latent's would, nor reliably more than along directions of unrelated latents (a concept that the other model
  holds weakly is shared: amplified, not new), nor, where the models share no basis, anything in another direction;
* the other model's reconstruction does not write it through several others (ν^r);
* error and reconstruction together, the other model's activations, do not rise along it reliably more than along those
  directions (ν^x: shrinkage that tied rows hide from ν^ε). Not asked of a latent that does not read the other model: it
  is active where shared concepts of like direction push it over its threshold, and the activations rise with those. A
  latent that reads both models can take off what the other shows along its direction.

Cut-offs come from the pair itself: the low end of the band that holds 95 % of ν over the shared latents, where it lies
below the published 0.2 and 0.5 (Minder et al. 2504.02922, §2–3), but never below half of those: further down, the band
says that some shared latents are badly learned. Closed forms make ν of all shared latents cheap, so the band is of all
of them, not of a sample.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from ..record import Dictionary
from .norms import delta_norm
from .scaling import WAYS, Scaling, held, latent_scaling, response, unit

Verdict = Literal["successor-only", "parent-only", "shared", "undecided"]

SHARED = (0.4, 0.6)
EXTREME = (0.1, 0.9)
"""Δnorm of shared latents and of exclusive ones (Minder et al., §2.1)."""
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
TWIN = 0.9
"""Cosine from which two latents are one concept."""
FEWEST = 30
"""Active tokens below which nothing is said of a latent, and shared latents below which the band is not used."""
RELIABLE = 4.0
"""How many times the spread over unrelated directions ν^ε must reach for a weak trace to count."""
WEAKEST = 0.02
"""A ν^ε below this is no trace, however reliable: directions of responses come from the same tokens."""
TRACE = 0.08
"""Where the models share no basis: what the other's error may hold in whatever direction."""
CHUNK = 1024
SHOWN = 10
"""Exclusive latents listed when verdicts are printed."""


@dataclass(frozen=True)
class LatentVerdict:
    """What is known of one latent.

    Attributes:
        latent: its number.
        verdict: the class.
        reason: why, in words.
        model: the model with the larger decoder row.
        delta_norm: 1 successor only, 0 parent only.
        nu_error, nu_reconstruction, nu_activation: latent scaling in the other model.
        trace: the other model's response in whatever direction (:class:`.scaling.Scaling`).
        floor: spread of ν^ε over directions of unrelated latents; None if it did not come to that.
        way: where the direction in the other model came from (``own``, ``same``, ``response``).
        nearest: another latent that writes nearly this direction in the other model or in both, and ``cosine``; None
            where none could.
        rate: share of tokens on which it is active.
    """

    latent: int
    verdict: Verdict
    reason: str
    model: Literal["parent", "successor"]
    delta_norm: float
    nu_error: float
    nu_reconstruction: float
    nu_activation: float
    trace: float
    floor: float | None
    way: str
    nearest: int | None
    cosine: float | None
    rate: float


@dataclass(frozen=True, repr=False)
class Exclusives:
    """Verdicts on all latents.

    Attributes:
        latents: in the order of their numbers.
        cut_error, cut_reconstruction: ν^ε and ν^r from which a latent counts as shared in this pair.
        band_error, band_reconstruction: the 95 % band of shared latents; None where there are too few of them.
    """

    latents: tuple[LatentVerdict, ...]
    cut_error: float
    cut_reconstruction: float
    band_error: tuple[float, float] | None
    band_reconstruction: tuple[float, float] | None

    def __repr__(self) -> str:
        names = ("successor-only", "parent-only", "shared", "undecided")
        lines = [
            f"Exclusives of {len(self.latents):,} latents: " + ", ".join(f"{len(self.of(n)):,} {n}" for n in names)
        ]
        lines.append(f"  shared from ν^ε {self.cut_error:.2g}, ν^r {self.cut_reconstruction:.2g}")
        for each in [each for each in self.ranked if each.verdict.endswith("-only")][:SHOWN]:
            nu = f"ν^ε {each.nu_error:+.3f}  ν^r {each.nu_reconstruction:+.3f}"
            lines.append(f"{each.latent:8,}  {each.verdict:14}  Δnorm {each.delta_norm:.2f}  {nu}  {each.rate:.3%}")
        return "\n".join(lines)

    @cached_property
    def ranked(self) -> tuple[LatentVerdict, ...]:
        """Exclusive ones first; within a verdict the more one-sided first, then the less the other model holds."""
        return tuple(sorted(self.latents, key=_rank))

    def of(self, verdict: Verdict) -> tuple[LatentVerdict, ...]:
        """Those of one class, ranked."""
        return tuple(each for each in self.ranked if each.verdict == verdict)


def exclusives(dictionary: Dictionary, batches: Iterable[Sequence[Tensor]]) -> Exclusives:
    """A verdict on every latent of a crosscoder.

    Exchanging parent and successor exchanges the classes; the order of latents does not matter; a model against itself
    has no exclusive latent.

    Args:
        dictionary: a crosscoder of a parent and a successor.
        batches: (parent [T, D_0], successor [T, D_1]), row by row the same token; read once.

    Raises:
        ValueError: no tokens, or the dictionary is not of two models.
    """
    scaling = latent_scaling(dictionary, batches)
    delta = delta_norm(dictionary, scales=scaling.sums.scales)
    seen = scaling.sums.count >= FEWEST
    shared = seen & (delta >= SHARED[0]) & (delta <= SHARED[1])
    band_error = _band(scaling.nu_error[shared])
    band_reconstruction = _band(scaling.nu_reconstruction[shared])
    cut_error = _cut(NU_ERROR, band_error)
    cut_reconstruction = _cut(NU_RECONSTRUCTION, band_reconstruction)

    candidates = (seen & ~shared & delta.isfinite()).nonzero()[:, 0]
    nearest, cosine = twins(dictionary, scaling, delta, candidates)
    centre, floor = _unrelated(scaling, candidates, seen, partial(held, dictionary, scaling.sums), scaling.unit)
    rises = partial(response, dictionary, scaling.sums)
    centre_x, floor_x = _unrelated(scaling, candidates, seen, rises, scaling.unit_activation)
    reads_both = torch.stack([encoder.abs().amax(0) > 0 for encoder in dictionary.W_enc]).all(0)
    at = {int(latent): i for i, latent in enumerate(candidates)}
    verdicts = []
    for j in range(dictionary.n_latents):
        i = at.get(j)
        extreme = not EXTREME[0] < float(delta[j]) < EXTREME[1]
        nu, nu_r, nu_x = (
            float(each[j]) for each in (scaling.nu_error, scaling.nu_reconstruction, scaling.nu_activation)
        )
        way = WAYS[int(scaling.way[j])]
        owner: Literal["parent", "successor"] = "successor" if int(scaling.owner[j]) else "parent"
        other = "parent" if owner == "successor" else "successor"
        verdict: Verdict = "shared"
        if i is None:
            reason = "decoder rows of like norm" if bool(shared[j]) else "too rarely active"
            verdict = "shared" if bool(shared[j]) else "undecided"
        elif float(cosine[i]) > TWIN:
            reason = f"twin of latent {int(nearest[i])}, which writes the same direction"
        elif nu >= cut_error:
            reason = f"the {other}'s error holds it"
        elif nu_r >= cut_reconstruction:
            reason = f"the {other} writes it through other latents"
        elif nu > WEAKEST and nu - float(centre[i]) > RELIABLE * float(floor[i]):
            reason = f"the {other} holds it weakly"
        elif (
            # A direction that is itself the response's says nothing about it.
            way != "response"
            and bool(reads_both[j])
            and nu_x > WEAKEST
            and nu_x - float(centre_x[i]) > RELIABLE * float(floor_x[i])
        ):
            reason = f"the {other}'s activations rise with it"
        elif way == "response" and float(scaling.trace[j]) >= TRACE:
            reason = f"the {other}'s error responds to it"
        elif extreme:
            verdict = "successor-only" if owner == "successor" else "parent-only"
            reason = f"the {other} holds nothing of it"
        else:
            verdict, reason = "undecided", "neither one-sided nor found in both"
        verdicts.append(
            LatentVerdict(
                latent=j,
                verdict=verdict,
                reason=reason,
                model=owner,
                delta_norm=float(delta[j]),
                nu_error=nu,
                nu_reconstruction=nu_r,
                nu_activation=nu_x,
                trace=float(scaling.trace[j]),
                floor=None if i is None else float(floor[i]),
                way=way,
                nearest=None if i is None or int(nearest[i]) < 0 else int(nearest[i]),
                cosine=None if i is None or int(nearest[i]) < 0 else float(cosine[i]),
                rate=float(scaling.sums.rate[j]),
            )
        )
    return Exclusives(tuple(verdicts), cut_error, cut_reconstruction, band_error, band_reconstruction)


def twins(dictionary: Dictionary, scaling: Scaling, delta: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """For some one-sided latents [n]: the nearest latent with the same concept in the other model, and the cosine.

    A twin writes the latent's direction in the other model, or writes it in the owner and is not one-sided itself.
    Latents that are never active are nobody's twins.

    Returns:
        (number [n], -1 where there is none; cosine [n], -1 there).
    """
    active = scaling.sums.count >= FEWEST
    two_sided = active & (delta > 0.25) & (delta < 0.75)
    length = torch.stack([decoder.double().norm(dim=1) for decoder in dictionary.W_dec])
    scales = torch.tensor(scaling.sums.scales, dtype=torch.float64, device=length.device)[:, None]
    writes = active & (length / scales >= 0.25 * (length / scales).amax(0))
    rows = [unit(decoder.double()) for decoder in dictionary.W_dec]
    best, which = [], []
    for part in latents.split(CHUNK) if len(latents) else ():
        cosines = torch.full((len(part), dictionary.n_latents), -1.0, dtype=torch.float64, device=length.device)
        for owner in range(2):
            mine = scaling.owner[part] == owner
            here = (rows[owner][part] @ rows[owner].T).masked_fill(~two_sided, -1)
            there = (scaling.direction[1 - owner][part] @ rows[1 - owner].T).masked_fill(~writes[1 - owner], -1)
            # A model that hardly responds does so in whatever direction chance correlates with.
            there = there.masked_fill((scaling.carried[part] < NU_ERROR)[:, None], -1)
            cosines = torch.where(mine[:, None], torch.maximum(here, there), cosines)
        cosines[torch.arange(len(part)), part] = -1
        value, index = cosines.max(1)
        best.append(value)
        which.append(torch.where(value > -1, index, -1))
    if not best:
        return latents.clone(), length.new_zeros(0)
    return torch.cat(which), torch.cat(best)


def _unrelated(
    scaling: Scaling, latents: Tensor, seen: Tensor, found: Callable[[int, Tensor], Tensor], one: Tensor
) -> tuple[Tensor, Tensor]:
    """Median and spread (1.48 median absolute deviations) of a ν of some latents along all active latents' directions.

    What is found there is the dictionary's imperfection and chance, not the latent's concept.

    Args:
        scaling: of the dictionary.
        latents: which.
        seen: bool [F], those whose directions are compared with.
        found: of a model and some latents [n], what the ν is a projection of, [n, D].
        one: [F], what one unit of the ν is.
    """
    centre, spread = [], []
    for part in latents.split(CHUNK) if len(latents) else ():
        for_owner = []
        for owner in range(2):
            there = found(1 - owner, part) @ scaling.direction[1 - owner][seen].T
            middle = there.median(1).values
            for_owner.append(torch.stack([middle, 1.4826 * (there - middle[:, None]).abs().median(1).values]))
        both = torch.where(scaling.owner[part] == 1, for_owner[1], for_owner[0]) / one[part]
        centre.append(both[0])
        spread.append(both[1])
    if not centre:
        nothing = one[:0]
        return nothing, nothing
    return torch.cat(centre), torch.cat(spread)


def _band(values: Tensor) -> tuple[float, float] | None:
    values = values[values.isfinite()]
    if len(values) < FEWEST:
        return None
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _cut(published: float, band: tuple[float, float] | None) -> float:
    return published if band is None else min(published, max(band[0], published / 2))


def _rank(each: LatentVerdict) -> tuple[bool, bool, float, float]:
    one_sided = abs(each.delta_norm - 0.5)
    exclusive = each.verdict.endswith("-only")
    unknown = one_sided != one_sided
    return (
        not exclusive,
        unknown,
        0.0 if unknown else -one_sided,
        each.nu_error if each.nu_error == each.nu_error else 9.0,
    )
