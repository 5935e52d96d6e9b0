"""A training at a glance, from its history alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .history import Row

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def figure(history: Sequence[Row], *, title: str = "Training") -> "Figure":
    """Variance explained (and loss recovered), active latents per token, and dead latents, over tokens.

    Raises:
        ValueError: there are no rows.
    """
    from plotly.graph_objects import Figure, Scatter
    from plotly.subplots import make_subplots

    if not history:
        raise ValueError("no rows to draw: the training has not come to its first")
    tokens = [row.tokens for row in history]
    out: Figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, subplot_titles=("explained", "active", "dead")
    )
    places = len(history[-1].fve)
    for place in range(places):
        name = "variance explained" if places == 1 else f"variance explained, model {place}"
        line = Scatter(x=tokens, y=[row.fve[place] for row in history], name=name, mode="lines")
        out.add_trace(line, row=1, col=1)
    measured = [row for row in history if row.recovered is not None]
    if measured:
        points = Scatter(
            x=[row.tokens for row in measured],
            y=[row.recovered for row in measured],
            name="loss recovered",
            mode="markers",
        )
        out.add_trace(points, row=1, col=1)
    out.add_trace(Scatter(x=tokens, y=[row.l0 for row in history], name="active per token", mode="lines"), row=2, col=1)
    aimed = Scatter(x=tokens, y=[row.k for row in history], name="k", mode="lines", line={"dash": "dot"})
    out.add_trace(aimed, row=2, col=1)
    out.add_trace(Scatter(x=tokens, y=[row.dead for row in history], name="dead", mode="lines"), row=3, col=1)
    left = Scatter(
        x=tokens, y=[row.left for row in history], name="error the dead leave", mode="lines", line={"dash": "dot"}
    )
    out.add_trace(left, row=3, col=1)
    out.update_yaxes(tickformat=".0%", row=1, col=1)
    out.update_yaxes(rangemode="tozero", row=2, col=1)
    out.update_yaxes(tickformat=".0%", rangemode="tozero", row=3, col=1)
    out.update_xaxes(title_text="tokens", row=3, col=1)
    out.update_layout(title_text=title, template="plotly_white", height=640)
    return out
