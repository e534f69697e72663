"""The singular vectors and values of one weight matrix, and which weights an expert belongs to."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_FINGERPRINT_ENTRIES = 1024
# Strips of rows that a Gram matrix is computed in.
_GRAM_STRIPS = 4


@dataclass(frozen=True)
class Basis:
    """Singular vectors of the narrow side of one weight matrix.

    Attributes:
        vectors: (narrow, rank) float32 with orthonormal columns, by falling singular value; narrow = rank = min(m, n).
        singular_values: (rank,) float32, falling.
        edits_input: True where the narrow side is the layer's input (V), False where it is its output (U).
    """

    vectors: Tensor
    singular_values: Tensor
    edits_input: bool

    @property
    def rank(self) -> int:
        return self.singular_values.numel()


def basis_of(weight: Tensor) -> Basis:
    """The basis of `weight` (out_features, in_features) from the eigenvectors of its smaller Gram matrix.

    The Gram matrix squares the condition number, so it is formed and decomposed in float64: near-equal singular values
    then come out in the same order on every machine, which experts rely on.
    """
    out_features, in_features = weight.shape
    edits_input = in_features <= out_features
    matrix = weight.detach().to(torch.float64)
    eigenvalues, eigenvectors = torch.linalg.eigh(_lower_gram(matrix if edits_input else matrix.T), UPLO="L")
    return Basis(
        vectors=eigenvectors.flip(1).to(torch.float32).contiguous(),
        singular_values=eigenvalues.flip(0).clamp_min(0).sqrt().to(torch.float32),
        edits_input=edits_input,
    )


def _lower_gram(matrix: Tensor) -> Tensor:
    """XᵀX (n, n) for X (m, n), its lower triangle alone: what lies above means nothing."""
    n = matrix.shape[1]
    gram = matrix.new_empty(n, n)
    # Each strip as far as the triangle goes: of four, five eighths of the products.
    height = -(-n // _GRAM_STRIPS)
    for begin in range(0, n, height):
        end = begin + height
        gram[begin:end, :end] = matrix[:, begin:end].T @ matrix[:, :end]
    return gram


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over names, shapes and an even sample of the entries of `weights`, read as bfloat16.

    It takes the full-precision weights, so that it is the same whatever precision the model is then run in.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().flatten()
        # Float arithmetic would round differently for large matrices; integer strides do not.
        picks = torch.arange(_FINGERPRINT_ENTRIES, device=flat.device) * flat.numel() // _FINGERPRINT_ENTRIES
        entries = flat[picks].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}:{tuple(weight.shape)}\n".encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()
