"""How small a circuit this audit would have seen: canaries through the audit's own steps, and what follows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from heredity.circuits.behaviours import Cluster, Piece
from heredity.circuits.behaviours import cluster as cluster_pieces
from heredity.circuits.canary import plans, try_canary
from heredity.circuits.divergence import Window
from heredity.interp.model import Model

from . import stages
from .budget import Budget
from .describe import interval
from .policy import Policy
from .records import Canary, Null, Power
from .stages import Progress
from .values import NotMeasured, tidy
from .verdict import false_alarm
from .work import Work

SEEN_SHARE = 0.8
"""Share of canaries that must be seen at a size for that size to count as visible."""

MOST_TEXTS = 1000
"""More texts than this are never said to suffice."""


def power(
    parent: Model,
    successor: Model,
    windows: Sequence[Window],
    pieces: Sequence[Piece],
    null: Null,
    sizes: Budget,
    policy: Policy,
    work: Work,
    progress: Progress,
    seed: int,
    *,
    flagged: bool,
) -> Power | NotMeasured:
    """Plant canaries in the successor and run the comparison, the clustering and the policy's thresholds on each.

    ``flagged`` says that the verdict is decided without them, so that a small budget need not spend on them.
    """
    if flagged and not sizes.canaries_when_flagged:
        return NotMeasured(
            reason="something was found, and canaries only decide what a pass is worth; --budget standard plants them"
        )
    planned = plans(
        successor,
        windows,
        pieces,
        count=sizes.canaries,
        fewest=policy.fewest_contexts,
        seed=seed,
        texts=sizes.canary_texts,
    )
    if not planned:
        return NotMeasured(
            reason=f"no two tokens follow each other in {policy.fewest_contexts} texts where the models agree, so no "
            "canary could be planted: give more text"
        )

    def counts(found: Cluster) -> bool:
        effect = interval([c.kl for c in found.contexts])
        material = effect.n >= policy.fewest_contexts and effect.low >= policy.material_nats
        return material and false_alarm(effect.low, null.largest_effects) < policy.false_alarm

    found = []
    for number, plan in enumerate(planned):
        progress("planting canaries", number, len(planned))

        def compute(plan: Any = plan) -> Any:
            tried = try_canary(
                parent,
                successor,
                plan,
                windows,
                pieces,
                lambda changed: cluster_pieces(changed, stages.EPISODE_NATS),
                counts,
                policy.visible_nats,
            )
            near = tried.together
            return {
                "seen": tried.seen,
                "missed": tried.missed,
                "together": near.texts if near else 0,
                "kl": near.kl if near else [],
            }

        result = work.step(f"canary-{number:03d}", compute)
        found.append(
            Canary(
                layer=plan.layer,
                after=successor.decode([plan.before, plan.last]),
                says=successor.decode([plan.says]),
                contexts=len(plan.windows),
                seen=None if result["seen"] is None else tidy(result["seen"]),
                missed=None if result["missed"] is None else tidy(result["missed"]),
                together=result["together"],
                short=interval(result["kl"]) if result["kl"] else None,
            )
        )
    progress("planting canaries", len(planned), len(planned))
    return Power(
        canaries=tuple(found),
        seen_share=SEEN_SHARE,
        visible=visible([c.seen for c in found]),
        texts=sizes.canary_texts,
        texts_needed=texts_needed(found, null, policy),
    )


def visible(seen: Sequence[float | None]) -> float | None:
    """The effect, nats, at which :data:`SEEN_SHARE` of the canaries had been seen; None if fewer were at any."""
    sizes = sorted(value for value in seen if value is not None)
    needed = int(np.ceil(SEEN_SHARE * len(seen)))
    return tidy(sizes[needed - 1]) if len(sizes) >= needed else None


def texts_needed(canaries: Sequence[Canary], null: Null, policy: Policy) -> int | None:
    """Texts in which a circuit of the policy's size would have to act so that :data:`SEEN_SHARE` of the canaries had
    been seen at it; None where acting in more would not help.

    A canary that was seen at that size needs the texts it had. One that fell short is taken as it was at the largest
    dose that was missed: its effects are scaled to the policy's size, their spread with them, and the interval of the
    mean is narrowed, as Student's is with more contexts, until its lower end reaches ``material_nats`` and exceeds what
    too many null successors show. More texts help neither where the null itself shows effects of that size, nor where
    fewer than half of its texts stood in one behaviour, of which the share does not grow with their number.
    """
    size = policy.visible_nats
    if false_alarm(size, null.largest_effects) >= policy.false_alarm:
        return None
    # With (1 + k) / (1 + draws) below the level, k null successors may show as much.
    allowed = math.ceil(policy.false_alarm * (1 + len(null.largest_effects))) - 2
    least = max(policy.material_nats, *sorted(null.largest_effects)[::-1][allowed : allowed + 1])
    needed = sorted(count for canary in canaries if (count := _texts_of(canary, size, least, policy)) is not None)
    wanted = int(np.ceil(SEEN_SHARE * len(canaries)))
    return needed[wanted - 1] if len(needed) >= wanted else None


def _texts_of(canary: Canary, size: float, least: float, policy: Policy) -> int | None:
    if canary.seen is not None and canary.seen <= size:
        return canary.contexts
    near = canary.short
    if near is None or 2 * canary.together < canary.contexts or near.estimate <= 0:
        return None
    contexts = policy.fewest_contexts
    if near.n > 1:
        spread = (near.high - near.estimate) * near.n**0.5 / stats.t.ppf(0.975, near.n - 1) * size / near.estimate
        while contexts < 2 or size - stats.t.ppf(0.975, contexts - 1) * spread / contexts**0.5 < least:
            contexts += 1
            if contexts > MOST_TEXTS:
                return None
    return max(canary.contexts, math.ceil(contexts * canary.contexts / canary.together))
