"""Prompt-based dispatch (paper, section 3.2): the base model is asked to name the prompt's category.

The categories are the labels and one-line descriptions of the model's experts, and `other`, which is the base model.
The question is put as a text to go on with and not as a chat; what stands in it before the prompt is computed once a
model. Whole labels are scored, not their first tokens, and what the model would say anyway is taken off.
"""

from collections.abc import Sequence

import torch

from t2app.categories import OTHER, OTHER_DESCRIPTION
from t2app.decoding import choice_log_probabilities, compute_prefix, run_in_parts
from t2app.dispatch.dispatcher import Decision, Dispatcher, decision_for, softened
from t2app.dispatch.wordings import ASKED, CALIBRATIONS, DEFAULT_CALIBRATION, WORDINGS, Wording
from t2app.messages import PROMPT, PROMPT_SOFT
from t2app.models.model import Model
from t2app.parts import Parts, whole


class PromptDispatch(Dispatcher):
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

    def deciding(self, prompt: str) -> Parts[Decision]:
        scores = []
        for question in self._questions:
            scores.append((yield from question.scores(prompt)))
        probabilities = dict(zip(self._labels, torch.stack(scores).mean(0).softmax(0).tolist(), strict=True))
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
        priors = [whole(self._log_probabilities(text)) for text in calibration]
        self._prior = torch.stack(priors).mean(0) if calibration else 0

    def scores(self, prompt: str) -> Parts[torch.Tensor]:
        """Log-probability of every label, less what the model gives it anyway, (labels,)."""
        return (yield from self._log_probabilities(prompt)) - self._prior

    def _log_probabilities(self, prompt: str) -> Parts[torch.Tensor]:
        question, adapted = self._ids(f"{prompt}{self._wording.after}"), self._model.adapted
        question, prefix = yield from run_in_parts(adapted, question, [None], self._prefix)
        with torch.inference_mode():
            return choice_log_probabilities(adapted, question, self._labels, None, prefix).log_softmax(0).cpu()

    def _ids(self, text: str) -> list[int]:
        return self._model.tokenizer(text, add_special_tokens=False)["input_ids"]
