"""The figure of a circuit: what shows at each step of its filters, what hovering tells, and text that is only text."""

from dataclasses import replace
from typing import Any

import pytest

from heredity.circuits.circuit_views import circuit_figure, part_words
from heredity.circuits.drawing import Drawing, Link, Part, union
from heredity.circuits.figure_style import LOWERS, NEUTRAL, RAISES


def chain(n: int, across: str = "token") -> Drawing:
    """Parts with effects 1, −1/2, 1/3, …, each linked to the next and to the target."""
    parts = [
        Part(f"p{i}", f"part {i}", "latent", i % 4, i % 6, (-1) ** i / (i + 1), rule=f"rule {i}") for i in range(n)
    ]
    parts.append(Part("target", "“x”", "logit", 4, 5, 2.0))
    links = [Link(f"p{i}", f"p{i + 1}", (-1) ** i / (i + 1), 1 / (i + 1)) for i in range(n - 1)]
    links += [Link(f"p{i}", "target", 1.0, 1 / (i + 1)) for i in range(n)]
    return Drawing("title", tuple("abcdef"), across, 4, tuple(parts), tuple(links), "effect", "link effect")


def traces(figure: Any, meta: str) -> list[Any]:
    return [trace for trace in figure.data if trace.meta == meta]


def shown(figure: Any, visible: Any = None, opacity: Any = None) -> set[str]:
    """Names of parts that show, as the filters stand or would stand."""
    visible = [t.visible for t in figure.data] if visible is None else visible
    opacity = [t.opacity for t in figure.data] if opacity is None else opacity
    found = set()
    for trace, on, strength in zip(figure.data, visible, opacity, strict=False):
        if trace.meta == "part" and on and strength:
            found |= set(trace.customdata)
    return found


def test_every_part_and_link_is_drawn_once() -> None:
    drawing = chain(60)
    figure = circuit_figure(drawing)
    parts = [name for trace in traces(figure, "part") for name in trace.customdata]
    assert sorted(parts) == sorted(part.id for part in drawing.parts)
    ends = sum(len(trace.x) for trace in traces(figure, "link"))
    assert ends == 3 * len(drawing.links)
    assert sum(len(trace.x) for trace in traces(figure, "link words")) == len(drawing.links)


def test_the_slider_shows_the_largest_effects_first() -> None:
    figure = circuit_figure(chain(60))
    (slider,) = figure.layout.sliders
    counts = [step.label for step in slider.steps]
    assert counts == ["10", "25", "50", "all 61"] and slider.active == 1
    for step, count in zip(slider.steps, (10, 25, 50, 61), strict=True):
        visible, own = step.args[0]["visible"], step.args[1]
        assert list(own) == list(range(len(visible)))
        names = shown(figure, visible, [1.0] * len(visible))
        assert names == {"target", *(f"p{i}" for i in range(count - 1))}
        for trace, on in zip(figure.data, visible, strict=False):
            if trace.meta == "link words" and on:  # no link without both of its ends
                for words in trace.text:
                    assert all(
                        int(end.split()[1]) < count for end in words.split("</b>")[0][3:].split(" → ") if "part" in end
                    )


def test_the_menu_hides_small_effects_and_their_links() -> None:
    figure = circuit_figure(chain(60))
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons][:2] == ["effects of any size", "≥ 1% of the largest"]
    button = next(b for b in menu.buttons if b.label.startswith("≥ 10%"))
    opacity, hover = button.args[0]["opacity"], button.args[0]["hoverinfo"]
    everything = [True] * len(opacity)
    assert shown(figure, everything, opacity) == {"target", *(f"p{i}" for i in range(10))}
    for trace, strength, hovering in zip(figure.data, opacity, hover, strict=False):
        assert hovering == ("text" if strength and trace.meta != "link" else "skip")
        assert trace.hoverinfo in ("text", "skip")


def test_the_figure_opens_as_its_filters_say() -> None:
    figure = circuit_figure(chain(400))
    (slider,), (menu,) = figure.layout.sliders, figure.layout.updatemenus
    n = len(slider.steps[0].args[1])
    assert [t.visible for t in figure.data[:n]] == list(slider.steps[slider.active].args[0]["visible"])
    assert [t.opacity for t in figure.data[:n]] == list(menu.buttons[menu.active].args[0]["opacity"])
    assert [t.hoverinfo for t in figure.data[:n]] == list(menu.buttons[menu.active].args[0]["hoverinfo"])


def test_parts_of_one_cell_do_not_hide_each_other() -> None:
    parts = tuple(Part(f"p{i}", "x", "latent", 1, 2, float(i)) for i in range(17))
    figure = circuit_figure(Drawing("t", ("a", "b", "c"), "token", 3, parts, (), "e", "l"))
    at = [(x, y) for t in traces(figure, "part") for x, y in zip(t.x, t.y, strict=True)]
    assert len(set(at)) == 17
    assert all(abs(x - 2) <= 0.4 and abs(y - 1) <= 0.4 for x, y in at)


def test_colours_tell_the_sign_and_in_a_union_the_status() -> None:
    figure = circuit_figure(chain(3))
    colour = {n: c for t in traces(figure, "part") for n, c in zip(t.customdata, t.marker.color, strict=True)}
    assert colour["p0"] == RAISES and colour["p1"] == LOWERS
    first, second = chain(3), chain(4)
    both = circuit_figure(
        union(replace(first, parts=first.parts[1:], links=()), replace(second, parts=second.parts[:3]))
    )
    found = {
        n: (c, s.endswith("-open"))
        for t in traces(both, "part")
        for n, c, s in zip(t.customdata, t.marker.color, t.marker.symbol, strict=True)
    }
    assert found["p0"] == (RAISES, False) and found["p1"] == (NEUTRAL, False) and found["target"] == (LOWERS, True)
    legend = [trace.name for trace in both.data if trace.name]
    assert "lost: only in first" in legend and "supports" not in legend


def test_hovering_tells_rule_effect_interval_and_q() -> None:
    drawing = chain(1)
    part = Part("p", "head 3", "head", 0, 0, -0.5, -0.7, -0.25, "the token “no”", 0.82, ("at “no”",))
    assert part_words(part, drawing) == (
        "<b>head 3</b><br>active: the token “no”<br>effect: -0.5 (95 % interval -0.7 to -0.25)<br>"
        "explained on texts not learned from: q = 0.82<br>at “no”"
    )
    bare = part_words(Part("p", "latent 1", "latent", 0, 0, 1.0), drawing)
    assert "no explanation known" in bare and "interval" not in bare and "q =" not in bare
    figure = circuit_figure(replace(drawing, parts=(part, *drawing.parts)))
    outlines = {n: w for t in traces(figure, "part") for n, w in zip(t.customdata, t.marker.line.width, strict=True)}
    assert outlines["p"] > 0 and outlines["p0"] == 0
    assert "explained (q ≥ 0.5)" in [trace.name for trace in figure.data]


def test_text_of_a_model_is_no_markup_in_plotly() -> None:
    evil = '<a href="javascript:x">\u202e'
    part = Part(evil, evil, "latent", 0, 0, 1.0, rule=evil, about=(evil,))
    other = replace(part, id="b", layer=1)
    drawing = Drawing(evil, (evil,), "token", 2, (part, other), (Link(evil, "b", 1.0, 1.0, (evil,)),), evil, evil)
    for each in (drawing, union(drawing, drawing, (evil, evil))):
        written = circuit_figure(each).to_json().replace("\\u003c", "<")
        assert "<a" not in written and "&lt;a href" in written and "\u202e" not in written and "u202e" not in written


@pytest.mark.parametrize("across", ["token", "part of the layer"])
def test_figures_of_little(across: str) -> None:
    empty = Drawing("t", ("a",), across, 1, (), (), "e", "l")
    assert circuit_figure(empty).to_json()
    assert circuit_figure(replace(empty, parts=(Part("x", "x", "error", 0, 0, 0.0),))).to_json()
