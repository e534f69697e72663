"""The ways to decide a mixture, by the name that the command line and the page use."""

from collections.abc import Mapping

from t2app.categories import CLASSIFIER
from t2app.dispatch.classifier import ClassifierDispatch
from t2app.dispatch.dispatcher import Decision, Dispatcher
from t2app.dispatch.few_shot import FewShotDispatch
from t2app.dispatch.manual import ManualDispatch
from t2app.dispatch.prompt import PromptDispatch
from t2app.found_mixtures import mixture_file, read_mixture
from t2app.messages import DISPATCHERS, MANUAL, PROMPT_SOFT, check_weights, few_shot, mixture_name
from t2app.models.model import Model

__all__ = [
    "ClassifierDispatch",
    "Decision",
    "Dispatcher",
    "FewShotDispatch",
    "ManualDispatch",
    "PromptDispatch",
    "make_dispatcher",
]


def make_dispatcher(name: str, model: Model, weights: Mapping[str, float] | None = None) -> Dispatcher:
    """The dispatcher called `name`, one of `messages.DISPATCHERS` or `few-shot:NAME`, for a model.

    Raises:
        ValueError: there is no such dispatcher, or weights are given to one that decides them itself, or are missing.
        ExpertError: a weight is given for an expert that the model does not have.
        MixtureError: there is no mixture of that name, or it does not fit the model.
    """
    kept = mixture_name(name)
    if not kept and name not in DISPATCHERS:
        raise ValueError(f"there is no dispatch '{name}'; choose one of {', '.join(DISPATCHERS)}, {few_shot('NAME')}")
    check_weights(name, weights)
    if kept:
        return FewShotDispatch(model, read_mixture(mixture_file(model.name, kept)))
    if name == MANUAL:
        return ManualDispatch(model, weights)
    if name == CLASSIFIER:
        return ClassifierDispatch(model)
    return PromptDispatch(model, soft=name == PROMPT_SOFT)
