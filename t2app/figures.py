"""Plotly figures from plain data; they know nothing of models or of the page."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

BASE = "base model"
_BASE_COLOUR = "#94a3b8"
_COLOURS = ("#2563eb", "#059669", "#d97706", "#db2777", "#7c3aed", "#0891b2")
# Legible on a light and on a dark ground alike, since a figure does not learn which one it is on.
_TEXT_COLOUR = "#7c8594"
_GRID_COLOUR = "rgba(128, 128, 128, 0.25)"


def mixture_bars(weights: Mapping[str, float]) -> go.Figure:
    """The mixing weights as horizontal bars, the experts in their order and what is left for the base model last."""
    shares = {**weights, BASE: 1 - sum(weights.values())}
    names = list(shares)
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(weights))] + [_BASE_COLOUR]
    figure = go.Figure(
        go.Bar(
            x=list(shares.values()),
            y=names,
            orientation="h",
            marker_color=colours,
            text=[f"{share:.2f}" for share in shares.values()],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    low, high = min(0.0, *shares.values()), max(1.0, *shares.values())
    figure.update_layout(
        height=110 + 34 * len(names),
        margin={"l": 8, "r": 8, "t": 40, "b": 8},
        bargap=0.35,
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": _TEXT_COLOUR, "size": 13},
        xaxis={"range": [low * 1.15, high * 1.12], "gridcolor": _GRID_COLOUR, "zerolinecolor": _TEXT_COLOUR},
        yaxis={"categoryorder": "array", "categoryarray": names[::-1], "automargin": True},
        showlegend=False,
    )
    return figure


def training_curve(validations: Mapping[str, Sequence[tuple[int, float]]]) -> go.Figure:
    """Validation accuracy by step, a line for each training."""
    figure = go.Figure(
        [
            go.Scatter(
                x=[step for step, _ in points],
                y=[accuracy for _, accuracy in points],
                name=name,
                mode="lines+markers",
                line_color=_COLOURS[i % len(_COLOURS)],
                hovertemplate="step %{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
            )
            for i, (name, points) in enumerate(validations.items())
        ]
    )
    figure.update_layout(
        xaxis={"title": "step", "gridcolor": _GRID_COLOUR},
        yaxis={"title": "accuracy on validation", "tickformat": ".0%", "range": [0, 1], "gridcolor": _GRID_COLOUR},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": _TEXT_COLOUR, "size": 13},
        showlegend=len(validations) > 1,
    )
    return figure
