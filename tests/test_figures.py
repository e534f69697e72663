"""What the figures show of the data that they are given."""

import pytest

from t2app.figures import change_map, mixture_bars, probability_bars, search_trace
from t2app.messages import Searched

ROUNDS = [
    Searched(1, {"math": 0.5, "code": 0.1}, {"math": 0.2, "code": 0.1}, {"math": 0.6, "code": 0.0}, 3, -1.5, 32, 2.0),
    Searched(2, {"math": 0.7, "code": 0.0}, {"math": 0.1, "code": 0.0}, {"math": 0.7, "code": 0.0}, 4, -1.2, 60, 4.0),
]


def test_bars_show_each_weight_and_what_is_left_for_the_base_model():
    [bar] = mixture_bars({"math": 0.7, "code": 0.1}).data
    assert dict(zip(bar.y, bar.x, strict=True)) == pytest.approx({"math": 0.7, "code": 0.1, "base model": 0.2})


def test_probabilities_are_bars_by_category():
    [bar] = probability_bars({"math": 0.9, "other": 0.1}).data
    assert dict(zip(bar.y, bar.x, strict=True)) == {"math": 0.9, "other": 0.1}


def test_map_has_a_row_for_each_matrix_and_a_column_for_each_block():
    changes = {"model.layers.0.mlp.up": 0.1, "model.layers.10.mlp.up": 0.2, "model.layers.10.mlp.down": 0.3}
    [heat] = change_map(changes).data
    assert (heat.y, heat.x) == (("mlp.up", "mlp.down"), (0, 10))
    assert [list(row) for row in heat.z] == [[0.1, 0.2], [None, 0.3]]
    assert heat.zmax == 0.3


def test_trace_shows_mean_and_spread_of_each_weight_and_the_best_score():
    math, code, best = search_trace(ROUNDS).data
    assert (math.name, math.y, math.error_y.array) == ("math", (0.5, 0.7), (0.2, 0.1))
    assert (code.name, code.y) == ("code", (0.1, 0.0))
    assert (best.x, best.y) == ((1, 2), (3, 4))
    by_likelihood = [Searched(**vars(row) | {"right": None}) for row in ROUNDS]
    assert search_trace(by_likelihood).data[-1].y == (-1.5, -1.2)


def test_probabilities_that_are_not_there_have_no_axis_with_numbers():
    layout = probability_bars({}).layout
    assert layout.xaxis.visible is False and layout.yaxis.visible is False
    assert probability_bars({"math": 1.0}).layout.yaxis.visible is None


@pytest.mark.parametrize("figure", [probability_bars({}), change_map({}), search_trace(())])
def test_figure_without_data_says_so(figure):
    assert len(figure.layout.annotations) == 1 and figure.layout.annotations[0].text
    axes = [*figure.select_xaxes(), *figure.select_yaxes()]
    assert axes and all(axis.visible is False for axis in axes)  # nor numbers that mean nothing
