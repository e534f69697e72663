"""Dispatch by hand: the weights are given and the prompt is not looked at."""

from collections.abc import Mapping

from t2app.dispatch.dispatcher import Decision, Dispatcher
from t2app.experts import ExpertError
from t2app.messages import MANUAL
from t2app.models.model import Model
from t2app.parts import Parts


class ManualDispatch(Dispatcher):
    """Always decides on `weights`; an expert that is not named gets 0.

    Raises:
        ExpertError: a weight is given for an expert that the model does not have.
    """

    name = MANUAL

    def __init__(self, model: Model, weights: Mapping[str, float]):
        names = [expert.name for expert in model.experts]
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ExpertError(f"there is no expert '{unknown[0]}'; this model has: {', '.join(names) or 'none'}")
        self._weights = {name: float(weights.get(name, 0.0)) for name in names}

    def deciding(self, prompt: str) -> Parts[Decision]:
        yield from ()  # there is nothing to compute
        return Decision(label=None, weights=self._weights)
