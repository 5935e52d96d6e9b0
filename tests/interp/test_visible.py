"""What is shown of text that hides something."""

import pytest

from heredity.interp.visible import pieces, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ümläut 漢字", "plain ümläut 漢字"),
        ("a\nb\tc", "a↵b⇥c"),
        ("\x1b[1m", "⟨ESC⟩[1m"),
        ("\u202ex", "⟨U+202E⟩x"),
        ("\x9b", "⟨U+009B⟩"),
        ("a\u00a0b", "a⟨U+00A0⟩b"),
        ("\ud800", "⟨U+D800⟩"),
        ("e\u0301", "e\u0301"),
        ("x" * 12, "xxxxxxxxxx… (cut: 2 more characters)"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text, 10 if text.startswith("xx") else 100) == shown


def test_visible_stops_stacked_marks() -> None:
    assert visible("z" + "\u0301" * 5) == "z" + "\u0301" * 3 + "⟨U+0301⟩" * 2


def test_pieces_say_what_stands_for_something_else() -> None:
    assert list(pieces("a\x1b b", 10)) == [("a", False), ("⟨ESC⟩", True), (" b", False)]
