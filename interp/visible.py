"""Text that an untrusted model wrote, made fit to be shown: nothing in it is hidden, nothing in it acts.

Control characters (ANSI escapes among them), bidirectional overrides and other invisible characters become visible
stand-ins; what is too long is cut with a notice. Escaping for the medium (HTML, Markdown, Plotly) comes on top.
"""

import unicodedata
from collections.abc import Iterator

_NAMED = {"\n": "↵", "\t": "⇥", "\x7f": "⟨DEL⟩"}
# Names in letters: few fonts have the pictures that Unicode gives to control characters.
_CONTROLS = (
    "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
).split()
_MARKS_IN_A_ROW = 3  # more combining marks than any script needs can paint over the lines above and below


def visible(text: str, limit: int = 2_000) -> str:
    """``text`` as one line of printable characters, cut to ``limit`` characters of the original with a notice."""
    return "".join(part for part, _ in pieces(text, limit))


def pieces(text: str, limit: int = 2_000) -> Iterator[tuple[str, bool]]:
    """Runs of ``text`` as ``(shown, stand_in)``: whether a run stands for what cannot be shown as it is."""
    plain: list[str] = []
    marks = 0
    for char in text[:limit]:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if char == " " or (char.isprintable() and marks <= _MARKS_IN_A_ROW):
            plain.append(char)
            continue
        if plain:
            yield "".join(plain), False
            plain = []
        yield _stand_in(char), True
    if plain:
        yield "".join(plain), False
    if len(text) > limit:
        yield f"… (cut: {len(text) - limit:,} more characters)", True


def _stand_in(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    code = ord(char)
    return f"⟨{_CONTROLS[code]}⟩" if code < len(_CONTROLS) else f"⟨U+{code:04X}⟩"
