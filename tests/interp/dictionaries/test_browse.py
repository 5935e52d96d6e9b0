"""Latents to look at: what is shown is what is known, and text from a model stays text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from heredity.interp.dictionaries import with_notes
from heredity.interp.dictionaries.browse import Latents
from heredity.interp.dictionaries.exclusive import delta_norm
from heredity.interp.dictionaries.record import Dictionary
from heredity.interp.dictionaries.snippets import snippet
from heredity.interp.errors import DictionaryError
from heredity.interp.explain import Contexts
from heredity.interp.model import Encoded


@pytest.fixture(scope="module")
def noted(known) -> Dictionary:
    return with_notes(known.bare, known.notes)


@pytest.fixture(scope="module")
def pair(known) -> Dictionary:
    return with_notes(known.pair, known.pair_notes)


class Tags(HTMLParser):
    """Which elements a page has, with what attributes, and the text in those that are marked."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()
        self.marked: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == [], "elements are closed in the order they were opened"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "line", "rect") or tag == "rect":
            self.open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "mark" in self.open:
            self.marked[-1] += data


def shown(dictionary: Dictionary) -> list[str]:
    every = dictionary.latents
    pages = [dictionary._repr_html_(), every._repr_html_(), every.search("script")._repr_html_()]
    return [*pages, *(latent._repr_html_() for latent in every)]


def test_nothing_in_a_text_or_a_token_acts(noted: Dictionary, pair: Dictionary) -> None:
    for dictionary in (noted, pair):
        pages = shown(dictionary)
        assert any("&lt;script&gt;" in page for page in pages)
        assert any("&lt;img src=x" in page for page in pages)
        for page in pages:
            found = Tags(page)
            assert not {"script", "img", "iframe", "link"} & set(found.names)
            assert not [name for name in found.attributes if name.startswith("on")]
            assert "\x1b" not in page
        assert any("⟨ESC⟩" in page for page in pages)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", "".join(map(repr, [*dictionary.latents, dictionary.latents])))


def test_nothing_is_loaded_from_elsewhere(noted: Dictionary, tmp_path: Path) -> None:
    noted.latents[0].save(tmp_path / "latent.html")
    noted.latents.save(tmp_path / "latents.html")
    for path in tmp_path.iterdir():
        page = path.read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert "default-src 'none'" in page
        assert not re.search(r"https?:|src=|url\(|@import", page.replace("&lt;img src=x", ""))
        assert page.count("<style>") == 1


def test_a_page_of_several_latents_links_to_each(noted: Dictionary, tmp_path: Path) -> None:
    noted.latents[:3].save(tmp_path / "latents.html")
    page = (tmp_path / "latents.html").read_text(encoding="utf-8")
    for number in range(3):
        assert f"href='#latent-{number}'" in page
        assert f"id='latent-{number}'" in page
    assert "id='latent-3'" not in page


def test_the_token_it_is_active_on_is_marked(known, noted: Dictionary) -> None:
    contexts = known.notes.contexts
    for latent, token in ((known.on_bridge, "bridge"), (known.on_script, known.script), (known.unexplained, "king")):
        page = Tags(noted.latents[latent]._repr_html_())
        assert len(page.marked) >= 6
        assert set(page.marked) == {token}
    for example in noted.latents[known.after_old].examples:
        row = example.row
        assert contexts.names[int(contexts.ids[row - 1])] == "old"
        assert example.token == contexts.texts[contexts.text[row]].text[slice(*_span(contexts, row))]


def _span(contexts: Contexts, row: int) -> tuple[int, int]:
    return contexts.texts[int(contexts.text[row])].spans[int(contexts.position[row])]


def test_examples_are_the_strongest_of_different_texts(known, noted: Dictionary) -> None:
    values = known.notes.features.to_dense()[:, known.on_bridge]
    text = torch.from_numpy(known.notes.contexts.text)
    best = torch.stack([values[text == t].max() for t in range(int(text.max()) + 1)]).sort(descending=True).values
    latent = noted.latents[known.on_bridge]
    assert [e.activation for e in latent.examples] == pytest.approx(best[:6].tolist())
    weaker = [e.activation for e in latent.more_examples]
    assert weaker == sorted(weaker, reverse=True)
    assert len(weaker) == 4
    assert set(weaker) <= set(best[6:].tolist())
    on = best[best > 0]
    # At even distances: the weakest shown is in the last quarter of those left.
    assert weaker[-1] <= float(on[6 + (len(on) - 6) * 3 // 4])
    assert noted.latents[known.unexplained].more_examples == ()


def test_every_character_of_the_text_around_stands_once() -> None:
    # Bytes of one character are two tokens with its span; the first token was added.
    text = "a ☃ b"
    contexts = Contexts((Encoded(text, (9, 1, 2, 3, 4), ((0, 0), (0, 1), (2, 3), (2, 3), (4, 5))),))
    assert [snippet(contexts, row, {row: 1.0}).text for row in range(5)] == [
        "»<9>«a ☃ b", "»a« ☃ b", "a »☃« b", "a »☃« b", "a ☃ »b«",
    ]  # fmt: skip
    both = snippet(contexts, 1, {1: 1.0, 2: 0.25, 3: 0.5})
    assert [(part.text, part.activation) for part in both.parts] == [("a", 1.0), (" ", 0.0), ("☃", 0.25), (" b", 0.0)]
    assert both.begins
    assert both.ends


def test_what_q_was_measured_on_is_said(known, noted: Dictionary) -> None:
    found = known.notes.explanations[known.on_bridge]
    for shown in (repr(noted.latents[known.on_bridge]), noted.latents[known.on_bridge]._repr_html_()):
        assert f"q {found.q:.2f}" in shown
        assert f"balanced accuracy {found.balanced_accuracy:.3f}, at least {found.low:.3f} (95 %)" in shown
        assert "learned on one half of 240 texts, measured on the other" in shown
        assert f"active at {found.n_active:,} of {len(known.notes.contexts):,} tokens of 240 texts" in shown
    assert "“bridge”" in repr(noted.latents[known.on_bridge])


def test_what_was_not_measured_is_said_too(known, noted: Dictionary) -> None:
    assert "not explained (4 of 6 latents are)" in repr(noted.latents[known.unexplained])
    assert "never active" in repr(noted.latents[known.never])
    assert noted.latents[known.never].q is None
    assert noted.latents[known.never].mean is None
    assert noted.latents[known.unexplained].q is None
    assert "describe" in repr(known.bare.latents[0])
    for latent in (noted.latents[known.never], known.bare.latents[0]):
        assert latent.examples == latent.histogram == ()
        Tags(latent._repr_html_())


def test_activations_are_counted(known, noted: Dictionary) -> None:
    values = known.notes.features.to_dense()[:, known.on_bridge]
    bars = noted.latents[known.on_bridge].histogram
    assert bars == ((1.0, 2.0, int((values > 0).sum())),)
    everywhere = noted.latents[known.everywhere].histogram
    assert [bar[:2] for bar in everywhere] == [(4.0, 8.0)]
    assert "1 to 2" in repr(noted.latents[known.on_bridge])


def test_effects_on_logits(known, noted: Dictionary, pair: Dictionary) -> None:
    (effect,) = noted.latents[known.unexplained].effects
    assert effect.raised == ((known.script, 2.0), ("garden", 1.0))
    assert effect.lowered == (("garden", -2.0), (known.script, -1.0))
    assert effect.model == ""
    assert [each.model for each in pair.latents[0].effects] == ["parent"]
    assert "Raises the logits in the parent of" in pair.latents[0]._repr_html_()


def test_search(known, noted: Dictionary) -> None:
    every = noted.latents
    # Its rule names it; then what is strongest on it by chance; AFTER_OLD is active near bridges at most.
    assert every.search("Bridge").numbers[0] == known.on_bridge
    assert every.search("king").numbers[0] == known.unexplained, "active on it, though not explained"
    script = every.search("<script>").numbers
    assert script[0] == known.on_script
    assert known.unexplained in script, "raises it"
    # By what a latent raises: all but one raise “river”.
    assert set(every.search("river").numbers) >= {0, 1, 2, 3, 4}
    assert len(every.search("zebra")) == 0
    assert "none" in every.search("zebra")._repr_html_()
    assert "that have to do with “king”" in repr(every.search("king"))
    with pytest.raises(ValueError, match="some text"):
        every.search("  ")
    with pytest.raises(DictionaryError, match="nothing is known"):
        known.bare.latents.search("king")


def test_a_search_finds_what_is_several_tokens(known, noted: Dictionary) -> None:
    text = known.notes.contexts.texts[known.notes.contexts.text[noted.latents[known.on_bridge].examples[0].row]].text
    phrase = re.search(r"\S+ bridge|bridge \S+", text)
    assert phrase
    assert known.on_bridge in noted.latents.search(phrase[0]).numbers


def test_a_search_stays_within_what_is_listed(known, noted: Dictionary) -> None:
    assert noted.latents[1:].search("bridge").numbers == tuple(
        n for n in noted.latents.search("bridge").numbers if n != known.on_bridge
    )


@pytest.mark.parametrize("by", ["q", "count", "frequency", "mean", "max"])
@pytest.mark.parametrize("descending", [None, True, False])
def test_sort(noted: Dictionary, by: str, descending: bool | None) -> None:
    found = noted.latents.sort(by=by, descending=descending)
    values = [getattr(latent, by) for latent in found]
    known_values = [v for v in values if v is not None]
    assert known_values == sorted(known_values, reverse=descending is not False)
    assert None not in values[: len(known_values)], "those without a value come last"
    assert sorted(found.numbers) == list(range(6))


def test_sort_by_number_and_by_the_pair(noted: Dictionary, pair: Dictionary) -> None:
    assert noted.latents.sort("max").sort("number").numbers == (0, 1, 2, 3, 4, 5)
    found = pair.latents.sort("delta_norm")
    deltas = delta_norm(pair)
    assert [latent.delta_norm for latent in found] == pytest.approx(sorted(deltas.tolist(), reverse=True))
    assert f"{float(deltas[3]):.2f}" in pair.latents[3]._repr_html_()
    assert noted.latents[0].delta_norm is None
    with pytest.raises(ValueError, match="parent and a successor"):
        noted.latents.sort("delta_norm")
    with pytest.raises(ValueError, match="not 'size'"):
        noted.latents.sort("size")


def test_a_number_is_a_latent_and_a_slice_a_part_of_the_list(noted: Dictionary) -> None:
    found = noted.latents.sort("max")
    assert found[2].number == 2
    assert isinstance(found[:2], Latents)
    assert found[:2].numbers == found.numbers[:2]
    assert [latent.number for latent in found] == list(found.numbers)
    with pytest.raises(IndexError, match="no latent 6"):
        _ = found[6]
    with pytest.raises(IndexError, match="no latent -1"):
        _ = found[-1]
    with pytest.raises(IndexError):
        _ = found[:2][found.numbers[3]]


def test_long_lists_are_cut_with_a_notice(known) -> None:
    many = replace(
        known.bare,
        W_enc=(torch.zeros(8, 500),),
        b_enc=torch.zeros(500),
        W_dec=(torch.zeros(500, 8),),
    )
    assert "475 more" in repr(many.latents)
    assert "475 more" in many.latents._repr_html_()


def test_the_overview_says_what_the_dictionary_is(known, noted: Dictionary, pair: Dictionary) -> None:
    page = noted._repr_html_()
    for part in ("SAE of resid_post@1", f"{known.notes.statistics.n_tokens:,}", "Explained latents by q"):
        assert part in page
    Tags(page)
    assert "Crosscoder of resid_post@1" in pair._repr_html_()
    assert "Nothing is known" in known.bare._repr_html_()


def test_the_overview_survives_notes_that_cannot_be_read(known, tmp_path: Path) -> None:
    page = with_notes(known.bare, tmp_path / "<b>absent")._repr_html_()
    assert "no readable notes" in page
    assert "&lt;b&gt;absent" in page
    assert "SAE of resid_post@1" in page
