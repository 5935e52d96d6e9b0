"""Plotly figures of what an audit measured: pure functions from plain data, for reports and notebooks alike.

All text that came from a model passes through :func:`.figure_style.label`.
"""

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from .drawable import GridPointLike, IntervalLike, NodeLike, SimilarityLike
from .figure_style import INK, LOWERS, NEUTRAL, RAISES, key, label, style

_SMALLEST_SHOWN = 0.01  # of the largest attribution: below it a marker is a speck
_DECADES = 50  # largest over smallest effect from which a logarithmic axis shows more than a linear one
_LONG = 40  # tokens; more than this are shown from the first marker on
_KINDS = {
    "attn_head": ("attention head", "circle"),
    "mlp_out": ("MLP", "square"),
    "embed": ("embedding", "diamond"),
    "unembed": ("unembedding", "diamond-tall"),
}
_OTHER_KIND = ("other node", "hexagon")


def circuit_figure(tokens: Sequence[str], grid: Sequence[GridPointLike], nodes: Sequence[NodeLike]) -> go.Figure:
    """A circuit over layer × position: marker area is |attribution|, colour its sign, shape the kind of node.

    Nodes of one layer are spread over its band so that they do not hide each other; the selected ones are outlined.
    Points below 1 % of the largest attribution are left out; of a long text, so are the tokens before the first point.

    Args:
        tokens: of the example, in order.
        grid: attribution per node and position.
        nodes: the ranked nodes; ``grid`` names them by id.
    """
    by_id = {node.id: node for node in nodes}
    rows, ticks = _rows({(point.node, point.layer) for point in grid} | {(node.id, node.layer) for node in nodes})
    shown, largest = _visible_points(grid)
    biggest = 30 if len(ticks) <= 12 else 20  # deep models get narrow bands
    figure = go.Figure()
    for kind, (name, symbol) in [*_KINDS.items(), ("", _OTHER_KIND)]:
        points = [p for p in shown if _kind(p.node) == (name, symbol)]
        if not points:
            continue
        chosen = [(node := by_id.get(p.node)) is not None and node.selected for p in points]
        figure.add_scatter(
            x=[p.position for p in points],
            y=[rows[p.node] for p in points],
            mode="markers",
            name=name,
            showlegend=False,
            meta=kind,
            cliponaxis=False,
            marker={
                "symbol": symbol,
                "size": [7 + (biggest - 7) * (abs(p.attribution) / largest) ** 0.5 for p in points],
                "color": [RAISES if p.attribution > 0 else LOWERS for p in points],
                "opacity": [0.92 if c else 0.45 for c in chosen],
                "line": {"color": INK, "width": [2.5 if c else 0 for c in chosen]},
            },
            customdata=[[_hover(p, by_id.get(p.node), tokens)] for p in points],
            hovertemplate="%{customdata[0]}<extra></extra>",
        )
        key(figure, name, symbol=symbol, color=NEUTRAL)
    key(figure, "carries the divergence", symbol="circle", color=RAISES)
    key(figure, "works against it", symbol="circle", color=LOWERS)
    key(figure, "in the smallest set", symbol="circle", color="#ffffff", outline=2.5)
    first, n = shown_positions(tokens, grid)
    style(figure, height=min(1100, 200 + max(62 * len(ticks), 17 * len(rows))), legend=True)
    figure.add_vline(x=n - 1, line={"color": INK, "width": 1, "dash": "dot"}, layer="below")
    figure.update_xaxes(
        tickvals=list(range(len(tokens))),
        ticktext=[label(token, 14) for token in tokens],
        autotickangles=[0, -60],
        range=[first - 0.7, n - 0.3],
    )
    if n - first > _LONG:  # wider than the page, which opens at the right end
        figure.update_yaxes(side="right")
        figure.update_layout(legend={"x": 1, "xanchor": "right"}, margin={"l": 16, "r": 90})
    if first:
        figure.update_xaxes(title_text=f"(the {first} tokens before these carry no marker)")
    figure.update_yaxes(
        tickvals=list(ticks.values()),
        ticktext=list(ticks),
        range=[min(ticks.values()) - 0.6, max(ticks.values()) + 0.6],
    )
    return figure


def shown_positions(tokens: Sequence[str], grid: Sequence[GridPointLike]) -> tuple[int, int]:
    """First position that :func:`circuit_figure` shows, and the one after the last."""
    points, _ = _visible_points(grid)
    first = max(0, min((p.position for p in points), default=0) - 3) if len(tokens) > _LONG else 0
    return first, max(len(tokens), 1)


def reversion_figure(
    reversion: IntervalLike | None,
    ablation: IntervalLike | None,
    controls: Sequence[float],
    *,
    target: float | None = None,
) -> go.Figure:
    """How much of the gap a circuit closes when it is switched off, beside matched random sets.

    Args:
        reversion: share closed with the parent's values put in; None where not measured.
        ablation: share closed with mean values put in; None where not measured.
        controls: share closed by each random set of the same number and kinds of nodes.
        target: the share the circuit was asked to close, drawn as a line.
    """
    figure = go.Figure()
    rows = [
        (value, name)
        for value, name in ((reversion, "parent’s values"), (ablation, "mean values"))
        if value is not None
    ]
    for row, (value, name) in enumerate(rows):
        _interval(figure, value, row, name, percent=True)
    last = len(rows)
    _dots(figure, controls, last, "random set", percent=True)
    names = [name for _, name in rows] + ["random sets"]
    ends = [0.0, 1.0, *controls, *(end for value, _ in rows for end in (value.low, value.high))]
    style(figure, height=124 + 44 * len(names))
    if target is not None:
        figure.add_vline(x=target, line={"color": INK, "width": 1.5, "dash": "dash"}, layer="below")
        figure.add_annotation(
            x=target, y=1, yref="paper", yanchor="bottom", text=f"asked: {target:.0%}", showarrow=False
        )
    figure.update_xaxes(
        title_text="share of the gap closed",
        tickformat=".0%",
        range=[min(ends) - 0.05, max(ends) + 0.05],
        zeroline=True,
    )
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[last + 0.6, -0.6], showgrid=False)
    return figure


def null_figure(effect: IntervalLike, largest_effects: Sequence[float]) -> go.Figure:
    """An effect beside the largest effect of every null successor, in nats.

    The axis is logarithmic where they lie decades apart; a logarithm has no zero, so what is not positive is then drawn
    at the left edge.
    """
    values = [effect.estimate, effect.low, effect.high, *largest_effects]
    positive = [v for v in values if v > 0]
    wide = bool(positive) and max(positive) > _DECADES * min(positive)
    left = max(min(positive), max(positive) * 1e-6) / 1.6 if wide else -1e9
    figure = go.Figure()
    _interval(figure, effect, 0, "this behaviour", floor=left)
    _dots(figure, largest_effects, 1, "null successor", floor=left)
    style(figure, height=202)
    figure.update_xaxes(title_text="effect, nats (KL successor‖parent)")
    if wide:
        figure.update_xaxes(type="log", dtick=1, minor={"ticks": "outside"})
    else:
        figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(tickvals=[0, 1], ticktext=["this one", "null"], range=[1.6, -0.6], showgrid=False)
    return figure


def kl_histogram(edges: Sequence[float], counts: Sequence[int]) -> go.Figure:
    """Tokens per bin of KL(successor‖parent), bins drawn equally wide whatever their edges, counts on a log axis.

    Args:
        edges: bin edges in nats, one more than ``counts``.
        counts: tokens per bin.
    """
    spans = [
        f"{low:.3g} to {high:.3g} nats: {n:,} tokens" for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    figure = go.Figure(
        go.Bar(
            x=[i + 0.5 for i in range(len(counts))],
            y=[n if n else None for n in counts],
            width=0.92,
            marker={"color": LOWERS},
            customdata=spans,
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    style(figure, height=250)
    top = math.log10(max(counts, default=1) or 1) + 0.2  # one token must still be a bar
    step = max(1, len(edges) // 10)
    marks = list(range(0, len(edges), step))
    figure.update_xaxes(
        title_text="KL, nats per token",
        tickvals=marks,
        ticktext=[f"{edges[i]:.2g}".replace("e-0", "e-") for i in marks],
    )
    figure.update_yaxes(title_text="tokens (log scale)", type="log", dtick=1, range=[-0.2, top])
    return figure


def cka_figure(similarity: Sequence[SimilarityLike]) -> go.Figure:
    """Linear CKA of parent and successor at each site, in the order given (1 = same geometry)."""
    figure = go.Figure(
        go.Scatter(
            x=list(range(len(similarity))),
            y=[s.cka for s in similarity],
            mode="lines+markers",
            line={"color": LOWERS, "width": 2},
            marker={"size": 8},
            customdata=[f"{label(s.site, 40)}: {s.cka:.4f}" for s in similarity],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    style(figure, height=250)
    step = max(1, len(similarity) // 12)
    marks = list(range(0, len(similarity), step))
    lowest = min((s.cka for s in similarity), default=0.0)
    figure.update_xaxes(tickvals=marks, ticktext=[label(similarity[i].site, 20) for i in marks])
    figure.update_yaxes(title_text="linear CKA", range=[min(lowest - 0.02, 0.9), 1.01])
    return figure


def depth_figure(parts: Mapping[str, IntervalLike]) -> go.Figure:
    """Share of a divergence that each stretch of the computation is the reason of, with intervals; below 0 what takes
    back what others do.

    Args:
        parts: by name, in the order of the forward.
    """
    names, shares = [label(name, 20) for name in parts], list(parts.values())
    figure = go.Figure(
        go.Bar(
            x=list(range(len(names))),
            y=[share.estimate for share in shares],
            marker={"color": LOWERS},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [share.high - share.estimate for share in shares],
                "arrayminus": [share.estimate - share.low for share in shares],
                "color": INK,
                "thickness": 1,
                "width": 4,
            },
            customdata=[
                f"{name}: {100 * share.estimate:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"
                for name, share in zip(names, shares, strict=True)
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    style(figure, height=250)
    figure.update_layout(bargap=0.35)
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names)
    figure.update_yaxes(title_text="share of the divergence", tickformat=".0%")
    return figure


def _visible_points(grid: Sequence[GridPointLike]) -> tuple[list[GridPointLike], float]:
    largest = max((abs(point.attribution) for point in grid), default=0.0)
    return [p for p in grid if largest and abs(p.attribution) >= _SMALLEST_SHOWN * largest], largest


def _kind(node: str) -> tuple[str, str]:
    return _KINDS.get(node.split("@")[0], _OTHER_KIND)


def _rows(nodes: set[tuple[str, int]]) -> tuple[dict[str, float], dict[str, float]]:
    """Height of every node and of every band: embedding at the bottom, layers in order, unembedding on top."""
    inner = [layer for node, layer in nodes if node not in ("embed", "unembed")]
    low, high = min(inner, default=0), max(inner, default=0)
    bands: dict[float, list[str]] = {}
    for node, layer in nodes:
        band = low - 1 if node == "embed" else high + 1 if node == "unembed" else layer
        bands.setdefault(band, []).append(node)
    height: dict[str, float] = {}
    for band, members in bands.items():
        members.sort(key=lambda node: (_kind(node)[0] == "MLP", [int(t) for t in _digits(node)], node))
        for i, node in enumerate(members):
            height[node] = band + 0.76 * ((i + 0.5) / len(members) - 0.5)
    named = {band: f"layer {band:g}" for band in range(low, high + 1)} if inner else {}
    named |= {low - 1: "embedding"} if "embed" in height else {}
    named |= {high + 1: "unembedding"} if "unembed" in height else {}
    return height, {text: float(band) for band, text in sorted(named.items())} or {"": 0.0}


def _digits(node: str) -> list[str]:
    return [part[:9] for part in node.split("@")[-1].split(".") if part.isascii() and part.isdigit()]


def _hover(point: GridPointLike, node: NodeLike | None, tokens: Sequence[str]) -> str:
    token = tokens[point.position] if 0 <= point.position < len(tokens) else ""
    lines = [
        f"<b>{label(point.node, 40)}</b> at “{label(token, 40)}” (position {point.position})",
        f"attribution here: {point.attribution:+.3g}",
    ]
    if node is not None:
        lines += [
            f"attribution, all positions: {node.attribution:+.3g}",
            f"parent’s value put in: {_share(node.patch)}",
            f"mean value put in: {_share(node.ablation)}",
            "in the smallest set" if node.selected else "not in the smallest set",
        ]
    return "<br>".join(lines)


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.3g} % of the gap closes"


def _interval(
    figure: go.Figure, value: IntervalLike, row: int, name: str, *, percent: bool = False, floor: float = -1e9
) -> None:
    low, mid, high = (max(v, floor) for v in (value.low, value.estimate, value.high))
    ends = f"{_number(value.low, percent)} to {_number(value.high, percent)}"
    figure.add_scatter(
        x=[mid],
        y=[row],
        mode="markers",
        marker={"color": RAISES, "size": 10, "symbol": "diamond"},
        error_x={
            "array": [high - mid],
            "arrayminus": [mid - low],
            "symmetric": False,
            "thickness": 3,
            "width": 9,
            "color": RAISES,
        },
        hovertemplate=f"{name}: {_number(value.estimate, percent)} ({ends})<extra></extra>",
        showlegend=False,
    )


def _dots(
    figure: go.Figure, values: Sequence[float], row: int, name: str, *, percent: bool = False, floor: float = -1e9
) -> None:
    figure.add_scatter(
        x=[max(v, floor) for v in values],
        y=[row + ((i * 7) % 5 - 2) * 0.08 for i in range(len(values))],
        mode="markers",
        marker={"color": NEUTRAL, "size": 9, "opacity": 0.7, "line": {"color": "#ffffff", "width": 1}},
        customdata=[f"{name} {i + 1}: {_number(v, percent)}" for i, v in enumerate(values)],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.3g} nats"
