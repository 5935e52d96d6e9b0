"""Candidate rules for some sampled tokens, each family's best, found from sums over token ids rather than by trial.

The gain of a rule is the weight of active tokens it holds at minus that of inactive ones (Youden's J: twice the
balanced accuracy minus 1). For a family of sets, such as "this token is one of …", the best set is read off one
``bincount``: the members whose own gain is worth their cost.
"""

from collections.abc import Callable, Iterator, Sequence
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
_LOOK_BACK = 24
_FEW_ITEMS = 6
_FEW_SEQUENCES = 8


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
    """A value of each token out of many: codes int64 [T] below ``size`` (0: none), and rules for sets of values.

    A set has at most ``most`` values of ``length`` tokens each; ``negatable`` where "none of these" is worth trying.
    """

    codes: np.ndarray
    size: int
    rule: Callable[[Sequence[int]], Rule]
    most: int = MOST_ITEMS
    length: int = 1
    negatable: bool = False


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

        return _Column(codes[:-1].astype(np.int64), len(known), rule, negatable=True)

    def _grams(self, n: int) -> _Column:
        columns = np.stack([self.contexts.shifted(offset) for offset in range(1 - n, 1)])
        whole = self.contexts.position >= n - 1
        known, codes = np.unique(columns[:, whole], axis=1, return_inverse=True)
        every = np.zeros(len(whole), dtype=np.int64)
        every[whole] = codes.reshape(-1) + 1

        def rule(chosen: Sequence[int]) -> Rule:
            grams = tuple(tuple(known[:, code - 1].tolist()) for code in chosen)
            return Ngram(grams=grams, names=tuple(tuple(self.contexts.names[i] for i in gram) for gram in grams))

        return _Column(every, known.shape[1] + 1, rule, most=_FEW_SEQUENCES, length=n)

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

                made.append(_Column(code[form], len(texts), rule, _FEW_ITEMS))
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
                rule, held = column.rule(chosen), _among(codes, chosen, column.size)
                cost = RULE_COST + ITEM_COST * column.length * len(chosen)
                if sign < 0:
                    rule, held, cost = Not(rule=rule), ~held, cost + RULE_COST / 2
                made.append(_candidate(rule, held, sample, cost))
        return made

    def _from_flags(self, sample: Sample) -> list[Candidate]:
        rules, masks = self.flags
        held, whole = masks[:, sample.rows], float(sample.weights.sum())
        made = []
        for rule, mask, gain in zip(rules, held, (held @ sample.weights).tolist(), strict=True):
            made.append(Candidate(rule, mask, gain, RULE_COST))
            made.append(Candidate(Not(rule=rule), ~mask, whole - gain, RULE_COST * 1.5))
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
        made: list[Candidate] = []
        tokens = self.columns[0]
        for within, at, rows in self._earlier(sample.rows):
            codes = tokens.codes[rows]
            gains = np.bincount(codes, sample.weights[at], tokens.size)
            chosen = _worth(gains, codes, sample.where(at), 1, _FEW_ITEMS, least=RULE_COST)
            held, best = np.zeros(len(sample.rows), dtype=bool), None
            for count, code in enumerate(chosen, 1):
                held = held.copy()
                held[at[codes == code]] = True
                words = tokens.rule(chosen[:count])
                assert isinstance(words, TokenIn)
                rule = Recent(within=within, ids=words.ids, names=words.names)
                longer = _candidate(rule, held, sample, RULE_COST + ITEM_COST * count)
                if best is not None and longer.net <= best.net:
                    break
                best = longer
            made += [best] if best else []
        return made

    def _earlier(self, rows: np.ndarray) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
        """For each window: which of ``rows`` looks back, and the row it sees; every id once, at its last occurrence."""
        contexts = self.contexts
        begin = np.stack([contexts.starts[contexts.text[rows]], contexts.places.line[rows]])
        ats, tos, in_lines = [], [], []
        for back in range(1, _LOOK_BACK + 1):
            to = rows - back
            at = np.flatnonzero(to >= begin[0])
            at = at[contexts.later_same[to[at]] >= rows[at]]
            ats.append(at)
            tos.append(to[at])
            in_lines.append(to[at] >= begin[1, at])
            if back in WINDOWS:
                yield back, np.concatenate(ats), np.concatenate(tos)
        in_line = np.concatenate(in_lines)
        yield None, np.concatenate(ats)[in_line], np.concatenate(tos)[in_line]


def _candidate(rule: Rule, mask: np.ndarray, sample: Sample, cost: float) -> Candidate:
    return Candidate(rule, mask, float(sample.weights[mask].sum()), cost)


def _worth(
    gains: np.ndarray, codes: np.ndarray, sample: Sample, sign: int, most: int, least: float = ITEM_COST
) -> list[int]:
    """Values whose gain is worth their cost and that are not the accident of one text; the best first."""
    likely = np.flatnonzero(gains > least)
    if not len(likely):
        return []
    counts = (sign * sample.weights > 0) & _among(codes, likely, len(gains))
    counted, texts = codes[counts], sample.texts[counts]
    one = np.zeros(len(gains), dtype=np.int64)
    one[counted] = texts
    several = np.bincount(counted, one[counted] != texts, len(gains)) > 0
    likely = likely[several[likely]]
    return likely[np.argsort(-gains[likely], kind="stable")][:most].tolist()


def _among(codes: np.ndarray, chosen: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """Whether each of ``codes``, below ``size``, is one of ``chosen``."""
    table = np.zeros(size, dtype=bool)
    table[chosen] = True
    return table[codes]
