"""Prompt-based dispatch (paper, section 3.2): the base model is asked to name the prompt's category.

The categories are the labels and one-line descriptions of the model's experts, and `other`, which is the base model.
The question is put as a text to go on with and not as a chat; what stands in it before the prompt is computed once a
model. Whole labels are scored, not their first tokens, and what the model would say anyway is taken off.
"""

from collections.abc import Sequence

import torch

from t2app.categories import OTHER, OTHER_DESCRIPTION
from t2app.context import compute_prefix
from t2app.decoding import answer_log_probabilities
from t2app.dispatch.dispatcher import Decision, decision_for, softened
from t2app.dispatch.wordings import ASKED, CALIBRATIONS, DEFAULT_CALIBRATION, WORDINGS, Wording
from t2app.messages import PROMPT, PROMPT_SOFT
from t2app.models import Model


class PromptDispatch:
    """Gives the whole weight to the expert whose category is the most probable, or none for `other`.

    Args:
        soft: give each expert the probability of its category instead.
        wordings: names in `WORDINGS`; the mean of their log-probabilities counts.
        calibration: a name in `CALIBRATIONS`.
    """

    def __init__(
        self,
        model: Model,
        soft: bool = False,
        wordings: Sequence[str] = ASKED,
        calibration: str = DEFAULT_CALIBRATION,
    ):
        self.name = PROMPT_SOFT if soft else PROMPT
        self._experts, self._soft = model.experts, soft
        categories = {expert.label: expert.description for expert in model.experts} | {OTHER: OTHER_DESCRIPTION}
        self._labels = list(categories)
        self._questions = [
            _Question(model, WORDINGS[wording], categories, CALIBRATIONS[calibration]) for wording in wordings
        ]

    def decide(self, prompt: str) -> Decision:
        scores = torch.stack([question.scores(prompt) for question in self._questions]).mean(0)
        probabilities = dict(zip(self._labels, scores.softmax(0).tolist(), strict=True))
        decision = decision_for(max(probabilities, key=probabilities.__getitem__), probabilities, self._experts)
        return softened(decision, self._experts) if self._soft else decision


class _Question:
    """One wording, put to one model: its beginning is computed here, and what the model answers to most texts."""

    @torch.inference_mode()
    def __init__(self, model: Model, wording: Wording, categories: dict[str, str], calibration: Sequence[str]):
        self._model, self._wording = model, wording
        self._labels = [self._ids(f" {label}") for label in categories]
        beginning = model.tokenizer(wording.beginning(categories))["input_ids"]
        self._prefix = compute_prefix(model.adapted, beginning, [None])
        self._prior = torch.stack([self._log_probabilities(text) for text in calibration]).mean(0) if calibration else 0

    @torch.inference_mode()
    def scores(self, prompt: str) -> torch.Tensor:
        """Log-probability of every label, less what the model gives it anyway, (labels,)."""
        return self._log_probabilities(prompt) - self._prior

    def _log_probabilities(self, prompt: str) -> torch.Tensor:
        question = self._ids(f"{prompt}{self._wording.after}")
        logs, mask = answer_log_probabilities(
            self._model.adapted, [question], [self._labels], [None], prefix=self._prefix
        )
        return (logs * mask).sum(1).float().log_softmax(0).cpu()

    def _ids(self, text: str) -> list[int]:
        return self._model.tokenizer(text, add_special_tokens=False)["input_ids"]
