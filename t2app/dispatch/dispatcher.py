"""The first pass: from a prompt to the weights of the experts.

A way to decide is a `Dispatcher`; there is one file for each. None of them knows how the answer is then decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

OTHER = "other"
OTHER_DESCRIPTION = "anything else: chatting, facts, opinions, writing"


@dataclass(frozen=True)
class Decision:
    """What the first pass decided.

    Attributes:
        label: the category it saw, None where it looked for none.
        weights: α of every expert of the model, by name.
        probabilities: by label, where there are any; they add up to 1.
    """

    label: str | None
    weights: Mapping[str, float]
    probabilities: Mapping[str, float] | None = None


class Dispatcher(Protocol):
    """Decides how the experts are mixed for a prompt; `name` is its name on the command line and on the page."""

    name: str

    def decide(self, prompt: str) -> Decision: ...
