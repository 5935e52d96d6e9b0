"""A circuit as one interactive Plotly figure: layer × position or layer × part, with filters that work offline.

Filters are Plotly's own: a slider for how many parts are shown, largest effects first, and a menu for the least effect.
Both work on whole traces, so parts and links are sorted into traces by the step of each filter at which they appear;
the slider sets ``visible``, the menu ``opacity`` and hovering, and neither undoes the other.
"""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .drawing import Drawing, Kind, Link, Part, Status
from .figure_style import INK, LOWERS, NEUTRAL, RAISES, key, label, style

PARTS, LINKS = 1000, 3000
"""Drawn at most; the drawing says what it leaves out."""
EXPLAINED = 0.5
"""From which q on a part is outlined as explained."""
_SIZES = (10, 25, 50, 100, 250)
_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25)  # of the largest effect
_AT_FIRST = 25
_LINKS_AT_FIRST = 120
_KINDS: dict[Kind, tuple[str, str]] = {
    "head": ("attention head", "circle"),
    "mlp": ("MLP", "square"),
    "latent": ("latent", "hexagon"),
    "error": ("error", "x"),
    "token": ("token", "diamond"),
    "embedding": ("embedding", "diamond"),
    "logit": ("target", "star"),
}
_STATUS: dict[Status, tuple[str, str]] = {"kept": ("kept", NEUTRAL), "lost": ("lost", LOWERS), "new": ("new", RAISES)}
_KEPT_LINK = "#a3acb6"  # light: what did not change is the background
_Place = tuple[float, float]


def circuit_figure(drawing: Drawing) -> go.Figure:
    """``drawing`` as a figure: size is the effect of a part, colour its sign (in a union: kept, lost or new).

    Hovering tells the rule in words, the effect with its interval, and q where it is known.
    """
    drawing = drawing.strongest(PARTS, LINKS)
    figure, place = go.Figure(), _places(drawing)
    sizes = [n for n in _SIZES if n < len(drawing.parts)]
    part_step, part_level = _part_steps(drawing, sizes)
    link_step, link_level = _link_steps(drawing, part_step, part_level)
    first = next((i for i, n in enumerate(sizes) if n >= _AT_FIRST), len(sizes))
    least = _least(drawing, link_step, link_level, first)

    steps: list[tuple[int, int]] = []  # of each trace: the step and the level from which it shows
    for (step, level, colour, dash), links in _grouped(
        drawing.links,
        lambda link: (link_step[link.source, link.target], link_level[link.source, link.target], *_line(link)),
    ):
        width = (0.5, 0.8, 1.3, 2.0, 3.2)[level]
        figure.add_scatter(**_lines(links, place, colour, dash, width))
        figure.add_scatter(**_middles(links, place, drawing))
        steps += [(step, level)] * 2
    largest = max((abs(part.effect) for part in drawing.parts if part.kind != "logit"), default=0.0) or 1.0
    for (step, level), parts in _grouped(drawing.parts, lambda part: (part_step[part.id], part_level[part.id])):
        figure.add_scatter(**_markers(parts, place, drawing, largest))
        steps.append((step, level))
    traces: Any = figure.data
    for trace, (step, level) in zip(traces, steps, strict=True):
        trace.update(visible=step <= first, opacity=float(level >= least), hoverinfo=_hovering(trace, level >= least))
    _legend(figure, drawing)
    _axes(figure, drawing, place)
    _filters(figure, drawing, steps, sizes, first, least)
    return figure


def _grouped(items, by):
    groups: dict = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return sorted(groups.items(), key=lambda group: group[0])


# --- where things stand ---


def _places(drawing: Drawing) -> dict[str, _Place]:
    """Where each part stands; parts of one layer and column are spread over their cell, largest effect first."""
    cells: dict[tuple[int, float], list[Part]] = {}
    for part in drawing.parts:
        cells.setdefault((part.layer, part.column), []).append(part)
    found = {}
    for (layer, column), parts in cells.items():
        parts.sort(key=lambda part: -abs(part.effect))
        across = min(len(parts), max(3, math.ceil(math.sqrt(2 * len(parts)))))
        rows = math.ceil(len(parts) / across)
        for i, part in enumerate(parts):
            row, at = divmod(i, across)
            inside = min(across, len(parts) - row * across)
            x = _spread(_from_the_middle(at, inside), inside, 0.34)
            y = _spread(_from_the_middle(row, rows), rows, 0.3)
            found[part.id] = (column + x, layer + y)
    return found


def _from_the_middle(i: int, n: int) -> int:
    """The i-th place from the middle outwards, of n."""
    middle = (n - 1) // 2
    return middle + ((i + 1) // 2) * (1 if i % 2 else -1) if n > 1 else 0


def _spread(i: int, n: int, half: float) -> float:
    return half * (2 * i - n + 1) / max(n, 2)


# --- at which step of a filter things appear ---


def _part_steps(drawing: Drawing, sizes: Sequence[int]) -> tuple[dict[str, int], dict[str, int]]:
    ranked = sorted(drawing.parts, key=lambda part: (part.kind != "logit", -abs(part.effect)))
    largest = max((abs(part.effect) for part in drawing.parts if part.kind != "logit"), default=0.0)
    step = {part.id: sum(i >= n for n in sizes) for i, part in enumerate(ranked)}
    level = {part.id: _level(abs(part.effect), largest) for part in drawing.parts}
    for part in drawing.parts:
        if part.kind == "logit":  # what is explained always shows
            step[part.id], level[part.id] = 0, len(_LEVELS) - 1
    return step, level


def _link_steps(drawing: Drawing, part_step: dict[str, int], part_level: dict[str, int]):
    """A link appears with the later of its ends, and goes with the first of them."""
    largest = max((link.strength for link in drawing.links), default=0.0)
    step, level = {}, {}
    for link in drawing.links:
        pair = link.source, link.target
        step[pair] = max(part_step[link.source], part_step[link.target])
        ends = min(part_level[link.source], part_level[link.target])
        level[pair] = min(_level(link.strength, largest), ends)
    return step, level


def _level(size: float, largest: float) -> int:
    return max((i for i, share in enumerate(_LEVELS) if size >= share * largest), default=0) if largest else 0


def _least(drawing: Drawing, step: dict, level: dict, first: int) -> int:
    """The level at which not too many links are drawn at the beginning."""
    shown = [level[link.source, link.target] for link in drawing.links if step[link.source, link.target] <= first]
    for least in range(len(_LEVELS) - 1):
        if sum(own >= least for own in shown) <= _LINKS_AT_FIRST:
            return least
    return len(_LEVELS) - 1


# --- traces ---


def _colour(effect: float, status: Status | None) -> str:
    if status is not None:
        return _STATUS[status][1]
    return RAISES if effect >= 0 else LOWERS


def _line(link: Link) -> tuple[str, str]:
    dash = "dot" if link.status is not None and link.effect < 0 else "solid"
    return _KEPT_LINK if link.status == "kept" else _colour(link.effect, link.status), dash


def _lines(links: Sequence[Link], place: dict[str, _Place], colour: str, dash: str, width: float) -> dict:
    x: list[float | None] = []
    y: list[float | None] = []
    for link in links:
        (x0, y0), (x1, y1) = place[link.source], place[link.target]
        x += [x0, x1, None]
        y += [y0, y1, None]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    line = {"color": f"rgba({red},{green},{blue},0.6)", "width": width, "dash": dash}
    return {"x": x, "y": y, "mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False, "meta": "link"}


def _middles(links: Sequence[Link], place: dict[str, _Place], drawing: Drawing) -> dict:
    """Invisible marks halfway, to hover over."""
    names = {part.id: part.name for part in drawing.parts}
    ends = [(place[link.source], place[link.target]) for link in links]
    return {
        "x": [(a[0] + b[0]) / 2 for a, b in ends],
        "y": [(a[1] + b[1]) / 2 for a, b in ends],
        "mode": "markers",
        "marker": {"size": 9, "color": "rgba(0,0,0,0)"},
        "text": [_link_words(link, names, drawing) for link in links],
        "hoverinfo": "text",
        "showlegend": False,
        "meta": "link words",
    }


def _markers(parts: Sequence[Part], place: dict[str, _Place], drawing: Drawing, largest: float) -> dict:
    biggest = 26 if drawing.n_layers <= 14 else 20
    outlined = [part.q is not None and part.q >= EXPLAINED for part in parts]
    lost = [part.status == "lost" for part in parts]
    sizes = [16.0 if p.kind == "logit" else 7 + (biggest - 7) * min(1.0, abs(p.effect) / largest) ** 0.5 for p in parts]
    colours = [INK if p.kind == "logit" and p.status is None else _colour(p.effect, p.status) for p in parts]
    return {
        "x": [place[part.id][0] for part in parts],
        "y": [place[part.id][1] for part in parts],
        "mode": "markers",
        "marker": {
            "symbol": [_KINDS[p.kind][1] + ("-open" if gone else "") for p, gone in zip(parts, lost, strict=True)],
            "size": sizes,
            "color": colours,
            "opacity": 1,
            "line": {
                "color": [colour if gone else INK for colour, gone in zip(colours, lost, strict=True)],
                "width": [2.5 if gone else 2.2 if ring else 0 for gone, ring in zip(lost, outlined, strict=True)],
            },
        },
        "text": [part_words(part, drawing) for part in parts],
        "hoverinfo": "text",
        "showlegend": False,
        "cliponaxis": False,
        "meta": "part",
        "customdata": [label(part.id, 60) for part in parts],
    }


def _hovering(trace, shown: bool) -> str:
    return "text" if shown and trace.meta != "link" else "skip"


# --- words ---


def part_words(part: Part, drawing: Drawing) -> str:
    """What hovering over a part tells."""
    lines = [f"<b>{label(part.name, 60)}</b>"]
    if part.status is not None and drawing.compared is not None:
        before, after = (label(name, 40) for name in drawing.compared)
        lines[0] += {
            "kept": f" (in {before} and in {after})",
            "lost": f" (only in {before})",
            "new": f" (only in {after})",
        }[part.status]
    if part.rule:
        lines.append(f"active: {label(part.rule, 110)}")
    elif part.kind in ("latent", "head", "mlp"):
        lines.append("no explanation known")
    if part.kind != "logit":
        interval = (
            "" if part.low is None or part.high is None else f" (95 % interval {part.low:+.3g} to {part.high:+.3g})"
        )
        lines.append(f"effect: {part.effect:+.3g}{interval}")
    if part.q is not None:
        lines.append(f"explained on texts not learned from: q = {part.q:.2f}")
    return "<br>".join([*lines, *(label(line, 90) for line in part.about)])


def _link_words(link: Link, names: dict[str, str], drawing: Drawing) -> str:
    lines = [f"<b>{label(names[link.source], 50)} → {label(names[link.target], 50)}</b>"]
    if link.status is not None and drawing.compared is not None:
        lines[0] += f" ({link.status})"
    lines.append(f"{label(drawing.link_effect, 80)}: {link.effect:+.3g}")
    return "<br>".join([*lines, *(label(line, 90) for line in link.about)])


# --- around the plot ---


def _legend(figure: go.Figure, drawing: Drawing) -> None:
    for kind, (name, symbol) in _KINDS.items():
        if any(part.kind == kind for part in drawing.parts):
            key(figure, name, symbol=symbol, color=INK if kind == "logit" else NEUTRAL)
    if drawing.compared is not None:
        before, after = (label(name, 24) for name in drawing.compared)
        key(figure, f"kept: in {before} and {after}", symbol="circle", color=NEUTRAL)
        key(figure, f"lost: only in {before}", symbol="circle-open", color=LOWERS)
        key(figure, f"new: only in {after}", symbol="circle", color=RAISES)
        return
    key(figure, "supports", symbol="circle", color=RAISES)
    key(figure, "works against", symbol="circle", color=LOWERS)
    if any(part.q is not None for part in drawing.parts):
        key(figure, f"explained (q ≥ {EXPLAINED:g})", symbol="circle", color="#ffffff", outline=2.2)


def _axes(figure: go.Figure, drawing: Drawing, place: dict[str, _Place]) -> None:
    layers = sorted({part.layer for part in drawing.parts}) or [0]
    low, high = layers[0], layers[-1]
    each = 46 if high - low <= 14 else 30
    style(figure, height=min(1400, 250 + each * (high - low + 1)), legend=True)
    tokens = drawing.across == "token"
    inner = [y for y in range(low, high + 1) if 0 <= y < drawing.n_layers]
    apart = max(1, math.ceil(len(inner) / 32))
    named = {y: f"layer {y}" for y in inner if y % apart == 0}
    named |= {-1: "tokens" if tokens else "embedding"} if low < 0 else {}
    named |= {drawing.n_layers: "targets" if tokens else "logits"} if high >= drawing.n_layers else {}
    figure.update_yaxes(
        tickvals=list(named), ticktext=list(named.values()), range=[low - 0.6, high + 0.6], showgrid=True
    )
    columns, used = len(drawing.columns), [x for x, _ in place.values()] or [0.0]
    first = max(0, math.floor(min(used) + 0.4)) if tokens and columns > 40 else 0
    figure.update_xaxes(
        tickvals=list(range(columns)),
        ticktext=[label(name, 14) for name in drawing.columns],
        autotickangles=[0, -60],
        range=[first - 0.6, columns - 0.4],
    )


def _filters(
    figure: go.Figure,
    drawing: Drawing,
    steps: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    first: int,
    least: int,
) -> None:
    own, n = list(range(len(steps))), len(drawing.parts)
    counts = [*sizes, n]
    if len(counts) > 1:
        slides = [
            {
                "method": "restyle",
                "label": f"all {n}" if count == n else str(count),
                "args": [{"visible": [step <= i for step, _ in steps]}, own],
            }
            for i, count in enumerate(counts)
        ]
        figure.update_layout(
            sliders=[
                {
                    "active": first,
                    "steps": slides,
                    "currentvalue": {"prefix": "parts shown, largest effects first: ", "font": {"size": 13}},
                    "pad": {"t": 46, "b": 8},
                    "len": 0.72,
                    "x": 0,
                    "y": 0,
                    "tickcolor": NEUTRAL,
                    "bordercolor": NEUTRAL,
                    "ticklen": 4,
                }
            ]
        )
    if not steps:
        return
    traces = figure.data[: len(steps)]
    buttons = [
        {
            "method": "restyle",
            "label": "effects of any size" if not share else f"≥ {share:.0%} of the largest",
            "args": [
                {
                    "opacity": [float(level >= i) for _, level in steps],
                    "hoverinfo": [_hovering(t, level >= i) for t, (_, level) in zip(traces, steps, strict=True)],
                },
                own,
            ],
        }
        for i, share in enumerate(_LEVELS)
    ]
    figure.update_layout(
        updatemenus=[
            {
                "active": least,
                "buttons": buttons,
                "x": 1,
                "xanchor": "right",
                "y": 0,
                "yanchor": "top",
                "pad": {"t": 62, "r": 0},
                "direction": "up",
                "bgcolor": "#ffffff",
                "bordercolor": NEUTRAL,
                "font": {"size": 13},
            }
        ],
        margin={"b": 130},
    )
