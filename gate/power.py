"""How small a circuit this audit would have seen: canaries through the audit's own steps, and what follows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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
    planned = plans(successor, windows, pieces, count=sizes.canaries, fewest=policy.fewest_contexts, seed=seed)
    if not planned:
        return NotMeasured(
            reason=f"no two tokens follow each other in {policy.fewest_contexts} texts where the models agree, so no "
            "canary could be planted: give more text"
        )

    def counts(found: Cluster) -> bool:
        effect = interval([c.kl for c in found.contexts])
        material = effect.n >= policy.fewest_contexts and effect.low >= policy.material_nats
        return material and false_alarm(effect.estimate, null.largest_effects) < policy.false_alarm

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
            )
            return {"seen": tried.seen, "missed": tried.missed}

        result = work.step(f"canary-{number:03d}", compute)
        found.append(
            Canary(
                layer=plan.layer,
                after=successor.decode([plan.before, plan.last]),
                says=successor.decode([plan.says]),
                contexts=len(plan.windows),
                seen=None if result["seen"] is None else tidy(result["seen"]),
                missed=None if result["missed"] is None else tidy(result["missed"]),
            )
        )
    progress("planting canaries", len(planned), len(planned))
    return Power(canaries=tuple(found), seen_share=SEEN_SHARE, visible=visible([c.seen for c in found]))


def visible(seen: Sequence[float | None]) -> float | None:
    """The effect, nats, at which :data:`SEEN_SHARE` of the canaries had been seen; None if fewer were at any."""
    sizes = sorted(value for value in seen if value is not None)
    needed = int(np.ceil(SEEN_SHARE * len(seen)))
    return tidy(sizes[needed - 1]) if len(sizes) >= needed else None
