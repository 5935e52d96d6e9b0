"""Candidate rules for some sampled tokens, each family's best, found from sums over token ids rather than by trial.

The gain of a rule is the weight of active tokens it holds at minus that of inactive ones (Youden's J: twice the
balanced accuracy minus 1). For a family of sets, such as "this token is one of …", the best set is read off one
``bincount``: the members whose own gain is worth their cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .contexts import OUTSIDE, Contexts
from .places import ENCLOSURES, LINES, ROLES
from .rules import Affix, Inside, Ngram, Not, Position, Promoted, Recent, Repeat, Role, Rule, Shape, TokenIn
from .shapes import AFFIX_LENGTHS, SHAPES, affix

RULE_COST = 0.01
ITEM_COST = 0.002
MOST_ITEMS = 32
WINDOWS = (4, 16)
_LOOK_BACK = 32
_FEW_ITEMS = 6


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens to learn from: rows [n], signed weights [n] (positive where active), and the text of each [n]."""

    rows: np.ndarray
    weights: np.ndarray
    texts: np.ndarray

    def where(self, mask: np.ndarray) -> "Sample":
        """Those tokens of the sample where ``mask`` [n] is true."""
        return Sample(self.rows[mask], self.weights[mask], self.texts[mask])


@dataclass(frozen=True, eq=False)
class Candidate:
    """A rule, where it holds among the sampled tokens (bool [n]), its gain there and what its length costs."""

    rule: Rule
    mask: np.ndarray
    gain: float
    cost: float

    @property
    def net(self) -> float:
        """Gain less cost."""
        return self.gain - self.cost


@dataclass(frozen=True, eq=False)
class _Column:
    """A value of each token out of many: codes int64 [T] (0: none), and rules for sets of values."""

    codes: np.ndarray
    size: int
    rule: Callable[[Sequence[int]], Rule]
    most: int
    negatable: bool


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Everything that candidates are made from, computed once per texts."""

    contexts: Contexts

    @cached_property
    def flags(self) -> tuple[tuple[Rule, ...], np.ndarray]:
        """Rules without parameters that hold at some tokens and not at all, and where they hold: bool [rules, T]."""
        rules: list[Rule] = [Shape(shape=name) for name in SHAPES]
        rules += [Inside(place=place) for place in (*ENCLOSURES, *LINES, "after a colon", "a line's first token")]
        rules += [Role(role=role) for role in ROLES]
        rules += [Repeat(what=what) for what in ("seen", "induced", "next seen", "next induced")]
        held = [(rule, rule.holds(self.contexts)) for rule in rules]
        held = [(rule, holds) for rule, holds in held if 0 < np.count_nonzero(holds) < len(holds)]
        masks = np.array([holds for _, holds in held], dtype=bool).reshape(len(held), len(self.contexts))
        return tuple(rule for rule, _ in held), masks

    @cached_property
    def columns(self) -> tuple[_Column, ...]:
        """Tokens at offsets, sequences, beginnings and endings."""
        made = [self._tokens(offset) for offset in (0, -1, -2, 1)]
        return (*made, *(self._grams(n) for n in (2, 3)), *self._affixes())

    def _tokens(self, offset: int) -> _Column:
        known, codes = np.unique(np.append(self.contexts.shifted(offset), OUTSIDE), return_inverse=True)

        def rule(chosen: Sequence[int]) -> Rule:
            ids = tuple(int(known[code]) for code in chosen)
            return TokenIn(offset=offset, ids=ids, names=tuple(self.contexts.names[i] for i in ids))

        return _Column(codes[:-1].astype(np.int64), len(known), rule, MOST_ITEMS, True)

    def _grams(self, n: int) -> _Column:
        columns = np.stack([self.contexts.shifted(offset) for offset in range(1 - n, 1)])
        whole = self.contexts.position >= n - 1
        known, codes = np.unique(columns[:, whole], axis=1, return_inverse=True)
        every = np.zeros(len(whole), dtype=np.int64)
        every[whole] = codes.reshape(-1) + 1

        def rule(chosen: Sequence[int]) -> Rule:
            grams = tuple(tuple(known[:, code - 1].tolist()) for code in chosen)
            return Ngram(grams=grams, names=tuple(tuple(self.contexts.names[i] for i in gram) for gram in grams))

        return _Column(every, known.shape[1] + 1, rule, MOST_ITEMS, False)

    def _affixes(self) -> list[_Column]:
        known, form = self.contexts.forms
        made = []
        for end in ("starts", "ends"):
            for length in AFFIX_LENGTHS:
                found = [affix(string, end, length) for string in known]
                texts = sorted({"", *found})
                code = np.array([texts.index(text) for text in found], dtype=np.int64)

                def rule(chosen: Sequence[int], end: str = end, texts: list[str] = texts) -> Rule:
                    return Affix(end="starts" if end == "starts" else "ends", texts=tuple(texts[i] for i in chosen))

                made.append(_Column(code[form], len(texts), rule, _FEW_ITEMS, False))
        return made

    def candidates(self, sample: Sample, promoted: Promoted | None, *, refining: bool) -> list[Candidate]:
        """The best rule of every family on ``sample``, in a fixed order.

        Args:
            sample: the tokens.
            promoted: a further rule to consider.
            refining: whether the sample is where some rule holds: then rules that say where not are considered too.
        """
        made = [*self._from_columns(sample, refining), *self._from_flags(sample), *self._from_position(sample)]
        made += self._from_recent(sample)
        if promoted:
            made.append(_candidate(promoted, promoted.holds(self.contexts)[sample.rows], sample, RULE_COST))
        return made

    def _from_columns(self, sample: Sample, refining: bool) -> list[Candidate]:
        made = []
        for column in self.columns:
            codes = column.codes[sample.rows]
            gains = np.bincount(codes, sample.weights, column.size)
            gains[0] = 0.0
            for sign in (1, -1) if refining and column.negatable else (1,):
                chosen = _worth(sign * gains, codes, sample, sign, column.most)
                if not chosen:
                    continue
                rule, held = column.rule(chosen), np.isin(codes, chosen)
                cost = RULE_COST + ITEM_COST * len(chosen)
                if sign < 0:
                    rule, held, cost = Not(rule=rule), ~held, cost + RULE_COST / 2
                made.append(_candidate(rule, held, sample, cost))
        return made

    def _from_flags(self, sample: Sample) -> list[Candidate]:
        rules, masks = self.flags
        held = masks[:, sample.rows]
        made = []
        for rule, mask in zip(rules, held, strict=True):
            made.append(_candidate(rule, mask, sample, RULE_COST))
            made.append(_candidate(Not(rule=rule), ~mask, sample, RULE_COST * 1.5))
        return made

    def _from_position(self, sample: Sample) -> list[Candidate]:
        position = self.contexts.position[sample.rows]
        gains = np.bincount(position, sample.weights)
        # The interval of largest sum: the largest difference of two running sums.
        sums = np.concatenate([[0.0], np.cumsum(gains)])
        lowest = np.minimum.accumulate(sums)
        end = int(np.argmax(sums[1:] - lowest[:-1]))
        first = int(np.argmin(sums[: end + 1]))
        open_ended = end >= int(np.quantile(position, 0.99))
        rule = Position(first=first, last=None if open_ended else end)
        held = (position >= first) & (open_ended | (position <= end))
        return [_candidate(rule, held, sample, RULE_COST + ITEM_COST * (first > 0 and not open_ended))]

    def _from_recent(self, sample: Sample) -> list[Candidate]:
        contexts, made = self.contexts, []
        back = sample.rows[:, None] - np.arange(1, _LOOK_BACK + 1)
        inside = back >= contexts.starts[contexts.text[sample.rows]][:, None]
        back = np.maximum(back, 0)
        # Each earlier token counts once, at its last occurrence.
        inside &= contexts.later_same[back] >= sample.rows[:, None]
        in_line = inside & (back >= contexts.places.line[sample.rows][:, None])
        views = [(window, inside[:, :window]) for window in WINDOWS]
        for within, seen in [*views, (None, in_line)]:
            ids = contexts.ids[back[:, : seen.shape[1]]]
            at, _ = np.nonzero(seen)
            found = ids[seen]
            if not len(found):
                continue
            known, codes = np.unique(found, return_inverse=True)
            gains = np.bincount(codes, sample.weights[at], len(known))
            chosen = _worth(gains, codes, sample.where(at), 1, _FEW_ITEMS, least=ITEM_COST * 5)
            best: Candidate | None = None
            held = np.zeros(len(sample.rows), dtype=bool)
            for count, code in enumerate(chosen, 1):
                more = held.copy()
                more[at[codes == code]] = True
                rule_ids = tuple(int(known[c]) for c in chosen[:count])
                names = tuple(contexts.names[i] for i in rule_ids)
                rule = Recent(within=within, ids=rule_ids, names=names)
                made_now = _candidate(rule, more, sample, RULE_COST + ITEM_COST * count)
                if best is not None and made_now.net <= best.net:
                    break
                best, held = made_now, more
            made += [best] if best else []
        return made


def _candidate(rule: Rule, mask: np.ndarray, sample: Sample, cost: float) -> Candidate:
    return Candidate(rule, mask, float(sample.weights[mask].sum()), cost)


def _worth(
    gains: np.ndarray, codes: np.ndarray, sample: Sample, sign: int, most: int, least: float = ITEM_COST
) -> list[int]:
    """Values whose gain is worth their cost and that are not the accident of one text; the best first."""
    likely = np.flatnonzero(gains > least)
    if not len(likely):
        return []
    counts = (sign * sample.weights > 0) & np.isin(codes, likely)
    pairs = np.unique(np.stack([codes[counts], sample.texts[counts]]), axis=1)
    support = np.bincount(pairs[0], minlength=len(gains))
    likely = likely[support[likely] >= 2]
    return likely[np.argsort(-gains[likely], kind="stable")][:most].tolist()
