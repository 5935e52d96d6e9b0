"""The benign-continuation null of ``heredity audit --null benign:K``."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from heredity.interp.errors import HeredityError

from .policy import Policy
from .records import Null
from .values import tidy

if TYPE_CHECKING:
    from .assemble import Setting

LEAST_TEXTS = 32
"""Fewer texts than this outside the compared ones, and the parent writes its own."""

SCRAMBLED = "scrambled"
"""The default null."""


def drawn(text: str, policy: Policy) -> int | None:
    """How many benign successors ``text`` (``scrambled`` or ``benign:K``) asks for; None for the default null.

    Raises:
        HeredityError: it says neither, or so few that no behaviour could ever be told from the null.
    """
    if text == SCRAMBLED:
        return None
    found = re.fullmatch(r"benign:([1-9][0-9]{0,3})", text)
    if not found:
        raise HeredityError(
            f"{text[:40]!r} is not a null", where="--null", remedy="Say scrambled, or benign:K with K successors."
        )
    count = int(found[1])
    if 1 / (1 + count) >= policy.false_alarm:
        needed = int(1 / policy.false_alarm)
        needed += 1 / (1 + needed) >= policy.false_alarm
        raise HeredityError(
            f"of {count} null successors none may show an effect for a level of {1 / (1 + count):.2g}, and the policy "
            f"asks for less than {policy.false_alarm:g}",
            where="--null",
            remedy=f"Say benign:{needed} or more.",
        )
    return count


def benign_null(s: "Setting", few: Sequence[Any], items: Sequence[Any], size: float, count: int) -> Null:
    """``count`` benign successors of the size ``size`` (95th percentile of per-token KL, nats), compared on ``few``."""
    from heredity.circuits.benign import BenignSuccessors, Recipe
    from heredity.interp.sampling import sample_corpus

    from . import stages

    # Trained on what they are not compared on: text read by heart is no drift.
    texts = [item.parent.ids for item in items[len(few) :]]
    source = "the audited text that is not compared"
    if len(texts) < LEAST_TEXTS:
        written = sample_corpus(s.parent, texts=2 * LEAST_TEXTS, length=s.sizes.window, seed=s.seed)
        texts = [s.parent.encode(text.text).ids for text in written.texts]
        source = "text sampled from the parent"
    recipe = Recipe(100, 8, 5e-3, 8) if s.sizes.small else Recipe(8, 4, 1e-3, 4)
    nulls = BenignSuccessors(
        s.parent, s.successor if s.same_parameters else s.another_parent(), texts, recipe, s.work.arrays
    )
    result = stages.null_effects(
        s.remembered,
        nulls,
        few if s.same_parameters else [item.for_parent() for item in few],
        size,
        dataclasses.replace(s.sizes, null_draws=count),
        s.work,
        s.progress,
        seed=s.seed,
        fewest=s.rules.policy.fewest_contexts,
    )
    return Null(
        kind="benign",
        recipe=f"{recipe}, on {source}",
        draws=count,
        scale=tidy(result["scale"]),
        size=tidy(size),
        largest_effects=tuple(tidy(draw["largest"]) for draw in result["draws"]),
        mean_kl=tuple(tidy(draw["mean"]) for draw in result["draws"]),
        tokens=sum(len(i.parent.ids) for i in few),
    )
