"""The first pass: from a prompt to the weights of the experts.

A way to decide is a `Dispatcher`; there is one file for each. None of them knows how the answer is then decoded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from t2app.experts import Alpha, Expert
from t2app.messages import Searched
from t2app.parts import Parts, whole


@dataclass(frozen=True)
class Decision:
    """What the first pass decided.

    Attributes:
        label: the category it saw, None where it looked for none.
        weights: α of every expert of the model, by name, or an α for each block.
        probabilities: by label, where there are any; they add up to 1.
        note: a sentence for the user on how it was decided, where the rest does not tell.
        trace: the rounds of the search that found the weights, where one did.
    """

    label: str | None
    weights: Mapping[str, Alpha]
    probabilities: Mapping[str, float] | None = None
    note: str | None = None
    trace: Sequence[Searched] = ()


def decision_for(label: str, probabilities: Mapping[str, float], experts: Sequence[Expert]) -> Decision:
    """The whole weight for the expert of `label`, or none where no expert stands for it."""
    named = next((expert.name for expert in experts if expert.label == label), None)
    return Decision(label, {expert.name: float(expert.name == named) for expert in experts}, probabilities)


def softened(decision: Decision, experts: Sequence[Expert]) -> Decision:
    """The same with the probability of each expert's category as its weight."""
    return replace(decision, weights={expert.name: decision.probabilities[expert.label] for expert in experts})


class Dispatcher(ABC):
    """Decides how the experts are mixed for a prompt; `name` is its name on the command line and on the page."""

    name: str

    @abstractmethod
    def deciding(self, prompt: str) -> Parts[Decision]:
        """Decide in parts."""

    def speeding_up(self) -> Parts[None]:
        """Prepare in parts what later decisions are faster with and, but for rounding, no different."""
        yield from ()

    def decide(self, prompt: str) -> Decision:
        """Decide without a break."""
        return whole(self.deciding(prompt))
