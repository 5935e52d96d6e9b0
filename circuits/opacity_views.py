"""Figures of opacity: where a behaviour is opaque, and why."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import plotly.graph_objects as go

from .figure_style import INK, LOWERS, NEUTRAL, RAISES, label, style

_COLOURS = {
    "linear error": "#8fb8dc",
    "non-linear error": LOWERS,
    "error": LOWERS,
    "unlabelled": RAISES,
    "undivided": NEUTRAL,
}


@runtime_checkable
class SiteLike(Protocol):
    """A site and the shares of the behaviour that are opaque there, by reason."""

    @property
    def site(self) -> str: ...  # noqa: D102
    @property
    def shares(self) -> Mapping[str, float]: ...  # noqa: D102


def opacity_figure(sites: Sequence[SiteLike]) -> go.Figure:
    """Stacked bars over sites in the order of the forward, one colour for each reason; below 0 what opposes.

    Args:
        sites: shares of the behaviour by site and reason.
    """
    figure = go.Figure()
    names = [label(each.site, 20) for each in sites]
    reasons = dict.fromkeys(reason for each in sites for reason in each.shares)
    for reason in sorted(reasons, key=lambda name: [*_COLOURS, name].index(name)):
        values = [each.shares.get(reason, 0.0) for each in sites]
        figure.add_bar(
            x=list(range(len(sites))),
            y=values,
            name=label(reason, 30),
            marker={"color": _COLOURS.get(reason, INK)},
            customdata=[f"{name}: {label(reason, 30)} {100 * v:.1f} %" for name, v in zip(names, values, strict=True)],
            hovertemplate="%{customdata}<extra></extra>",
        )
    style(figure, height=280, legend=True)
    figure.update_layout(barmode="relative", bargap=0.35)
    step = max(1, len(sites) // 12)
    marks = list(range(0, len(sites), step))
    figure.update_xaxes(tickvals=marks, ticktext=[names[i] for i in marks])
    figure.update_yaxes(title_text="share of the behaviour", tickformat=".0%")
    return figure
