"""Figures from plain data: where the marks stand, and that text from a model is text to Plotly."""

from dataclasses import dataclass

import pytest

from heredity.circuits import views


@dataclass
class Node:
    id: str
    layer: int
    attribution: float = 1.0
    patch: float | None = 0.9
    ablation: float | None = None
    selected: bool = False


@dataclass
class Point:
    node: str
    layer: int
    position: int
    attribution: float


@dataclass
class Estimate:
    estimate: float
    low: float
    high: float


@dataclass
class Similarity:
    site: str
    cka: float


NODES = [
    Node("attn_head@1.2", 1, 0.6, selected=True),
    Node("attn_head@1.10", 1, -0.3),
    Node("mlp_out@0", 0, 0.2),
    Node("embed", 0, 0.1),
]
GRID = [Point(node.id, node.layer, i, node.attribution) for node in NODES for i in (0, 2)]


def markers(figure):
    """Position, height, colour and outline of every data marker, by hover text's node name."""
    found = {}
    for trace in figure.data:
        if trace.customdata is None:
            continue
        for i, (x, y) in enumerate(zip(trace.x, trace.y, strict=True)):
            name = trace.customdata[i][0].split("</b>")[0].removeprefix("<b>")
            found[name, x] = (
                y,
                trace.marker.color[i],
                trace.marker.line.width[i],
                trace.marker.size[i],
                trace.marker.symbol,
            )
    return found


def test_circuit_figure_places_every_node() -> None:
    found = markers(views.circuit_figure(["a", "b", "c"], GRID, NODES))
    assert set(found) == {(node.id, x) for node in NODES for x in (0, 2)}
    rows = {name: y for (name, x), (y, *_) in found.items() if x == 0}
    assert rows["embed"] < rows["mlp_out@0"] < rows["attn_head@1.2"] < rows["attn_head@1.10"]
    assert found["attn_head@1.2", 0][1] == views.RAISES and found["attn_head@1.10", 0][1] == views.LOWERS
    assert found["attn_head@1.2", 0][2] > 0 and found["mlp_out@0", 0][2] == 0
    assert found["attn_head@1.2", 0][3] > found["attn_head@1.10", 0][3] > found["mlp_out@0", 0][3]
    assert len({found[name, 0][4] for name in ("embed", "mlp_out@0", "attn_head@1.2")}) == 3


def test_circuit_figure_tells_unmeasured_from_zero() -> None:
    figure = views.circuit_figure(["a", "b", "c"], GRID, NODES)
    hover = next(t.customdata[0][0] for t in figure.data if t.customdata is not None and "1.2" in t.customdata[0][0])
    assert "parent’s value put in: 90 % of the gap closes" in hover
    assert "mean value put in: not measured" in hover


def test_circuit_figure_leaves_specks_out() -> None:
    grid = [Point("mlp_out@0", 0, 0, 1.0), Point("mlp_out@0", 0, 1, 0.005), Point("mlp_out@0", 0, 2, -0.02)]
    assert {x for _, x in markers(views.circuit_figure(["a", "b", "c"], grid, NODES))} == {0, 2}


def test_circuit_figure_of_a_long_text_starts_near_its_first_point() -> None:
    grid = [Point("mlp_out@0", 0, 3, 0.001), Point("mlp_out@0", 0, 90, 1.0)]
    figure = views.circuit_figure(["a"] * 100, grid, NODES)
    low, high = figure.layout.xaxis.range
    assert 86 < low < 90 and 99 < high < 100


@pytest.mark.parametrize(
    ("tokens", "grid", "nodes"), [([], [], []), (["a"], [], NODES), (["a"], [Point("x", 3, 9, 0.0)], [])]
)
def test_circuit_figure_of_little(tokens: list[str], grid: list[Point], nodes: list[Node]) -> None:
    assert views.circuit_figure(tokens, grid, nodes).to_json()


def test_text_of_a_model_is_no_markup_in_plotly() -> None:
    evil = '<a href="javascript:x">'
    figures = [
        views.circuit_figure([evil], [Point(evil, 0, 0, 1.0)], [Node(evil, 0)]),
        views.cka_figure([Similarity(evil, 0.5)]),
    ]
    for figure in figures:
        written = figure.to_json()
        assert "<a" not in written.replace("\\u003c", "<")
        assert "&lt;a href" in written


def test_labels_keep_an_entity_as_it_was_written() -> None:
    assert views.label("&lt;b&gt;") == "&amp;lt;b&amp;gt;"
    assert views.label("\u202e" * 100) == "⟨U+202E⟩⟨U+202E⟩⟨…"
    assert views.label("x" * 100) == "x" * 17 + "…"


def test_reversion_figure_keeps_negative_and_large_shares_in_view() -> None:
    figure = views.reversion_figure(Estimate(0.9, 0.8, 1.3), None, [-0.4, 0.1], target=0.8)
    low, high = figure.layout.xaxis.range
    assert low < -0.4 and high > 1.3
    assert list(figure.layout.yaxis.ticktext) == ["parent’s values", "random sets"]
    assert views.reversion_figure(None, None, []).to_json()


def test_null_figure_draws_zero_on_a_logarithm() -> None:
    figure = views.null_figure(Estimate(4.0, -0.1, 5.0), [0.0, 0.02])
    dots = next(trace for trace in figure.data if trace.customdata is not None)
    assert figure.layout.xaxis.type == "log"
    assert all(x > 0 for x in dots.x) and min(dots.x) < 0.02
    assert dots.customdata[0] == "null successor 1: 0 nats"  # the hover text tells the true value


def test_null_figure_of_close_effects_is_linear() -> None:
    figure = views.null_figure(Estimate(9.0, 8.0, 10.0), [0.0, 5.0])
    assert figure.layout.xaxis.type != "log"
    assert list(next(trace for trace in figure.data if trace.customdata is not None).x) == [0.0, 5.0]
    assert views.null_figure(Estimate(0.0, 0.0, 0.0), []).to_json()


def test_histogram_and_similarity() -> None:
    histogram = views.kl_histogram([0.0, 0.1, 1.0], [5, 0])
    assert list(histogram.data[0].y) == [5, None]
    assert histogram.data[0].customdata[0] == "0 to 0.1 nats: 5 tokens"
    assert list(views.cka_figure([Similarity("resid_post@0", 0.5), Similarity("resid_post@1", 1.0)]).data[0].y) == [
        0.5,
        1.0,
    ]
    assert views.cka_figure([]).to_json() and views.kl_histogram([], []).to_json()


def test_depth_figure_shows_shares_below_0_and_each_end_of_their_intervals() -> None:
    figure = views.depth_figure({"layer 0": Estimate(1.25, 1.0, 1.75), "layer 1": Estimate(-0.25, -0.5, 0.0)})
    (bars,) = figure.data
    assert list(bars.y) == [1.25, -0.25] and list(figure.layout.xaxis.ticktext) == ["layer 0", "layer 1"]
    assert list(bars.error_y.array) == [0.5, 0.25] and list(bars.error_y.arrayminus) == [0.25, 0.25]
    assert bars.customdata[1] == "layer 1: -25.0 % (-50.0 to 0.0)"
