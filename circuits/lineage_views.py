"""Plotly figures of a line of models: how far each drifted, and what its efficiency cost in opacity."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from .drawable import IntervalLike
from .figure_style import LOWERS, NEUTRAL, RAISES, label, style


@dataclass(frozen=True)
class Point:
    """A generation as the figures show it; None where something was not measured.

    Attributes:
        name: of the model.
        number: steps from the first ancestor.
        parent: index of its parent among the points.
        to_parent, to_first: mean KL(successor‖parent), nats per token.
        effect_to_parent, effect_to_first: of the largest behaviour, nats.
        verdict_to_parent, verdict_to_first: of the audits.
        efficiency: nats over a uniform guess per million parameters.
        opacity: the largest share of a finding's effect that nobody can explain.
    """

    name: str
    number: int
    parent: int | None
    to_parent: float | None
    to_first: float | None
    effect_to_parent: float | None
    effect_to_first: float | None
    verdict_to_parent: str | None
    verdict_to_first: str | None
    efficiency: float | None
    opacity: IntervalLike | None


_MARKS = {"flag": "x", "inconclusive": "diamond-open", "pass": "circle"}
_SERIES = (("to the parent", LOWERS, "to_parent"), ("to the first ancestor", RAISES, "to_first"))


def drift_figure(points: Sequence[Point], *, effects: bool = False) -> go.Figure:
    """Mean KL by generation (or, with ``effects``, the largest behaviour's): to the parent and to the first ancestor.

    Lines join a generation with its parent; marks say what the audits decided.
    """
    figure = go.Figure()
    unit = "nats" if effects else "nats per token"
    for title, color, name in _SERIES:
        attribute = f"effect_{name}" if effects else name
        x: list[float | None] = []
        y: list[float | None] = []
        for point in points:
            value = getattr(point, attribute)
            if value is None or point.parent is None:
                continue
            before = points[point.parent]
            # The first ancestor is at no distance from itself.
            start = getattr(before, attribute) if before.parent is not None else (0.0 if name == "to_first" else None)
            if start is not None:
                x += [before.number, point.number, None]
                y += [start, value, None]
        figure.add_scatter(
            x=x, y=y, mode="lines", line={"color": color, "width": 2}, hoverinfo="skip", showlegend=False
        )
        shown = [point for point in points if getattr(point, attribute) is not None]
        verdicts = [getattr(point, f"verdict_{name}") or "" for point in shown]
        figure.add_scatter(
            x=[point.number for point in shown],
            y=[getattr(point, attribute) for point in shown],
            mode="markers",
            name=title,
            marker={"color": color, "size": 11, "symbol": [_MARKS.get(verdict, "circle") for verdict in verdicts]},
            customdata=[
                f"<b>{label(point.name, 60)}</b><br>{title}: {getattr(point, attribute):.3g} {unit}<br>{verdict}"
                for point, verdict in zip(shown, verdicts, strict=True)
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    style(figure, height=340, legend=True)
    last = max((point.number for point in points), default=0)
    figure.update_xaxes(title_text="generation", dtick=max(1, last // 12), range=[-0.3, last + 0.3])
    what = "largest behaviour, nats" if effects else "mean KL(successor‖parent), nats per token"
    figure.update_yaxes(title_text=what, rangemode="tozero")
    return figure


def efficiency_figure(points: Sequence[Point]) -> go.Figure | None:
    """Efficiency against opacity, generations joined in their order; None where no generation has both."""
    shown = [point for point in points if point.efficiency is not None and point.opacity is not None]
    if not shown:
        return None
    opacities = [point.opacity for point in shown if point.opacity is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[point.efficiency for point in shown],
        y=[100 * value.estimate for value in opacities],
        mode="lines+markers+text",
        line={"color": NEUTRAL, "width": 1, "dash": "dot"},
        marker={"color": RAISES, "size": 12},
        text=[str(point.number) for point in shown],
        textposition="top center",
        error_y={
            "array": [100 * (value.high - value.estimate) for value in opacities],
            "arrayminus": [100 * (value.estimate - value.low) for value in opacities],
            "symmetric": False,
            "color": NEUTRAL,
        },
        customdata=[
            f"<b>{label(point.name, 60)}</b><br>{point.efficiency:.3g} nats per million parameters"
            f"<br>opacity {100 * value.estimate:.3g} % [{100 * value.low:.3g}, {100 * value.high:.3g}]"
            for point, value in zip(shown, opacities, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    style(figure, height=340)
    figure.update_xaxes(title_text="nats over a uniform guess, per million parameters")
    figure.update_yaxes(title_text="opacity of the findings, %")
    return figure
