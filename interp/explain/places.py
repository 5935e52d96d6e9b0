"""Where a token stands in its text: in which line, inside which brackets or quotes, in whose turn of a chat.

Found from the characters alone, from left to right as a causal model sees them: a bracket counts as open until it is
closed, or until the next blank line if it never is.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..model import Encoded

Enclosure = Literal["round brackets", "square brackets", "curly brackets", "double quotes", "backticks"]
Line = Literal["a list item", "a heading", "an indented line"]
Speaker = Literal["template", "system", "user", "assistant"]
ENCLOSURES: tuple[Enclosure, ...] = get_args(Enclosure)
LINES: tuple[Line, ...] = get_args(Line)
ROLES: tuple[Speaker, ...] = get_args(Speaker)

_OPEN = {"(": 0, "[": 1, "{": 2, "“": 3}
_CLOSE = {")": 0, "]": 1, "}": 2, "”": 3}
_TOGGLE = {'"': 3, "`": 4}
_MARK = re.compile(r"\n[^\S\n]*\n|[()\[\]{}“”\"`]")
_LIST = re.compile(r"[^\S\n]*(?:[-*+•]|\d{1,3}[.)]|[a-z][.)])[^\S\n]")
_HEADING = re.compile(r"#{1,6}[^\S\n]")

# The markers of the chat templates in use: ChatML, Llama 3, Gemma, Zephyr and Phi, Mistral.
_TURN = re.compile(
    r"<\|im_start\|>(?P<chatml>\w+)\n?|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>(?:\n\n)?"
    r"|<start_of_turn>(?P<gemma>\w+)\n?|<\|(?P<phi>system|user|assistant)\|>\n?|(?P<inst>\[INST\])|(?P<told>\[/INST\])"
    r"|(?P<end><\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|endoftext\|>|<\|begin_of_text\|>|<bos>|<eos>|</?s>)"
)
_SPEAKERS = {"system": 1, "developer": 1, "user": 2, "human": 2, "assistant": 3, "model": 3}


@dataclass(frozen=True, eq=False)
class Places:
    """Of T tokens, by the first character each has that is not whitespace.

    Attributes:
        enclosed: bool [ENCLOSURES, T]; the closing mark is not inside, nor the opening one.
        line: int64 [T], row of the first token of its line.
        line_kind: bool [LINES, T].
        after_colon: bool [T], a colon stands earlier in its line.
        role: int8 [T], index into ROLES, -1 outside any turn.
    """

    enclosed: np.ndarray
    line: np.ndarray
    line_kind: np.ndarray
    after_colon: np.ndarray
    role: np.ndarray


def places(texts: Sequence[Encoded]) -> Places:
    """The places of all tokens of ``texts``, in order."""
    parts, start = [], 0
    for text in texts:
        parts.append(_of_text(text, start))
        start += len(text.ids)
    parts.append(_of_text(Encoded("", (), ()), start))
    return Places(
        enclosed=np.concatenate([part.enclosed for part in parts], axis=1),
        line=np.concatenate([part.line for part in parts]),
        line_kind=np.concatenate([part.line_kind for part in parts], axis=1),
        after_colon=np.concatenate([part.after_colon for part in parts]),
        role=np.concatenate([part.role for part in parts]),
    )


def _of_text(encoded: Encoded, start: int) -> Places:
    text = encoded.text
    # Where the visible part of each token begins; a token of whitespace alone stands where it starts.
    at = np.array([b - len(text[a:b].lstrip()) if text[a:b].strip() else a for a, b in encoded.spans], dtype=np.int64)
    at = np.maximum.accumulate(at)  # a special token added at the end has the span (0, 0)
    breaks = np.array([0, *(found.end() for found in re.finditer("\n", text))], dtype=np.int64)
    line = np.searchsorted(breaks, at, side="right") - 1
    kinds = np.array([[_is(k, text, int(b)) for b in breaks] for k in range(len(LINES))]).reshape(len(LINES), -1)
    # Of several tokens in one line the first; spans ascend, so lines do.
    first = start + np.searchsorted(line, line, side="left")
    colon = np.array([text.find(":", int(b)) for b in breaks], dtype=np.int64)[line]
    return Places(
        enclosed=_enclosed(text, at),
        line=first.astype(np.int64),
        line_kind=kinds[:, line],
        after_colon=(colon >= 0) & (colon < at),
        role=_stepwise(list(_turns(text)), at, -1).astype(np.int8),
    )


def _is(kind: int, text: str, at: int) -> bool:
    if kind == 0:
        return _LIST.match(text, at) is not None
    if kind == 1:
        return _HEADING.match(text, at) is not None
    return text[at : at + 1] in (" ", "\t") and text[at : at + 200].lstrip(" \t")[:1] not in ("", "\n")


def _enclosed(text: str, at: np.ndarray) -> np.ndarray:
    depth = [0] * len(ENCLOSURES)
    steps: list[list[tuple[int, int]]] = [[] for _ in ENCLOSURES]
    for found in _MARK.finditer(text):
        mark = found.group()
        if mark[0] == "\n":
            for kind, level in enumerate(depth):
                if level:
                    depth[kind] = 0
                    steps[kind].append((found.start(), 0))
            continue
        kind = _OPEN.get(mark, _CLOSE.get(mark, _TOGGLE.get(mark, 0)))
        opens = mark in _OPEN or (mark in _TOGGLE and depth[kind] == 0)
        depth[kind] = depth[kind] + 1 if opens else max(0, depth[kind] - 1)
        # A closing mark is outside from its own character on, an opening one inside from the next.
        steps[kind].append((found.start() + opens, depth[kind]))
    return np.stack([_stepwise(steps[kind], at, 0) > 0 for kind in range(len(ENCLOSURES))])


def _turns(text: str) -> Iterator[tuple[int, int]]:
    """Characters at which another role begins, and which."""
    for found in _TURN.finditer(text):
        kind = found.lastgroup
        yield found.start(), 0
        speaker = {"inst": 2, "told": 3, "end": -1}.get(kind or "")
        yield found.end(), _SPEAKERS.get(found.group(kind), -1) if kind and speaker is None else int(speaker or 0)


def _stepwise(steps: list[tuple[int, int]], at: np.ndarray, begin: int) -> np.ndarray:
    """Value at each character of ``at`` of a function that is ``begin`` and changes at ``steps``."""
    values = np.array([begin, *(value for _, value in steps)], dtype=np.int64)
    return values[np.searchsorted(np.array([where for where, _ in steps], dtype=np.int64), at, side="right")]
