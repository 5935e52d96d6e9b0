"""What opacity and latents of an audit have in common: the behaviours, their prompts, and the text beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from heredity.circuits.attribution import Prompts
from heredity.circuits.behaviours import Cluster
from heredity.circuits.divergence import Window
from heredity.circuits.opacity import alike, without_trigger
from heredity.circuits.opacity_estimate import FEWEST
from heredity.circuits.opacity_prompts import Episodes, HeldOut, episodes_of, held_out, text_of
from heredity.interp.explain.contexts import Contexts
from heredity.interp.model import Encoded

from .opacity_units import Makers, effort
from .records import Behaviour, Circuit
from .values import NotMeasured
from .verdict import beyond_null, material

if TYPE_CHECKING:
    from .assemble import Setting

FEWEST_TEXTS, FEWEST_TOKENS = 40, 2_000
"""Text to explain on that has to be left beside the prompts."""

TOO_LARGE = (
    "a quick audit of models of this size does not explain their parts; --budget standard does, at the layers that "
    "the circuit runs through"
)


@dataclass
class Plan:
    """Which behaviours are looked into, on which prompts, and what is explained on which text.

    Attributes:
        s: the audit.
        clusters: the contexts of each behaviour.
        behaviours: the records so far.
        items: the windows of the corpus.
    """

    s: "Setting"
    clusters: Sequence[Cluster]
    behaviours: Sequence[Behaviour]
    items: Sequence[Window]

    @cached_property
    def chosen(self) -> list[int]:
        """Behaviours measured, findings first."""
        if not self._possible:
            return []
        policy = self.s.rules.policy
        traced = [i for i, b in enumerate(self.behaviours) if isinstance(b.circuit, Circuit)]
        traced.sort(
            key=lambda i: not (material(self.behaviours[i], policy) and beyond_null(self.behaviours[i], policy))
        )
        return traced[: effort(self.s).behaviours]

    @property
    def _possible(self) -> bool:
        return self.s.same_tokens and (self.s.sizes.small or self.s.sizes.name != "quick")

    def why_not(self, behaviour: Behaviour) -> str:
        """Why a behaviour that is not among the chosen was not measured."""
        if isinstance(behaviour.circuit, NotMeasured):
            return f"its circuit was not traced: {behaviour.circuit.reason}"
        if not self._possible:
            return TOO_LARGE
        return f"only {effort(self.s).behaviours} behaviours are measured at this budget"

    @cached_property
    def held(self) -> dict[int, HeldOut]:
        """Prompts of each behaviour that is measured."""
        s = self.s
        return {
            i: held_out(
                self.clusters[i],
                s.parent,
                s.successor,
                self.items,
                window=s.sizes.window,
                most=effort(s).prompts,
                seed=s.seed,
            )
            for i in self.chosen
        }

    @cached_property
    def texts(self) -> tuple[Encoded, ...]:
        """Windows of the corpus that share no text with any prompt."""
        taken = {name for held in self.held.values() for name in held.texts}
        kept = [w.successor for w in self.items if text_of("corpus", w.text_id) not in taken]
        out, spent = [], 0
        for text in {text.ids: text for text in kept}.values():
            if spent >= effort(self.s).tokens:
                break
            out.append(text)
            spent += len(text.ids)
        return tuple(out)

    def lacking(self, number: int) -> str | None:
        """Why a behaviour cannot be measured, for want of prompts or text."""
        n = len(self.held[number].contexts)
        if n < FEWEST:
            return f"it shows in {n} contexts, and behind other text too seldom; a share needs {FEWEST}"
        texts = self.texts
        tokens = sum(len(text.ids) for text in texts)
        if len(texts) < FEWEST_TEXTS or tokens < FEWEST_TOKENS:
            return (
                f"beside its contexts {len(texts)} texts of {tokens} tokens are left to explain parts on, of "
                f"{FEWEST_TEXTS} and {FEWEST_TOKENS} that are needed"
            )
        return None

    def episodes(self, number: int) -> tuple[Episodes, torch.Tensor | None]:
        """Prompts and where the behaviour shows in each; and the same without the trigger where the parent has other
        parts."""
        contexts = list(self.held[number].contexts)
        if alike(self.s.parent, self.s.successor):
            return episodes_of(contexts), None
        named = set(self.behaviours[number].trigger_tokens)

        def triggers(ids: Sequence[int]) -> list[float]:
            return [float(self.s.successor.decode([i]).strip() in named) for i in ids]

        contexts = [c for c in contexts if any(triggers(c.ids_successor))]
        if not contexts:
            return Episodes(Prompts(*(torch.zeros(0, dtype=torch.int64) for _ in range(4))), [], []), None
        found = episodes_of(contexts)
        prompts = found.prompts
        rows = [row[: last + 1] for row, last in zip(prompts.tokens.tolist(), prompts.last.tolist(), strict=True)]
        pool = sorted({token for text in self.texts for token in text.ids})
        without = without_trigger(prompts, [triggers(row) for row in rows], pool, seed=self.s.seed)
        return found, without

    @cached_property
    def makers(self) -> Makers:
        """How the units are made."""
        if self.s.sizes.small:
            layers = list(range(self.s.successor.shape.n_layers))
        else:
            layers = sorted(_layers([self.behaviours[i] for i in self.chosen])[: effort(self.s).layers])
        return Makers(self.s, Contexts(self.texts), layers)


def _layers(behaviours: Sequence[Behaviour]) -> list[int]:
    """Layers of the nodes that circuits selected, those with the largest attributions first."""
    found: dict[int, float] = {}
    for behaviour in behaviours:
        if isinstance(behaviour.circuit, Circuit):
            for node in behaviour.circuit.nodes:
                if node.selected and "@" in node.id:
                    found[node.layer] = found.get(node.layer, 0.0) + abs(node.attribution)
    return sorted(found, key=lambda layer: (-found[layer], layer))
