"""Decoding steps that are one call of the kernels each, on a CPU."""

from collections.abc import Sequence

from t2app.decoding.context import Context, plain_step
from t2app.decoding.sampling import NextLogits
from t2app.kernels.steps import KernelSteps
from t2app.spectral import Plan, SpectralModel


class StepCalls:
    """The steps of a batch, prepared for as long as its rows stay the same and its cache has room.

    Where there is no kernel for them, each is a pass of the model.
    """

    def __init__(self, adapted: SpectralModel):
        self._adapted = adapted
        self.begin({})

    def begin(self, plan: Plan) -> None:
        """Expect other rows, by this plan, from now on."""
        self._plan = plan
        self._prepared: KernelSteps | None = None

    def run(self, ids: Sequence[int], places: Sequence[int], context: Context) -> NextLogits:
        """What follows a token of each row at its place, which the context takes in."""
        length = context.cache.get_seq_length() + 1
        if self._prepared is None or length > self._prepared.room:
            with self._adapted.using(self._plan):
                self._prepared = KernelSteps.of(self._adapted.model, context.cache, places, context.mask)
                if self._prepared is None:
                    return plain_step(self._adapted, ids, places, context)
        context.extend(1)
        for layer in context.cache.layers:
            layer.advance()
        return NextLogits(*self._prepared(ids, length))
