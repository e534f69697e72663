"""What a batch has done to it: which of its rows each layer edits, and by what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from t2app.kernels.edits import PackedMatrix, RowEdit
from t2app.kernels.linear import FastLinear
from t2app.spectral.dense_matrix import DenseMatrix

if TYPE_CHECKING:
    from t2app.spectral.edit_matrix import EditMatrix

# V diag(z − 1) Vᵀ of one layer and mixture, for the kernels or for torch.
Matrix = PackedMatrix | DenseMatrix

# z − 1 of every adapted module, by the module's path; a path that is missing is left as it is. One row's mixture.
Deltas = Mapping[str, Tensor]


@dataclass(eq=False)
class RowDeltas:
    """Which rows of a batch one layer edits, and by what.

    Attributes:
        count: rows of the batch.
        edited: the rows that are edited, as an index into the batch.
        delta: z − 1 (1 or edited rows, rank) in float32; one row where all edited rows share it.
        merged: a layer of W' in place of the edit; None where there is none for these rows.
        matrix: of the edit; None where there is none. All but the kernels' edit single tokens only.
        kernel: of the edit; matrix_kernel: of the packed matrix. Each is made when it is first used.
    """

    count: int
    edited: slice | Tensor
    delta: Tensor
    merged: FastLinear | None = None
    matrix: "Matrix | EditMatrix | None" = None
    kernel: RowEdit | None = None
    matrix_kernel: RowEdit | None = None

    @property
    def edits_all(self) -> bool:
        return isinstance(self.edited, slice) and self.edited.stop - self.edited.start == self.count


# By a layer's path; None where it edits no row.
Plan = Mapping[str, RowDeltas | None]


class PlanInUse:
    """What all layers of a model look up their part of a plan in: to set it in each of them takes a tenth of a step."""

    def __init__(self):
        self.plan: Plan | None = None


def one_mixture(rows: Sequence[Deltas | None]) -> Deltas | None:
    """The mixture of all adapted rows, known as the same object; None where there is none, or more than one."""
    adapted = [deltas for deltas in rows if deltas is not None]
    return adapted[0] if adapted and all(deltas is adapted[0] for deltas in adapted) else None
