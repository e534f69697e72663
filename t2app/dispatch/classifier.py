"""Dispatch by the classification expert (paper, section 3.2): the question that it was trained on, asked under its z.

Whole labels are scored, as in the prompt-based dispatch, but as the answer in a chat: so it was trained. What all
questions begin with is computed once a model.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from t2app.categories import CLASSIFIER, LABELS, question
from t2app.decoding import Prefix, choice_log_probabilities, compute_prefix, run_in_parts
from t2app.dispatch.dispatcher import Decision, Dispatcher, decision_for
from t2app.dispatch.prompt import PromptDispatch
from t2app.experts import mix
from t2app.machine import can_spare
from t2app.models.model import Model
from t2app.parts import Parts


class ClassifierDispatch(Dispatcher):
    """Gives the whole weight to the expert whose label the classification expert answers, or none for `other`.

    Where the model has no classification expert the base model is asked instead, and the decision says so.
    """

    name = CLASSIFIER

    def __init__(self, model: Model):
        self._model = model
        self._instead = PromptDispatch(model) if model.classifier is None else None
        if model.classifier is not None:
            self._labels = [model.tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
            self._mixture = mix([model.classifier], {model.classifier.name: 1.0})
            self._beginning = model.beginning(question)
            self._prefix = self._computed(self._beginning)

    def deciding(self, prompt: str) -> Parts[Decision]:
        if self._instead is not None:
            note = f"{self._model.name} has no classification expert: the base model was asked instead."
            decision = yield from self._instead.deciding(prompt)
            return replace(decision, note=note)
        scores = yield from self._scores(prompt)
        probabilities = dict(zip(LABELS, scores.softmax(0).tolist(), strict=True))
        return decision_for(max(probabilities, key=probabilities.__getitem__), probabilities, self._model.experts)

    def speeding_up(self) -> Parts[None]:
        """Merge the classification expert, under which every question is read."""
        adapted = self._model.adapted
        if self._instead is None and can_spare(adapted.merged_bytes(self._mixture)):
            yield from adapted.merging(self._mixture)

    @torch.inference_mode()
    def _computed(self, beginning: Sequence[int]) -> Prefix | None:
        """What all questions begin with, computed once."""
        return compute_prefix(self._model.adapted, beginning, [self._mixture]) if beginning else None

    def _scores(self, prompt: str) -> Parts[torch.Tensor]:
        """Log-probability of every label as the answer of the classification expert, (labels,)."""
        asked, prefix = self._model.prompt_ids(question(prompt)), None
        # A tokenizer may join the prompt's first characters with what comes before them.
        if self._prefix is not None and asked[: self._prefix.length] == self._beginning:
            asked, prefix = asked[self._prefix.length :], self._prefix
        adapted = self._model.adapted
        asked, prefix = yield from run_in_parts(adapted, asked, [self._mixture], prefix)
        with torch.inference_mode():
            return choice_log_probabilities(adapted, asked, self._labels, self._mixture, prefix)
