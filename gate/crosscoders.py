"""Crosscoders of the pair that an audit was given: which latents are one model's alone, and what they do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import TypeAdapter
from torch import Tensor

from heredity.circuits.behaviours import Piece
from heredity.circuits.crosscoder_effect import taken_back
from heredity.circuits.matching import by_latents
from heredity.circuits.opacity_labels import values_at
from heredity.interp.align import align
from heredity.interp.dictionaries.describing import logit_effects
from heredity.interp.dictionaries.exclusive import Exclusives, LatentVerdict, Stability, exclusives, moments, stability
from heredity.interp.dictionaries.exclusive.verdict import Verdict
from heredity.interp.dictionaries.record import Dictionary
from heredity.interp.explain.contexts import Contexts
from heredity.interp.explain.measure import explain
from heredity.interp.explain.record import Explanation

from .crosscoders_record import NONE_GIVEN, CrosscoderEffect, CrosscoderLatent, CrosscoderRecord
from .latents_record import LatentExample
from .opacity_plan import Plan
from .opacity_units import effort
from .values import NotMeasured, interval, tidy

if TYPE_CHECKING:
    from .assemble import Setting

LISTED = 16
"""Latents of one model alone that are recorded."""
CONTROLS = 9
EXAMPLES, TOKENS = 3, 5
ROWS = 8192
"""Tokens of a batch."""

Crosscoders = tuple[CrosscoderRecord, ...] | NotMeasured


def crosscoders(plan: Plan, pieces: Sequence[Piece]) -> Crosscoders:
    """What each crosscoder among the audit's dictionaries says of ``pieces``, the text that both models read."""
    given = [d for d in plan.s.dictionaries if d.kind == "crosscoder" and len(d.reads) == 2]
    if not given:
        return NONE_GIVEN
    out = []
    for number, each in enumerate(given):
        plan.s.progress("comparing crosscoders", number, len(given))

        def compute(each: Dictionary = each) -> Any:
            return _Compared(plan, each, pieces).record().model_dump(mode="json")

        out.append(plan.s.work.step(f"crosscoder-{number:03d}", compute))
    plan.s.progress("comparing crosscoders", len(given), len(given))
    return TypeAdapter(tuple[CrosscoderRecord, ...]).validate_python(out)


class _Compared:
    """One crosscoder on the audited text."""

    def __init__(self, plan: Plan, crosscoder: Dictionary, pieces: Sequence[Piece]) -> None:
        self.plan, self.s, self.crosscoder = plan, plan.s, crosscoder
        self.others = [d for d in self.s.other_seeds if d.reads == crosscoder.reads]
        self.text = _Text.of(self.s, [port.site for port in crosscoder.reads], pieces)

    def record(self) -> CrosscoderRecord:
        """Verdicts, the matching that follows from them, and the latents that are one model's alone."""
        parent, successor = self.crosscoder.reads
        verdicts = [exclusives(each, self.text.batches()) for each in (self.crosscoder, *self.others)]
        stable = self._stability(verdicts)
        matching = by_latents(verdicts[0], stable)
        one_sided = [each for each in verdicts[0].ranked if each.verdict.endswith("-only")]
        listed = one_sided[:LISTED]
        came_back = {each.latent: max(each.matched, each.in_subspace) for each in stable.latents}
        alone = {*matching.alone_in_successor, *matching.alone_in_parent}
        explained = self._explained([each.latent for each in listed])
        return CrosscoderRecord(
            parent_site=parent.site,
            successor_site=successor.site,
            n_latents=self.crosscoder.n_latents,
            other_seeds=len(self.others),
            tokens=len(self.text.rows[0]),
            verdicts={name: len(verdicts[0].of(name)) for name in get_args(Verdict)},
            cut_error=tidy(verdicts[0].cut_error),
            cut_reconstruction=tidy(verdicts[0].cut_reconstruction),
            matched=len(matching.matches),
            alone_in_successor=matching.alone_in_successor,
            alone_in_parent=matching.alone_in_parent,
            latents=tuple(
                self._latent(each, said, came_back.get(each.latent), f"latent@{each.latent}" in alone)
                for each, said in zip(listed, explained, strict=True)
            ),
            effects=self._effects([each.latent for each in listed if each.verdict == "successor-only"]),
        )

    def _stability(self, verdicts: Sequence[Exclusives]) -> Stability:
        """Which one-sided latents came back in every crosscoder from another seed; none where there is no other."""
        if not self.others:
            return Stability((), ((), ()), ((), ()))

        def latents(some: Exclusives, name: Verdict) -> list[int]:
            return [each.latent for each in some.of(name)]

        return stability(
            [self.crosscoder, *self.others],
            [(latents(some, "parent-only"), latents(some, "successor-only")) for some in verdicts],
            scales=moments(self.crosscoder, self.text.batches()).scales,
            at_least=len(self.others),
        )

    def _explained(self, latents: Sequence[int]) -> list[Explanation | None]:
        """Rules on the audited text; none where the models read other tokens, so that rows are no text's."""
        if not self.s.same_tokens or not latents:
            return [None] * len(latents)
        features = self.crosscoder.encode(*self.text.rows)
        return list(explain(features, self.text.contexts, latents, seed=self.s.seed))

    def _latent(
        self, each: LatentVerdict, said: Explanation | None, came_back: int | None, alone: bool
    ) -> CrosscoderLatent:
        of_successor = each.verdict == "successor-only"
        raised, lowered = self._logits(each.latent, of_successor)
        return CrosscoderLatent(
            index=each.latent,
            verdict="successor-only" if of_successor else "parent-only",
            alone=alone,
            came_back=came_back,
            delta_norm=tidy(each.delta_norm),
            nu_error=tidy(each.nu_error),
            nu_reconstruction=tidy(each.nu_reconstruction),
            rate=tidy(each.rate),
            rule="" if said is None else said.rule,
            q=None if said is None or said.q is None else tidy(said.q),
            raises=raised,
            lowers=lowered,
            examples=()
            if said is None
            else tuple(
                LatentExample(before=e.before, token=e.token, after=e.after, activation=tidy(e.activation))
                for e in said.examples[:EXAMPLES]
            ),
        )

    def _effects(self, latents: Sequence[int]) -> tuple[CrosscoderEffect, ...]:
        """What the successor's latents do for the behaviours whose prompts were held out."""
        if not latents or not self.s.same_tokens:
            return ()
        out = []
        for number in self.plan.chosen:
            episodes, _ = self.plan.episodes(number)
            prompts = episodes.prompts
            if not len(prompts.last):
                continue
            found = taken_back(
                self.s.parent,
                self.s.successor,
                self.crosscoder,
                prompts,
                episodes.places,
                [*([each] for each in latents), list(latents)],
                controls=CONTROLS,
                seed=self.s.seed,
            )
            shares = tuple(interval(each, len(prompts.last)) for each in found.shares)
            out.append(
                CrosscoderEffect(
                    behaviour=self.plan.behaviours[number].id,
                    latents=tuple(latents),
                    shares=shares[:-1],
                    together=shares[-1],
                    controls=tuple(map(tidy, found.controls)),
                )
            )
        return tuple(out)

    def _logits(self, latent: int, of_successor: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tokens that the latent's row in its own model raises and lowers most."""
        model = self.s.successor if of_successor else self.s.parent
        found = logit_effects(self.crosscoder, model, int(of_successor), count=TOKENS)
        if found is None:
            return (), ()
        raised, lowered = (
            tuple(model.decode([int(i)]) for i in side[latent]) for side in (found.raised, found.lowered)
        )
        return raised, lowered


@dataclass(frozen=True)
class _Text:
    """The text that a crosscoder is judged on.

    Attributes:
        contexts: as the successor reads it.
        rows: both models' values [T, …] at the crosscoder's sites, row by row the same token.
    """

    contexts: Contexts
    rows: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, s: "Setting", sites: Sequence[str], pieces: Sequence[Piece]) -> "_Text":
        """Some of ``pieces``: of the corpus, and as much of what the models wrote, where what is new shows."""
        most = max(effort(s).tokens, ROWS)
        corpus, written = ([p for p in pieces if (p.source == "corpus") == flag] for flag in (True, False))
        kept = [piece for some in (corpus, written) for piece in _first(some, most)]
        texts = [piece.parent for piece in kept], [piece.successor for piece in kept]
        rows = [
            values_at(model, side, [site])[site].flatten(1)
            for model, side, site in zip((s.parent, s.successor), texts, sites, strict=True)
        ]
        if not s.same_tokens:
            offsets = [torch.tensor([0, *(len(text.ids) for text in side)]).cumsum(0) for side in texts]
            at: list[list[Tensor]] = [[], []]
            for i, both in enumerate(zip(*texts, strict=True)):
                for k, positions in enumerate(align(*both)):
                    at[k].append(offsets[k][i] + torch.tensor(positions, dtype=torch.int64))
            rows = [values[torch.cat(where)] for values, where in zip(rows, at, strict=True)]
        return cls(Contexts(tuple(texts[1])), (rows[0], rows[1]))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The rows in batches."""
        return list(zip(*(rows.split(ROWS) for rows in self.rows), strict=True))


def _first(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    """The first of ``pieces`` with that many tokens together."""
    out: list[Piece] = []
    spent = 0
    for piece in pieces:
        if spent >= tokens:
            break
        out.append(piece)
        spent += len(piece.successor.ids)
    return out
