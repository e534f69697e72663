"""Plotly figures from plain data; they know nothing of models or of the page."""

import re
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from t2app.messages import Searched

BASE = "base model"
_BASE_COLOUR = "#94a3b8"
_COLOURS = ("#2563eb", "#059669", "#d97706", "#db2777", "#7c3aed", "#0891b2")
# Legible on a light and on a dark ground alike, since a figure does not learn which one it is on.
_TEXT_COLOUR = "#7c8594"
_GRID_COLOUR = "rgba(128, 128, 128, 0.25)"


def mixture_bars(weights: Mapping[str, float]) -> go.Figure:
    """The mixing weights as horizontal bars, the experts in their order and what is left for the base model last."""
    shares = {**weights, BASE: 1 - sum(weights.values())}
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(weights))] + [_BASE_COLOUR]
    return _bars(shares, colours, ".2f", ".3f")


def probability_bars(probabilities: Mapping[str, float]) -> go.Figure:
    """What the first pass took the prompt for, as horizontal bars by category."""
    figure = _bars(probabilities, _BASE_COLOUR, ".0%", ".1%").update_xaxes(tickformat=".0%")
    return figure if probabilities else _emptied(figure, "shown where the first pass looks at the prompt")


def change_map(changes: Mapping[str, float]) -> go.Figure:
    """How much of every matrix is changed, as a heat map: blocks from left to right, a row a matrix.

    Args:
        changes: mean |z − 1| by the layer's path, which holds the number of its block.
    """
    cells = {}
    for path, change in changes.items():
        block, matrix = _block_and_matrix(path)
        cells[matrix, block] = change
    matrices = list(dict.fromkeys(matrix for matrix, _ in cells))
    blocks = sorted({block for _, block in cells})
    figure = go.Figure(
        go.Heatmap(
            x=blocks,
            y=matrices,
            z=[[cells.get((matrix, block)) for block in blocks] for matrix in matrices],
            zmin=0,
            zmax=max(changes.values(), default=1.0),
            colorscale="Blues",
            colorbar={
                "orientation": "h",
                "thickness": 10,
                "y": -0.25,
                "yanchor": "top",
                "nticks": 5,
                "title": {"text": "mean |z − 1|", "side": "bottom"},
            },
            hovertemplate="block %{x}, %{y}: %{z:.4f}<extra></extra>",
        )
    )
    figure = _laid_out(
        figure,
        height=170 + 26 * max(len(matrices), 1),
        xaxis={"title": "block", "showgrid": False, "zeroline": False},
        yaxis={"autorange": "reversed", "automargin": True, "showgrid": False, "zeroline": False},
    )
    return figure if cells else _emptied(figure, "the base model, unchanged")


def search_trace(rounds: Sequence[Searched]) -> go.Figure:
    """A search by its rounds: mean and spread of each α above, the best score below."""
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.62, 0.38], vertical_spacing=0.1)
    numbers = [row.round for row in rounds]
    for i, name in enumerate(rounds[0].mean if rounds else ()):
        colour = _COLOURS[i % len(_COLOURS)]
        line = go.Scatter(
            x=numbers,
            y=[row.mean[name] for row in rounds],
            error_y={"array": [row.spread[name] for row in rounds], "thickness": 1.5, "width": 4},
            name=name,
            mode="lines+markers",
            line_color=colour,
            hovertemplate="round %{x}: %{y:.2f} ± %{error_y.array:.2f}<extra>%{fullData.name}</extra>",
        )
        figure.add_trace(line, 1, 1)
    exact = bool(rounds) and rounds[-1].right is not None
    score = go.Scatter(
        x=numbers,
        y=[row.right if exact else row.log_likelihood for row in rounds],
        mode="lines+markers",
        line_color=_BASE_COLOUR,
        showlegend=False,
        hovertemplate="round %{x}: %{y}<extra>best</extra>",
    )
    figure.add_trace(score, 2, 1)
    figure.update_xaxes(gridcolor=_GRID_COLOUR, zeroline=False, dtick=1 if len(rounds) < 20 else None)
    figure.update_yaxes(gridcolor=_GRID_COLOUR, zeroline=False, automargin=True)
    figure.update_yaxes(title="α", range=[-0.05, 1.05], row=1, col=1)
    figure.update_yaxes(title="right" if exact else "nats a token", row=2, col=1)
    figure.update_xaxes(title="round", row=2, col=1)
    figure = _laid_out(
        figure,
        height=440,
        # The page's label lies on the uppermost 40 pixels, the legend below it.
        margin={"l": 8, "r": 8, "t": 70, "b": 8},
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure if rounds else _emptied(figure, "nothing was searched yet")


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
    return _laid_out(
        figure,
        xaxis={"title": "step", "gridcolor": _GRID_COLOUR},
        yaxis={"title": "accuracy on validation", "tickformat": ".0%", "range": [0, 1], "gridcolor": _GRID_COLOUR},
        margin={},
        showlegend=len(validations) > 1,
    )


def _bars(
    values: Mapping[str, float], colours: str | Sequence[str], number_format: str, hover_format: str
) -> go.Figure:
    """Horizontal bars in the order of the values, from the top, each with its value at its end."""
    names = list(values)
    figure = go.Figure(
        go.Bar(
            x=list(values.values()),
            y=names,
            orientation="h",
            marker_color=colours,
            text=[format(value, number_format) for value in values.values()],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"%{{y}}: %{{x:{hover_format}}}<extra></extra>",
        )
    )
    low, high = min([0.0, *values.values()]), max([1.0, *values.values()])
    return _laid_out(
        figure,
        height=110 + 34 * max(len(names), 1),
        bargap=0.35,
        xaxis={
            # Room for the numbers at the bars' ends, on the left only where a bar ends there.
            "range": [low - 0.2 * (low < 0) * (high - low), high * 1.18],
            "gridcolor": _GRID_COLOUR,
            "zerolinecolor": _TEXT_COLOUR,
        },
        yaxis={"categoryorder": "array", "categoryarray": names[::-1], "automargin": True},
    )


def _laid_out(figure: go.Figure, **layout) -> go.Figure:
    """The figure with the looks that all of them share, and what is its own."""
    shared = {
        "margin": {"l": 8, "r": 8, "t": 40, "b": 8},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": _TEXT_COLOUR, "size": 13},
        "showlegend": False,
    }
    return figure.update_layout(**shared | layout)


def _emptied(figure: go.Figure, sentence: str) -> go.Figure:
    """A figure that has nothing to show yet: a sentence stands where axes would have numbers of Plotly's own."""
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.add_annotation(text=sentence, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")


def _block_and_matrix(path: str) -> tuple[int, str]:
    """The number of a layer's block, and its path within it."""
    block, matrix = re.search(r"\b(\d+)\.(.+)", path).groups()
    return int(block), matrix
