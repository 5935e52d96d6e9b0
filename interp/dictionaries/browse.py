"""The latents of a dictionary one by one: ``dictionary.latents[17]``, ``.search("bridge")``, ``.sort(by="q")``.

Shows what :mod:`.notes` holds, in a terminal as text and in Jupyter as HTML (:mod:`.cards`). Whatever came from a model
or a text is made visible first: a token is data, not markup.

F latents.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ..errors import DictionaryError
from ..explain.record import Explanation
from ..store import replacing
from ..visible import visible
from .exclusive.norms import delta_norm
from .notes import LatentNotes, digest, load_notes
from .record import Dictionary
from .snippets import Snippet, strongest, weaker

LISTED = 25
"""Latents in a list that is shown."""
EXAMPLES, MORE = 6, 4
"""Strongest places shown of a latent, and weaker ones."""
AROUND = 8
"""Tokens around one of a latent's strongest in which a search looks for text."""
_LOWEST_FIRST = frozenset({"number"})


@dataclass(frozen=True)
class Effect:
    """What a latent does directly to a model's logits: tokens and changes per unit of activation, largest first."""

    model: str
    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent, with what is known of it."""

    dictionary: Dictionary
    notes: LatentNotes | None
    number: int

    @property
    def explanation(self) -> Explanation | None:
        """None where it was not explained."""
        return None if self.notes is None else self.notes.explanations.get(self.number)

    @property
    def rule(self) -> str | None:
        """Where it is active, in words; None where it was not explained."""
        found = self.explanation
        return None if found is None or found.status != "measured" else found.rule

    @property
    def q(self) -> float | None:
        """How much the rule explains, 0 (chance) to 1; None where that was not measured."""
        return None if self.explanation is None else self.explanation.q

    @property
    def count(self) -> int | None:
        """Tokens it was active at."""
        return None if self.notes is None else int(self.notes.statistics.count[self.number])

    @property
    def frequency(self) -> float | None:
        """Share of tokens it was active at."""
        return None if self.notes is None else float(self.notes.statistics.frequency[self.number])

    @property
    def mean(self) -> float | None:
        """Mean activation where it was active; None where it never was."""
        return float(self.notes.statistics.mean[self.number]) if self.notes and self.count else None

    @property
    def max(self) -> float | None:
        """Largest activation; None where it never was active."""
        return float(self.notes.statistics.max[self.number]) if self.notes and self.count else None

    @property
    def delta_norm(self) -> float | None:
        """1 the successor's alone, 0 the parent's alone (:func:`.exclusive.delta_norm`); None but for a pair's."""
        if self.dictionary.kind != "crosscoder" or len(self.dictionary.W_dec) != 2:
            return None
        return float(delta_norm(self.dictionary, latents=slice(self.number, self.number + 1)))

    @property
    def histogram(self) -> tuple[tuple[float, float, int], ...]:
        """Activations by powers of two: (from, to, tokens), without empty ends; zero is the lowest end."""
        from heredity.kernels.ops.statistics.record import HIGHEST, LOWEST, N_BINS

        if self.notes is None:
            return ()
        counts = self.notes.statistics.histogram[self.number]
        filled = counts.nonzero()[:, 0].tolist()
        ends = [0.0, *(2.0**e for e in range(LOWEST, HIGHEST + 1)), float("inf")]
        assert len(ends) == N_BINS + 1
        return tuple((ends[b], ends[b + 1], int(counts[b])) for b in range(filled[0], filled[-1] + 1)) if filled else ()

    @property
    def effects(self) -> tuple[Effect, ...]:
        """Of each model that it reaches; what it leaves as it is, is left out."""
        if self.notes is None:
            return ()
        several, out = len(self.notes.models) > 1, []
        for m, effects in enumerate(self.notes.effects):
            if effects is None:
                continue
            sides = ((effects.raised, effects.raised_by), (effects.lowered, effects.lowered_by))
            raised, lowered = (self._named(ids[self.number], by[self.number]) for ids, by in sides)
            if not raised and not lowered:
                continue
            out.append(Effect(side_name(m, len(self.notes.models)) if several else "", raised, lowered))
        return tuple(out)

    def _named(self, ids: Tensor, by: Tensor) -> tuple[tuple[str, float], ...]:
        names = self.notes.names if self.notes else {}
        changes = zip(ids.tolist(), by.tolist(), strict=True)
        return tuple((names.get(i, f"<{i}>"), change) for i, change in changes if change)

    @cached_property
    def examples(self) -> tuple[Snippet, ...]:
        """Where it is most active, each in another text."""
        return strongest(self.notes, self.number, EXAMPLES) if self.notes else ()

    @cached_property
    def more_examples(self) -> tuple[Snippet, ...]:
        """Where it is less active, spread evenly over the ranks; only of latents that were explained."""
        return weaker(self.notes, self.number, MORE, self.examples) if self.notes else ()

    def __repr__(self) -> str:
        lines = [f"latent {self.number:,} of {visible(repr(self.dictionary), 200)}"]
        lines += [f"  {visible(self.rule, 400)}"] if self.rule else []
        lines += [f"  {line}" for line in measured_on(self)]
        for effect in self.effects:
            where = f" in the {effect.model}" if effect.model else ""
            for verb, tokens in (("raises", effect.raised), ("lowers", effect.lowered)):
                listed = ", ".join(f"“{visible(token, 30)}” {by:+.2f}" for token, by in tokens[:5])
                lines.append(f"  {verb}{where}: {listed}")
        for low, high, count in self.histogram:
            lines.append(f"  {f'{low:.3g} to {high:.3g}':>16}: {count:,}")
        lines += [f"  {each.activation:8.3g}  {visible(each.text, 200)}" for each in self.examples]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from .cards import card

        return card(self)

    def save(self, path: str | Path) -> None:
        """Write what Jupyter shows as one page that needs nothing else.

        Raises:
            StoreError: it cannot be written.
        """
        from .cards import card, page

        _write(path, page(f"latent {self.number}", card(self, style=False)))


class Latents:
    """Latents of a dictionary, in some order.

    ``latents[17]`` is latent number 17, whatever the order; ``latents[:10]`` are the first ten in order.
    """

    def __init__(self, dictionary: Dictionary, notes: LatentNotes | None, numbers: Sequence[int], about: str) -> None:
        self.dictionary, self.notes, self.numbers, self.about = dictionary, notes, tuple(numbers), about

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Latent]:
        return (Latent(self.dictionary, self.notes, number) for number in self.numbers)

    @overload
    def __getitem__(self, which: int) -> Latent: ...
    @overload
    def __getitem__(self, which: slice) -> "Latents": ...
    def __getitem__(self, which: int | slice) -> "Latent | Latents":
        if isinstance(which, slice):
            return self._of(self.numbers[which], self.about)
        if which not in self._known:
            raise IndexError(f"no latent {which} among {self.about}")
        return Latent(self.dictionary, self.notes, which)

    def search(self, text: str) -> "Latents":
        """Those that have to do with ``text`` (case does not matter), best first.

        First those whose rule names it, then those most often active on it where they are strongest, then those that
        raise the logit of a token that holds it, then those active within :data:`AROUND` tokens of it.

        Raises:
            DictionaryError: nothing is known of the latents.
            ValueError: no text is given.
        """
        notes = self._needed()
        if not text.strip():
            raise ValueError("search for some text")
        found = re.compile(re.escape(text.strip()), re.IGNORECASE)
        top = notes.statistics.top_tokens
        filled, rows = top >= 0, top.clamp_min(0)
        on, near = _occurrences(notes, found)
        score = torch.zeros(top.shape[0], dtype=torch.float64)
        for places, base in ((near, 1), (on, 3)):
            hits = (torch.from_numpy(places)[rows] & filled if len(places) else torch.zeros_like(filled)).sum(1)
            share = hits / filled.sum(1).clamp_min(1)
            score = torch.where(hits > 0, base + share * 0.99, score)
        tokens = [token for token, name in notes.names.items() if found.search(name)]
        for effects in notes.effects:
            if effects is not None and tokens:
                score = torch.where(torch.isin(effects.raised, torch.tensor(tokens)).any(1), score.clamp_min(2), score)
        for latent, explanation in notes.explanations.items():
            if found.search(explanation.rule):
                score[latent] += 4
        worth = score.tolist()
        hits = sorted((n for n in self.numbers if worth[n] > 0), key=lambda n: (-worth[n], n))
        return self._of(hits, f"{self.about} that have to do with “{text}”")

    def sort(self, by: str = "q", *, descending: bool | None = None) -> "Latents":
        """In another order; those without a value come last.

        Args:
            by: ``q``, ``count``, ``frequency``, ``mean``, ``max``, ``delta_norm`` or ``number``.
            descending: largest first, as is the default except for ``number``.

        Raises:
            DictionaryError: nothing is known of the latents.
            ValueError: ``by`` is none of these, or Δnorm is asked for of a dictionary that is not of a pair.
        """
        values = self._values(by).tolist()
        largest_first = by not in _LOWEST_FIRST if descending is None else descending
        known = [number for number in self.numbers if values[number] == values[number]]
        known.sort(key=lambda n: (-values[n] if largest_first else values[n], n))
        seen = set(known)
        return self._of([*known, *(n for n in self.numbers if n not in seen)], self.about)

    def __repr__(self) -> str:
        lines = [f"{len(self):,} {visible(self.about, 300)}"]
        for latent in self[:LISTED]:
            q = "  –  " if latent.q is None else f"{latent.q:5.2f}"
            often = "" if latent.frequency is None else f"{latent.frequency:9.3%}"
            where = latent.rule or (latent.examples[0].text if latent.examples else "")
            lines.append(f"{latent.number:8,}  {q} {often}  {visible(where, 120)}")
        lines += [f"… and {len(self) - LISTED:,} more"] if len(self) > LISTED else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from .cards import table

        return table(self)

    def save(self, path: str | Path) -> None:
        """Write the list and every latent in it as one page that needs nothing else; see :meth:`Latent.save`."""
        from .cards import card, page, table

        parts = [table(self, len(self), linked=True, style=False), *(card(latent, style=False) for latent in self)]
        _write(path, page(self.about, "\n".join(parts)))

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.numbers)

    def _of(self, numbers: Sequence[int], about: str) -> "Latents":
        return Latents(self.dictionary, self.notes, numbers, about)

    def _needed(self) -> LatentNotes:
        if self.notes is None:
            raise DictionaryError(
                "nothing is known of its latents",
                where=repr(self.dictionary),
                remedy="Describe it (heredity.interp.dictionaries.describe) and add the notes with with_notes.",
            )
        return self.notes

    def _values(self, by: str) -> Tensor:
        n = self.dictionary.n_latents
        if by == "number":
            return torch.arange(n, dtype=torch.float64)
        if by == "delta_norm":
            return delta_norm(self.dictionary)
        if by not in ("q", "count", "frequency", "mean", "max"):
            raise ValueError(f"sort by q, count, frequency, mean, max, delta_norm or number, not {by!r}")
        notes = self._needed()
        if by == "q":
            values = torch.full((n,), torch.nan, dtype=torch.float64)
            for latent, explanation in notes.explanations.items():
                values[latent] = torch.nan if explanation.q is None else explanation.q
            return values
        values = getattr(notes.statistics, by).double()
        return values if by in ("count", "frequency") else torch.where(notes.statistics.count > 0, values, torch.nan)


def latents(dictionary: Dictionary) -> Latents:
    """All latents of a dictionary, by number.

    Raises:
        DictionaryError: its notes cannot be read, or are on another dictionary.
    """
    notes = dictionary.notes
    if isinstance(notes, str | Path):
        notes = load_notes(notes, dictionary)
    elif notes is not None and notes.dictionary != digest(dictionary):
        raise DictionaryError(
            "the notes on its latents are on another dictionary",
            where=repr(dictionary),
            remedy="Describe the dictionary again.",
        )
    return Latents(dictionary, notes, range(dictionary.n_latents), f"latents of the {named(dictionary)}")


def overview(dictionary: Dictionary) -> str:
    """What Jupyter shows of a dictionary: what it is, what its latents are like, the best explained of them."""
    from .cards import overview as html

    return html(dictionary)


def measured_on(latent: Latent) -> tuple[str, ...]:
    """What q is, and how often the latent is active, each with what it was measured on, in words."""
    notes, found = latent.notes, latent.explanation
    if notes is None:
        return ("nothing is known of it: describe the dictionary",)
    tokens, texts = f"{len(notes.contexts):,} tokens", f"{len(notes.contexts.texts):,} texts"
    if not latent.count:
        return (f"never active at {tokens} of {texts}",)
    often = f"active at {latent.count:,} of {tokens} of {texts} ({latent.frequency:.3%}), "
    often += f"mean {latent.mean:.3g}, at most {latent.max:.3g}"
    if found is None:
        return (f"not explained ({len(notes.explanations):,} of {latent.dictionary.n_latents:,} latents are)", often)
    if found.q is None:
        return (f"not explained: too few contexts ({found.n_active:,} tokens in {found.n_texts:,} texts)", often)
    q = (
        f"q {found.q:.2f}: balanced accuracy {found.balanced_accuracy:.3f}, at least {found.low:.3f} (95 %), "
        f"{found.null:.3f} with shuffled labels; learned on one half of {texts}, measured on the other"
    )
    return q, often


def named(dictionary: Dictionary) -> str:
    """What it is and where, in words."""
    kind = "SAE" if dictionary.kind == "sae" else dictionary.kind.replace("_", " ")
    return f"{kind} of {', '.join(dict.fromkeys(p.site for p in (*dictionary.reads, *dictionary.writes)))}"


def side_name(model: int, of: int) -> str:
    """What a model of several is called."""
    return ("parent", "successor")[model] if of == 2 else f"model {model}"


def _occurrences(notes: LatentNotes, found: re.Pattern[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are part of what is looked for, and those within AROUND tokens of one: bool [T] each."""
    contexts = notes.contexts
    on, near = (np.zeros(len(contexts), dtype=bool) for _ in range(2))
    for text, start in zip(contexts.texts, contexts.starts.tolist(), strict=False):
        hits = [match.span() for match in found.finditer(text.text)]
        if not hits:
            continue
        spans = np.array(text.spans).reshape(-1, 2)
        for a, b in hits:
            at = start + np.flatnonzero((spans[:, 0] < b) & (spans[:, 1] > a))
            on[at] = True
            if len(at):
                near[max(start, int(at[0]) - AROUND) : min(start + len(spans), int(at[-1]) + AROUND + 1)] = True
    return on, near


def _write(path: str | Path, html: str) -> None:
    with replacing(Path(path)) as partial:
        partial.write_text(html, encoding="utf-8")
