"""The basis of real weights: as orthogonal as `bench basis` says, and its edit that of a decomposition in float64."""

import pytest
import torch

from t2app.bench.basis import _edit_by_basis, _figures, orthogonality_error
from t2app.spectral import Basis, basis_of, linear_layer

LAYERS = [f"model.layers.{block}.{layer}" for block in (0, 15, 29) for layer in ("mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize("path", [*LAYERS, "model.layers.7.self_attn.q_proj", "model.layers.7.self_attn.v_proj"])
def test_basis_of_a_real_matrix_is_orthogonal_to_1e_4(real, path):
    layer = real.adapted.layers[path]
    basis = Basis(layer.vectors.T, layer.singular_values, layer.edits_input)
    assert orthogonality_error(basis) <= 1e-4
    doubled = Basis(2 * basis.vectors, basis.singular_values, basis.edits_input)
    assert orthogonality_error(doubled) == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("path", LAYERS[:2])
def test_edit_of_a_real_matrix_is_that_of_a_decomposition_in_float64(real, path):
    weight = linear_layer(real.adapted.model, path).weight.detach().double()
    figures = {figure.figure.rsplit("_", 1)[0]: figure for figure in _figures([weight.float()])}
    assert figures["edit_error"].value <= 1e-3 and figures["orthogonality_error"].value <= 1e-4
    assert figures["svd_over_basis"].value == figures["svd"].value / figures["basis"].value
    # The edit of a mixture that scales every direction alike is a share of the weight itself, whatever the basis.
    edit = _edit_by_basis(weight, basis_of(weight), torch.full((min(weight.shape),), 0.5, dtype=torch.float64))
    torch.testing.assert_close(edit, 0.5 * weight, rtol=1e-4, atol=1e-6)
