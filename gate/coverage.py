"""Where in the successor the divergence on the audited text comes from, by depth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from heredity.circuits.depth import by_depth
from heredity.circuits.divergence import Window
from heredity.interp.capture import batches

from .values import Interval, NotMeasured, interval

if TYPE_CHECKING:
    from .assemble import Setting

LEAST, MOST = -1.0, 2.0
"""Shares beyond these are not of the divergence but of hybrids that fit neither model."""
TOO_LARGE = "a quick audit of models of this size does not divide it; --budget standard does"
TOKENS = 768
"""Of text, on large models: some twenty forwards of it."""


def by_site(s: "Setting", items: Sequence[Window]) -> dict[str, Interval] | NotMeasured:
    """What share of KL(successor‖parent) on some of ``items`` each stretch of layers is the reason of."""
    if not s.same_parameters:
        return NotMeasured(reason="the models have other layers, so none of one can stand in for one of the other")
    if not s.sizes.small and s.sizes.name == "quick":
        return NotMeasured(reason=TOO_LARGE)
    if not s.same_tokens:
        return NotMeasured(reason="the models read text with different tokenizers")
    s.progress("dividing the divergence by depth", 0, 1)

    def compute() -> Any:
        few = [item.successor for item in _some(items, s.sizes.drift_tokens if s.sizes.small else TOKENS)]
        groups = [[few[i].ids for i in group] for group in batches(few, s.sizes.batch_tokens)]
        found = by_depth(s.parent, s.successor, groups, seed=s.seed)
        n = len(few)
        return found and {name: interval(share, n).model_dump(mode="json") for name, share in found}

    found = s.work.step("depth", compute)
    s.progress("dividing the divergence by depth", 1, 1)
    if found is None:
        return NotMeasured(reason="the models say the same on it")
    shares = [share["estimate"] for share in found.values()]
    if min(shares) < LEAST or max(shares) > MOST:
        return NotMeasured(
            reason="layers of the two models do not work in one another's places: hybrids of them are further from "
            "both than these are from one another (shares of the divergence would go from "
            f"{min(shares):.2g} to {max(shares):.2g})"
        )
    return {name: Interval.model_validate(share) for name, share in found.items()}


def _some(items: Sequence[Window], tokens: int) -> list[Window]:
    """The first of ``items`` with that many tokens together."""
    out: list[Window] = []
    for item in items:
        if sum(len(each.successor.ids) for each in out) >= tokens:
            break
        out.append(item)
    return out
