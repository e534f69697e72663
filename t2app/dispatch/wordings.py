"""How the base model is asked for a prompt's category, and how its liking for some labels is taken off.

`bench wordings` compares all of these, on prompts to train on.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """A text to go on with: what stands before the prompt, the same for every prompt, and what follows it.

    Attributes:
        category: a part for every category, with its {label} and {description}.
        before: with {categories}, those parts.
    """

    category: str
    before: str
    after: str

    def beginning(self, categories: Mapping[str, str]) -> str:
        """What stands before every prompt, for categories as descriptions by label."""
        parts = [self.category.format(label=label, description=text) for label, text in categories.items()]
        return self.before.format(categories="".join(parts))


WORDINGS = {
    # Each category's description stands as an example of it.
    "examples": Wording("Text: {description}\nCategory: {label}\n\n", "{categories}Text: ", "\nCategory:"),
    "question": Wording(
        "{label} is {description}. ", "{categories}What kind of request is this?\n\n", "\n\nThe kind of request is:"
    ),
    "quoted": Wording(
        'The text "{description}" is of the category {label}.\n', '{categories}The text "', '" is of the category'
    ),
    "list": Wording("- {label}: {description}\n", "Categories:\n{categories}\nText: ", "\nCategory of the text:"),
}
# Those that are asked, together: each is wrong about other prompts.
ASKED = ("examples", "question", "quoted")

# The texts over which the labels' mean log-probabilities are taken off those for a prompt, by name.
CALIBRATIONS = {
    # Prompts of no known category, two of each that ships (batch calibration, Zhou et al. 2024).
    "batch": (
        "A ticket costs 8 euros and children pay half. What do two adults and three children pay?",
        "What is 240 divided by 16?",
        "Write a Python function that returns the words of a text in reverse order.",
        "def area(width, height): complete this so that it returns the area.",
        "Mia arrived before Tom and after Lea. Who came first?",
        "Which of these keeps a drink cold the longest: a paper cup, a glass, a vacuum flask?",
        "Tell me about the history of Lisbon.",
        "Could you write a friendly note to my neighbour?",
    ),
    # Texts without content (contextual calibration, Zhao et al. 2021).
    "content-free": ("", "N/A", "...", "[text]"),
    "none": (),
}
DEFAULT_CALIBRATION = "batch"
