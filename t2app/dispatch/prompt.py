"""Prompt-based dispatch (paper, section 3.2): the base model is asked to name the prompt's category.

The categories are the labels and one-line descriptions of the model's experts, and `other`, which is the base model.
Whole labels are scored, not their first tokens, and what the model would say anyway is taken off: its scores for texts
without content (contextual calibration, Zhao et al. 2021), asked once a model. The question is put as a text to go on
with and not as a chat.
"""

from collections.abc import Sequence
from functools import cached_property

import torch

from t2app.categories import OTHER, OTHER_DESCRIPTION
from t2app.decoding import answer_log_probabilities
from t2app.dispatch.dispatcher import Decision, decision_for
from t2app.messages import PROMPT
from t2app.models import Model

_CONTENT_FREE = ("", "N/A", "...", "[text]")


class PromptDispatch:
    """Gives the whole weight to the expert whose category is the most probable, or none for `other`."""

    name = PROMPT

    def __init__(self, model: Model):
        self._model = model
        self._categories = {expert.label: expert.description for expert in model.experts}
        self._categories[OTHER] = OTHER_DESCRIPTION

    def decide(self, prompt: str) -> Decision:
        probabilities = (self._scores([prompt])[0] - self._prior).softmax(0)
        by_label = dict(zip(self._categories, probabilities.tolist(), strict=True))
        return decision_for(max(by_label, key=by_label.__getitem__), by_label, self._model.experts)

    @cached_property
    def _prior(self) -> torch.Tensor:
        """Log-probability of each label for a request without content, (labels,)."""
        return self._scores(_CONTENT_FREE).log_softmax(1).mean(0)

    @torch.inference_mode()
    def _scores(self, prompts: Sequence[str]) -> torch.Tensor:
        """Log-probability of every label as the base model goes on, (prompts, labels)."""
        tokenizer = self._model.tokenizer
        labels = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in self._categories]
        questions = [tokenizer(self._question(prompt))["input_ids"] for prompt in prompts]
        n = len(questions)
        logs, mask = answer_log_probabilities(self._model.adapted, questions, [labels] * n, [None] * n)
        return (logs * mask).sum(1).view(n, len(labels)).float()

    def _question(self, prompt: str) -> str:
        categories = "".join(f"- {label}: {description}\n" for label, description in self._categories.items())
        return f"Categories:\n{categories}\nText: {prompt}\nCategory of the text:"
