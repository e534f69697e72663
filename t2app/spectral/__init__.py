"""Singular value fine-tuning as an edit beside an untouched layer.

With W = U diag(σ) Vᵀ an expert turns W into W' = U diag(σ ⊙ z) Vᵀ (arXiv 2501.06252, section 3.1). Only the basis of
W's narrow side is needed to compute W'x from Wx:

    in_features ≤ out_features:  W'x = W(x + V((z − 1) ⊙ Vᵀx))      the input is edited, then the layer runs as it is
    out_features < in_features:  W'x = y + U((z − 1) ⊙ Uᵀy), y = Wx  the layer runs as it is, then its output is edited

so nothing is ever written into the weights and every row of a batch can carry its own z. Where every row of a large
batch is edited, as in a training or a search, W' is cheaper as two factors in the basis: WV(z ⊙ Vᵀx), or U(z ⊙ UᵀWx).
Where all rows of many batches have one z, as in a first pass by an expert, W' is cheapest as a weight of its own. Where
rows have one z for many batches, as in an answer, V diag(z − 1) Vᵀ is cheapest as one matrix: by the kernels a triangle
of bytes (`PackedMatrix`), else a whole one for single tokens: of bytes on a GPU (edit_matrix.py), in bfloat16 on a CPU
(dense_matrix.py).
These files know linear layers and vectors; they do not know experts, prompts or how a model is loaded.
"""

from t2app.spectral.basis import Basis, basis_of, fingerprint
from t2app.spectral.layer import SpectralLinear, execution_device, linear_layer
from t2app.spectral.model import SpectralModel, require_gradients
from t2app.spectral.plan import Deltas, Plan, one_mixture

__all__ = [
    "Basis",
    "Deltas",
    "Plan",
    "SpectralLinear",
    "SpectralModel",
    "basis_of",
    "execution_device",
    "fingerprint",
    "linear_layer",
    "one_mixture",
    "require_gradients",
]
