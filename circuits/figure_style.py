"""What all figures look like, and how text of a model becomes text to Plotly.

Plotly reads a small subset of HTML (``<b>``, ``<a href>``, entities) in every label and hover text, so all text that
came from a model passes through :func:`label`.
"""

import html

import plotly.graph_objects as go

from heredity.interp.visible import visible

RAISES, LOWERS, NEUTRAL, INK = "#b8480c", "#1b66a8", "#5f6b7a", "#1b2430"
"""Of two hues that are told apart with every common kind of colour vision, and as dark as each other."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "#e3e7ec"


def label(text: str, limit: int = 18) -> str:
    """``text`` for a Plotly label: visible, at most ``limit`` characters, and no markup of Plotly's left in it."""
    shown = visible(text, 2 * limit)
    short = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return html.escape(short, quote=False)


def key(figure: go.Figure, name: str, *, symbol: str, color: str, outline: float = 0) -> None:
    """An entry of the legend, with no mark of its own."""
    marker = {"symbol": symbol, "color": color, "size": 12, "line": {"color": INK, "width": outline}}
    figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, hoverinfo="skip")


def style(figure: go.Figure, *, height: int, legend: bool = False) -> None:
    """Fonts, grid and margins that all figures share."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": "#9aa5b1", "ticks": "outside", "automargin": True}
    axis |= {"title": {"font": {"size": 13}, "standoff": 8}}
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 16, "t": 74 if legend else 22, "b": 56},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=legend,
        dragmode="zoom" if legend else False,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "itemclick": False, "itemdoubleclick": False},
        hoverlabel={"align": "left", "bgcolor": "#ffffff", "font": {"color": INK, "family": FONT}},
        modebar={"bgcolor": "rgba(255,255,255,0.9)", "color": NEUTRAL, "activecolor": INK},
        xaxis=axis,
        yaxis=axis,
    )
