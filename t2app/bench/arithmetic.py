"""How fast the processor multiplies."""

import torch

from t2app.bench.figure import seconds
from t2app.kernels.build import has_bfloat16_arithmetic

_SIDE = 1024  # enough for a library to reach its speed, and few enough numbers for the caches


class Multiplication:
    """torch's own product of two square matrices: in bfloat16 where the CPU multiplies that, and in float32 else."""

    def __init__(self):
        matrix = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
        self._matrix = matrix.bfloat16() if has_bfloat16_arithmetic() else matrix
        self._product()

    def seconds_per_operation(self) -> float:
        """Of a multiplication or an addition, by all threads together."""
        return seconds(self._product) / (2 * _SIDE**3)

    def _product(self) -> None:
        self._matrix @ self._matrix
